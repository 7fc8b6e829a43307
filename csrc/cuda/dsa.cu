// Launcher of dsa.
#include <ATen/ops/empty_like.h>

#include "../kernels/dsa.cuh"
#include "launch.h"

namespace lottery {
namespace {

Tensor dsa(const Tensor& images_, const Tensor& colour_, const Tensor& transform_) {
  check_dsa(images_, colour_, transform_);
  const c10::cuda::CUDAGuard guard(images_.device());
  const Tensor images = images_.contiguous(), colour = colour_.contiguous(), transform = transform_.contiguous();
  const Tensor result = at::empty_like(images);
  if (images.numel() == 0) return result;
  const int64_t size = images.numel() / images.size(0);
  TORCH_CHECK(size <= (int64_t(1) << 30) && images.size(0) <= kBlocksX, "dsa: too large, ", images.sizes());
  const auto kernel = std::array{dsa_kernel<1>, dsa_kernel<2>, dsa_kernel<3>, dsa_kernel<4>}[images.size(1) - 1];
  LAUNCH(kernel, unsigned(images.size(0)), kDsaThreads, 0, current_stream(), images.const_data_ptr<float>(),
         reinterpret_cast<const DsaColour*>(colour.const_data_ptr<float>()),
         reinterpret_cast<const DsaTransform*>(transform.const_data_ptr<float>()), result.mutable_data_ptr<float>(),
         int(images.size(2)), int(images.size(3)));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) { m.impl("dsa", &lottery::dsa); }
