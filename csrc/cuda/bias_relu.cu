// Launcher of bias_relu_.
#include "../kernels/bias_relu.cuh"
#include "launch.h"

namespace lottery {
namespace {

void bias_relu_(Tensor x, const Tensor& bias_, const OptionalTensor& shortcut_) {
  check_bias_relu(x, bias_, shortcut_);
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const bool channels_last = !x.is_contiguous();
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor bias = bias_.contiguous(), shortcut = shortcut_ ? shortcut_->contiguous(format) : Tensor();
  const int64_t size = x.numel(), channels = x.size(1), inner = channels_last ? 1 : x.size(2) * x.size(3);
  DISPATCH_FLOATING(x.scalar_type(), "bias_relu_", [&] {
    using A = Accumulator<scalar_t>;
    const auto launch = [&](auto index) {
      using I = decltype(index);
      LAUNCH((bias_relu_kernel<scalar_t, A, I>), blocks_for(size, kPack<scalar_t> * kBiasReluThreads), kBiasReluThreads,
             0, current_stream(), x.mutable_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(),
             shortcut.defined() ? shortcut.const_data_ptr<scalar_t>() : nullptr, I(size), I(channels), I(inner));
    };
    size < (int64_t(1) << 30) ? launch(0u) : launch(0ll);  // 32-bit divisions where they do
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) { m.impl("bias_relu_", &lottery::bias_relu_); }
