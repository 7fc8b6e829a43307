// Launchers of norm_relu_pool and its backward.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../kernels/norm_relu_pool.cuh"
#include "launch.h"

namespace lottery {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Planes {
  int64_t count, channels;
  int height, width;
  bool small;  // a warp each, else a block

  explicit Planes(const Tensor& x) : count(x.size(0) * x.size(1)), channels(x.size(1)) {
    const int64_t size = x.size(2) * x.size(3);
    TORCH_CHECK(size <= kLargestPlane && count < (int64_t(1) << 31), "norm_relu_pool: too large, ", x.sizes());
    height = int(x.size(2));
    width = int(x.size(3));
    small = size <= 512;
  }
  unsigned blocks() const { return unsigned(small ? ceil_div<int64_t>(count, kNormThreads / 32) : count); }
};

Three norm_relu_pool(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps) {
  check_norm_relu_pool(x_, weight_, bias_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous();
  const Tensor pooled = at::empty({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x.options());
  const Tensor mean = at::empty({x.size(0), x.size(1)}, weight.options()), rstd = at::empty_like(mean);
  if (x.numel() == 0) return {pooled, mean, rstd};
  const Planes planes(x);
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool", [&] {
    using A = Accumulator<scalar_t>;
    const auto kernel =
        planes.small ? norm_relu_pool_kernel<scalar_t, A, 32> : norm_relu_pool_kernel<scalar_t, A, kNormThreads>;
    LAUNCH(kernel, planes.blocks(), kNormThreads, 0, current_stream(), x.const_data_ptr<scalar_t>(),
           weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), pooled.mutable_data_ptr<scalar_t>(),
           mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>(), (long long)planes.count, int(planes.channels),
           planes.height, planes.width, A(eps));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {pooled, mean, rstd};
}

Three norm_relu_pool_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                              const Tensor& mean_, const Tensor& rstd_) {
  check_norm_relu_pool_backward(grad_, x_, weight_, bias_, mean_, rstd_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous(),
               mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const Tensor dx = at::empty_like(x), dweight = at::empty_like(mean), dbias = at::empty_like(mean);
  if (x.numel() == 0) return {dx, dweight.sum(0), dbias.sum(0)};
  const Planes planes(x);
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool_backward", [&] {
    using A = Accumulator<scalar_t>;
    const auto kernel = planes.small ? norm_relu_pool_backward_kernel<scalar_t, A, 32>
                                     : norm_relu_pool_backward_kernel<scalar_t, A, kNormThreads>;
    LAUNCH(kernel, planes.blocks(), kNormThreads, 0, current_stream(), grad.const_data_ptr<scalar_t>(),
           x.const_data_ptr<scalar_t>(), weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), mean.const_data_ptr<A>(),
           rstd.const_data_ptr<A>(), dx.mutable_data_ptr<scalar_t>(), dweight.mutable_data_ptr<A>(),
           dbias.mutable_data_ptr<A>(), (long long)planes.count, int(planes.channels), planes.height, planes.width);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dweight.sum(0), dbias.sum(0)};
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) {
  m.impl("norm_relu_pool", &lottery::norm_relu_pool);
  m.impl("norm_relu_pool_backward", &lottery::norm_relu_pool_backward);
}
