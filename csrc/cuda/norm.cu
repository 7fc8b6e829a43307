// Launchers of norm_relu_pool and its backward; conv_norm_relu_pool and conv3x3, whose convolutions are cuDNN's.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../kernels/norm.cuh"
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
    TORCH_CHECK(size < (int64_t(1) << 31) && count < (int64_t(1) << 31), "norm_relu_pool: too large, ", x.sizes());
    height = int(x.size(2));
    width = int(x.size(3));
    small = size <= 512;
  }
  unsigned blocks() const {
    return small ? unsigned((count + kNormThreads / 32 - 1) / (kNormThreads / 32)) : unsigned(count);
  }
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

// (dx, dkernel) of a convolution with stride 1, dx only when wanted
std::tuple<Tensor, Tensor> convolution_gradients(const Tensor& grad, const Tensor& x, const Tensor& kernel,
                                                 int64_t padding, bool input) {
  const auto gradients = at::convolution_backward(grad, x, kernel, at::OptionalIntArrayRef(), {1, 1},
                                                  {padding, padding}, {1, 1}, false, {0, 0}, 1, {input, true, false});
  return {std::get<0>(gradients), std::get<1>(gradients).contiguous()};
}

Three conv_norm_relu_pool(const Tensor& x, const Tensor& kernel, const Tensor& weight, const Tensor& bias,
                          int64_t padding, double eps) {
  check_conv_norm_relu_pool(x, kernel, weight, bias, padding);
  return norm_relu_pool(at::conv2d(x, kernel, {}, 1, padding), weight, bias, eps);
}

Three conv_norm_relu_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel, const Tensor& weight,
                                   const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t padding) {
  const Tensor convolved = at::conv2d(x, kernel, {}, 1, padding);  // again, instead of keeping it
  const auto [dconvolved, dweight, dbias] = norm_relu_pool_backward(grad, convolved, weight, bias, mean, rstd);
  return {std::get<1>(convolution_gradients(dconvolved, x, kernel, padding, false)), dweight, dbias};
}

Tensor conv3x3(const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  return at::conv2d(x, kernel, {}, 1, 1).contiguous();
}

std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  const auto [dx, dkernel] = convolution_gradients(grad, x, kernel, 1, true);
  return {dx.contiguous(), dkernel};
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) {
  m.impl("norm_relu_pool", &lottery::norm_relu_pool);
  m.impl("norm_relu_pool_backward", &lottery::norm_relu_pool_backward);
  m.impl("conv_norm_relu_pool", &lottery::conv_norm_relu_pool);
  m.impl("conv_norm_relu_pool_backward", &lottery::conv_norm_relu_pool_backward);
  m.impl("conv3x3", &lottery::conv3x3);
  m.impl("conv3x3_backward", &lottery::conv3x3_backward);
}
