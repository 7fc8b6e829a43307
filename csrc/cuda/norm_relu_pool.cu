// Launchers of norm_relu_pool, its backward and norm_relu_pool_points; contiguous images plane by plane, channels_last
// ones by groups of channels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../kernels/norm_relu_pool.cuh"
#include "../kernels/norm_relu_pool_last.cuh"
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

bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast); }

// Blocks of a channels_last x, at N channels a thread.
unsigned last_blocks(const Tensor& x, int64_t N) {
  const int64_t blocks = x.size(0) * ceil_div<int64_t>(x.size(1), kLastLanes * N);
  TORCH_CHECK(x.size(1) * x.size(2) * x.size(3) <= kLargestPlane && blocks <= kBlocksX, "norm_relu_pool: too large, ",
              x.sizes());
  return unsigned(blocks);
}

// Of channels_last x, with pooled [groups, N, H / 2, W / 2, C / groups]
void launch_last(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& pooled, const Tensor& mean,
                 const Tensor& rstd, int64_t groups, double eps) {
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool", [&] {
    using A = Accumulator<scalar_t>;
    constexpr int N = kPack<scalar_t>;
    const scalar_t* none = nullptr;
    const bool packs = takes_packs<N>(int(x.size(1)), int(groups), x.const_data_ptr<scalar_t>(),
                                      static_cast<const scalar_t*>(pooled.const_data_ptr<scalar_t>()), none);
    const auto kernel = packs ? norm_relu_pool_last_kernel<scalar_t, A, N> : norm_relu_pool_last_kernel<scalar_t, A, 1>;
    LAUNCH(kernel, last_blocks(x, packs ? N : 1), kLastThreads, 0, current_stream(), x.const_data_ptr<scalar_t>(),
           weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), pooled.mutable_data_ptr<scalar_t>(),
           mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>(), (long long)x.size(0), int(x.size(1)), int(groups),
           int(x.size(2)), int(x.size(3)), A(eps));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_last_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const Tensor& mean, const Tensor& rstd, const Tensor& dx, const Tensor& shares) {
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool_backward", [&] {
    using A = Accumulator<scalar_t>;
    constexpr int N = kPack<scalar_t>;
    const bool packs = takes_packs<N>(int(x.size(1)), 1, x.const_data_ptr<scalar_t>(), grad.const_data_ptr<scalar_t>(),
                                      dx.const_data_ptr<scalar_t>());
    const auto kernel = packs ? norm_relu_pool_last_backward_kernel<scalar_t, A, N>
                              : norm_relu_pool_last_backward_kernel<scalar_t, A, 1>;
    LAUNCH(kernel, last_blocks(x, packs ? N : 1), kLastThreads, 0, current_stream(), grad.const_data_ptr<scalar_t>(),
           x.const_data_ptr<scalar_t>(), weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), mean.const_data_ptr<A>(),
           rstd.const_data_ptr<A>(), dx.mutable_data_ptr<scalar_t>(), shares[0].mutable_data_ptr<A>(),
           shares[1].mutable_data_ptr<A>(), int(x.size(1)), int(x.size(2)), int(x.size(3)));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Three norm_relu_pool(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps) {
  check_norm_relu_pool(x_, weight_, bias_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const auto format = is_channels_last(x_) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor x = x_.contiguous(format), weight = weight_.contiguous(), bias = bias_.contiguous();
  const Tensor pooled =
      at::empty({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x.options().memory_format(format));
  const Tensor mean = at::empty({x.size(0), x.size(1)}, weight.options()), rstd = at::empty_like(mean);
  if (x.numel() == 0) return {pooled, mean, rstd};
  if (is_channels_last(x)) {
    launch_last(x, weight, bias, pooled, mean, rstd, 1, eps);
    return {pooled, mean, rstd};
  }
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
  const auto format = is_channels_last(x_) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor grad = grad_.contiguous(format), x = x_.contiguous(format), weight = weight_.contiguous(),
               bias = bias_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const Tensor dx = at::empty_like(x), shares = at::empty({2, x.size(0), x.size(1)}, weight.options());
  const auto results = [&]() -> Three {
    const Tensor sums = shares.sum(1);  // of weight and bias at once
    return {dx, sums[0], sums[1]};
  };
  if (x.numel() == 0) return results();
  if (is_channels_last(x)) {
    launch_last_backward(grad, x, weight, bias, mean, rstd, dx, shares);
    return results();
  }
  const Planes planes(x);
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool_backward", [&] {
    using A = Accumulator<scalar_t>;
    const auto kernel = planes.small ? norm_relu_pool_backward_kernel<scalar_t, A, 32>
                                     : norm_relu_pool_backward_kernel<scalar_t, A, kNormThreads>;
    LAUNCH(kernel, planes.blocks(), kNormThreads, 0, current_stream(), grad.const_data_ptr<scalar_t>(),
           x.const_data_ptr<scalar_t>(), weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), mean.const_data_ptr<A>(),
           rstd.const_data_ptr<A>(), dx.mutable_data_ptr<scalar_t>(), shares[0].mutable_data_ptr<A>(),
           shares[1].mutable_data_ptr<A>(), (long long)planes.count, int(planes.channels), planes.height, planes.width);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return results();
}

Tensor norm_relu_pool_points(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps) {
  check_norm_relu_pool_points(x_, weight_, bias_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), weight = weight_.contiguous();
  const Tensor bias = bias_.contiguous();
  const int64_t points = weight.size(0), channels = weight.size(1);
  const Tensor pooled = at::empty({points, x.size(0), x.size(2) / 2, x.size(3) / 2, channels}, x.options());
  const Tensor mean = at::empty({x.size(0), x.size(1)}, weight.options()), rstd = at::empty_like(mean);
  if (x.numel()) launch_last(x, weight, bias, pooled, mean, rstd, points, eps);
  return pooled.permute({0, 1, 4, 2, 3});
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CUDA, m) {
  m.impl("norm_relu_pool", &lottery::norm_relu_pool);
  m.impl("norm_relu_pool_backward", &lottery::norm_relu_pool_backward);
  m.impl("norm_relu_pool_points", &lottery::norm_relu_pool_points);
}
