// norm_relu_pool: instance norm, ReLU and 2x2 average pooling in one pass over channels-last activations, and its
// gradient. Each image's group of channels is read from memory once; the later looks at it come from cache.
#include <ATen/Parallel.h>

#include "norm_group.h"
#include "ops.h"

namespace lottery {
namespace {

template <class T, class A>
INLINE void forward(const T* x, T* pooled, int64_t channels, Plane plane, int n, Affine<A> affine, A eps, A* mean,
                    A* rstd) {
  statistics(x, channels, plane, n, eps, mean, rstd);
  normalise_and_pool(x, channels, plane, n, mean, rstd, affine, pooled, channels);
}

template <class T, class A>
INLINE void backward(const T* grad, const T* x, T* dx, int64_t channels, Plane plane, int n, Affine<A> affine,
                     const A* mean, const A* rstd, A* dweight, A* dbias) {
  pool_and_norm_backward(grad, channels, x, dx, channels, plane, n, mean, rstd, affine, dweight, dbias);
}

// Of a whole group. The last one, where it is not whole, is not worth the time to compile the clones.
template <class T, class A>
CLONES void forward(const T* x, T* pooled, int64_t channels, Plane plane, Affine<A> affine, A eps, A* mean, A* rstd) {
  forward(x, pooled, channels, plane, kGroup, affine, eps, mean, rstd);
}

template <class T, class A>
CLONES void backward(const T* grad, const T* x, T* dx, int64_t channels, Plane plane, Affine<A> affine, const A* mean,
                     const A* rstd, A* dweight, A* dbias) {
  backward(grad, x, dx, channels, plane, kGroup, affine, mean, rstd, dweight, dbias);
}

// Calls f(image, first channel, number of channels) for every group of channels of every image.
template <class F>
void for_each_group(int64_t images, int64_t channels, const F& f) {
  const int64_t groups = ceil_div<int64_t>(channels, kGroup);
  at::parallel_for(0, images * groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % groups * kGroup;
      f(i / groups, c, int(std::min<int64_t>(kGroup, channels - c)));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                  double eps) {
  check_norm_relu_pool(x_, weight_, bias_);
  const Tensor x = x_.contiguous(kChannelsLast), weight = weight_.contiguous(), bias = bias_.contiguous();
  const int64_t images = x.size(0), channels = x.size(1);
  const Plane plane{x.size(2), x.size(3)};
  const int64_t size = plane.size(), pooled_size = plane.pooled_size();
  Tensor pooled = empty_channels_last(x, {images, channels, plane.height / 2, plane.width / 2});
  Tensor mean = weight.new_empty({images, channels}), rstd = mean.new_empty(mean.sizes());
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool", [&] {
    using A = Accumulator<scalar_t>;
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* out = pooled.mutable_data_ptr<scalar_t>();
    const A *w = weight.const_data_ptr<A>(), *b = bias.const_data_ptr<A>();
    A *m = mean.mutable_data_ptr<A>(), *r = rstd.mutable_data_ptr<A>();
    for_each_group(images, channels, [&](int64_t i, int64_t c, int n) {
      const int64_t from = i * size * channels + c, to = i * pooled_size * channels + c, row = i * channels + c;
      const Affine<A> affine{w + c, b + c};
      n == kGroup ? forward(in + from, out + to, channels, plane, affine, A(eps), m + row, r + row)
                  : forward(in + from, out + to, channels, plane, n, affine, A(eps), m + row, r + row);
    });
  });
  return {pooled, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                           const Tensor& bias_, const Tensor& mean_,
                                                           const Tensor& rstd_) {
  check_norm_relu_pool_backward(grad_, x_, weight_, bias_, mean_, rstd_);
  const Tensor grad = grad_.contiguous(kChannelsLast), x = x_.contiguous(kChannelsLast), weight = weight_.contiguous(),
               bias = bias_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t images = x.size(0), channels = x.size(1);
  const Plane plane{x.size(2), x.size(3)};
  const int64_t size = plane.size(), pooled_size = plane.pooled_size();
  Tensor dx = empty_channels_last(x, x.sizes());
  Tensor dweight = mean.new_empty(mean.sizes()), dbias = mean.new_empty(mean.sizes());  // [N, C]: an image's share
  DISPATCH_FLOATING(x.scalar_type(), "norm_relu_pool_backward", [&] {
    using A = Accumulator<scalar_t>;
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *in = x.const_data_ptr<scalar_t>();
    scalar_t* out = dx.mutable_data_ptr<scalar_t>();
    const A *w = weight.const_data_ptr<A>(), *b = bias.const_data_ptr<A>();
    const A *m = mean.const_data_ptr<A>(), *r = rstd.const_data_ptr<A>();
    A *dw = dweight.mutable_data_ptr<A>(), *db = dbias.mutable_data_ptr<A>();
    for_each_group(images, channels, [&](int64_t i, int64_t c, int n) {
      const int64_t at = i * size * channels + c, from = i * pooled_size * channels + c, row = i * channels + c;
      const Affine<A> affine{w + c, b + c};
      n == kGroup
          ? backward(g + from, in + at, out + at, channels, plane, affine, m + row, r + row, dw + row, db + row)
          : backward(g + from, in + at, out + at, channels, plane, n, affine, m + row, r + row, dw + row, db + row);
    });
  });
  return {dx, dweight.sum(0), dbias.sum(0)};
}

}  // namespace lottery
