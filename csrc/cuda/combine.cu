// Launcher of combine_.
#include "../kernels/combine.cuh"
#include "launch.h"

namespace lottery {
namespace {

constexpr int64_t kSharedFloats = 48 * 1024 / 4;

void combine_(Tensor points, const Tensor& states_, const Tensor& coefficients_, const OptionalTensor& keep_) {
  check_combine(points, states_, coefficients_, keep_);
  if (points.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(points.device());
  const Tensor states = states_.contiguous(), coefficients = coefficients_.contiguous();
  const Tensor keep = keep_ ? keep_->contiguous() : Tensor();
  const int64_t size = states.size(1), count = states.size(0), total = points.size(0);
  TORCH_CHECK(count <= kSharedFloats, "combine_: at most ", kSharedFloats, " states on a GPU, got ", count);
  const int64_t chunk = std::min({total, kSharedFloats / count, int64_t(64)}), chunks = ceil_div(total, chunk);
  TORCH_CHECK(chunks <= 65535, "combine_: at most ", 65535 * chunk, " points at once on a GPU, got ", total);
  const auto kernel = count == 2   ? combine_kernel<2>
                      : count == 3 ? combine_kernel<3>
                      : count == 4 ? combine_kernel<4>
                                   : combine_kernel<0>;
  const dim3 grid(blocks_for(size, 4 * kCombineThreads), unsigned(chunks));
  LAUNCH(kernel, grid, kCombineThreads, chunk * count * sizeof(float), current_stream(),
         points.mutable_data_ptr<float>(), states.const_data_ptr<float>(), coefficients.const_data_ptr<float>(),
         keep.defined() ? bytes(keep) : nullptr, (long long)size, int(count), int(total), int(chunk));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) { m.impl("combine_", &lottery::combine_); }
