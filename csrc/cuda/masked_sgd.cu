// Launcher of masked_sgd_.
#include "../kernels/masked_sgd.cuh"
#include "launch.h"

namespace lottery {
namespace {

// One launch for up to kSgdTensors tensors of one type, another when there are more.
template <class T>
void launch(const std::vector<SgdTensor>& tensors, at::ScalarType type, const SgdStep& step, const Tensor& lr) {
  SgdTensors<T> batch;
  batch.count = 0;
  batch.first_block[0] = 0;
  const auto flush = [&] {
    if (batch.count == 0) return;
    LAUNCH(masked_sgd_kernel<T>, batch.first_block[batch.count], kSgdThreads, 0, current_stream(), batch, step,
           lr.const_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    batch.count = 0;
  };
  for (const SgdTensor& t : tensors) {
    if (t.param.scalar_type() != type) continue;
    const int i = batch.count++;
    batch.param[i] = t.param.mutable_data_ptr<T>();
    batch.grad[i] = t.grad.const_data_ptr<T>();
    batch.momentum[i] = t.momentum.mutable_data_ptr<float>();
    batch.mask[i] = t.mask.defined() ? bytes(t.mask) : nullptr;
    batch.size[i] = t.param.numel();
    batch.first_block[i + 1] = batch.first_block[i] + unsigned(ceil_div<int64_t>(batch.size[i], kSgdBlock));
    if (batch.count == kSgdTensors) flush();
  }
  flush();
}

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                 at::ArrayRef<OptionalTensor> masks, const Tensor& lr, double momentum, double dampening,
                 double weight_decay, bool nesterov) {
  const auto tensors = check_masked_sgd(params, grads, momenta, masks, lr);
  if (tensors.empty()) return;
  const c10::cuda::CUDAGuard guard(params[0].device());
  const SgdStep step{0, float(momentum), float(dampening), float(weight_decay), nesterov};
  launch<float>(tensors, at::kFloat, step, lr);
  launch<at::Half>(tensors, at::kHalf, step, lr);
  launch<at::BFloat16>(tensors, at::kBFloat16, step, lr);
  copy_back(tensors);
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) { m.impl("masked_sgd_", &lottery::masked_sgd_); }
