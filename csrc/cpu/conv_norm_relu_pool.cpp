// conv_norm_relu_pool and, at many points of weight space, conv_norm_relu_pool_points: a stride-1 convolution of few
// input channels (an image's), instance norm, ReLU and 2x2 average pooling. The convolution's output, the largest
// activation of a network, never leaves the cache: a thread computes one image's group of 16 channels, normalises and
// pools it; the backward pass computes it again instead of storing it.
#include <ATen/Parallel.h>

#include <vector>

#include "norm_group.h"
#include "ops.h"

namespace lottery {
namespace {

constexpr int kRun = 4;   // neighbouring positions whose sums are held in registers
constexpr int kTaps = 6;  // taps whose weight gradients are held in registers

// The image with its padding, and where in it each tap of the kernel looks.
template <class A>
struct Padded {
  std::vector<A> pixels;      // [I, H + 2 padding, W + 2 padding]
  std::vector<int64_t> taps;  // [I * h * w]
  int64_t planes, height, width, padding;

  Padded(int64_t planes, int64_t height, int64_t width, int64_t h, int64_t w, int64_t padding)
      : planes(planes), height(height + 2 * padding), width(width + 2 * padding), padding(padding) {
    pixels.resize(planes * this->height * this->width);
    for (int64_t i = 0; i < planes; ++i)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) taps.push_back((i * this->height + y) * this->width + x);
  }

  void load(const A* image) {
    const int64_t inner = width - 2 * padding;
    for (int64_t i = 0; i < planes; ++i)
      for (int64_t y = padding; y < height - padding; ++y, image += inner)
        std::copy(image, image + inner, &pixels[(i * height + y) * width + padding]);
  }
};

// out[y, x, :] = sum over taps of image[y, x + tap] * kernel[tap, :], 16 channels. A row's last run may overlap the one
// before.
template <class A, int run>
INLINE void convolve(const Padded<A>& image, const A* kernel, Plane plane, A* out) {
  using V = Vec<A, kVec>;
  const int64_t taps = image.taps.size();
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t start = 0; start < plane.width; start += run) {
      const int64_t x = std::min(start, plane.width - run);
      const A* pixel = &image.pixels[y * image.width + x];
      V sum[run][2] = {};
      for (int64_t t = 0; t < taps; ++t) {
        const V low = vec<kVec>(kernel + t * kGroup), high = vec<kVec>(kernel + t * kGroup + kVec);
        const A* p = pixel + image.taps[t];
        for (int i = 0; i < run; ++i) sum[i][0] += p[i] * low, sum[i][1] += p[i] * high;
      }
      A* to = out + (y * plane.width + x) * kGroup;
      for (int i = 0; i < run; ++i, to += kGroup) vec<kVec>(to) = sum[i][0], vec<kVec>(to + kVec) = sum[i][1];
    }
}

// dkernel[tap, :] += sum over positions of image[y, x + tap] * grad[y, x, :], for `count` taps from `first`
template <class A, int count>
INLINE void correlate(const Padded<A>& image, const A* grad, Plane plane, int64_t first, A* dkernel) {
  using V = Vec<A, kVec>;
  V sum[count][2] = {};
  const A* tap[count];
  for (int t = 0; t < count; ++t) tap[t] = &image.pixels[image.taps[first + t]];
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t x = 0; x < plane.width; ++x) {
      const A* g = grad + (y * plane.width + x) * kGroup;
      const V low = vec<kVec>(g), high = vec<kVec>(g + kVec);
      for (int t = 0; t < count; ++t) {
        const A pixel = tap[t][y * image.width + x];
        sum[t][0] += pixel * low, sum[t][1] += pixel * high;
      }
    }
  A* to = dkernel + first * kGroup;
  for (int t = 0; t < count; ++t, to += kGroup) vec<kVec>(to) += sum[t][0], vec<kVec>(to + kVec) += sum[t][1];
}

template <class A>
INLINE void convolve_any(const Padded<A>& image, const A* kernel, Plane plane, A* out) {
  plane.width < kRun ? convolve<A, 1>(image, kernel, plane, out) : convolve<A, kRun>(image, kernel, plane, out);
}

template <class A>
CLONES void forward(const Padded<A>& image, const A* kernel, Plane plane, int64_t channels, int n, Affine<A> affine,
                    A eps, A* scratch, A* pooled, A* mean, A* rstd) {
  convolve_any(image, kernel, plane, scratch);
  A group_mean[kGroup], group_rstd[kGroup];
  statistics(scratch, kGroup, plane, kGroup, eps, group_mean, group_rstd);
  std::copy_n(group_mean, n, mean);
  std::copy_n(group_rstd, n, rstd);
  n == kGroup ? normalise_and_pool(scratch, kGroup, plane, kGroup, mean, rstd, affine, pooled, channels)
              : normalise_and_pool(scratch, kGroup, plane, n, mean, rstd, affine, pooled, channels);
}

template <class A>
CLONES void backward(const Padded<A>& image, const A* kernel, Plane plane, int64_t channels, int n, Affine<A> affine,
                     const A* mean, const A* rstd, const A* grad, A* scratch, A* dkernel, A* dweight, A* dbias) {
  convolve_any(image, kernel, plane, scratch);
  A share[2][kGroup];
  n == kGroup ? pool_and_norm_backward(grad, channels, scratch, scratch, kGroup, plane, kGroup, mean, rstd, affine,
                                       share[0], share[1])
              : pool_and_norm_backward(grad, channels, scratch, scratch, kGroup, plane, n, mean, rstd, affine, share[0],
                                       share[1]);
  for (int c = 0; c < n; ++c) dweight[c] += share[0][c], dbias[c] += share[1][c];
  const int64_t taps = image.taps.size();
  int64_t t = 0;
  for (; t + kTaps <= taps; t += kTaps) correlate<A, kTaps>(image, scratch, plane, t, dkernel);
  for (; t < taps; ++t) correlate<A, 1>(image, scratch, plane, t, dkernel);
}

// The above for one image at every point sum over m of coefficients[point, m] * kernel[m]. The convolution is linear in
// its kernel and so is done for M kernels, whatever the number of points; a point's mean and variance follow from the
// means and covariances of the M planes. folded: [points, M + 1, 16] scratch, what multiplies each plane and is added.
template <int M>
CLONES void forward_points(const Padded<float>& image, const float* const* kernels, Plane plane, int64_t channels,
                           const float* coefficients, int64_t points, Affine<float> affine, float eps, float* scratch,
                           float* folded, float* pooled, int64_t pooled_step) {
  using V = Vec<float, kVec>;
  const int64_t size = plane.size(), half_width = plane.width / 2;
  float mean[M][kGroup], covariance[M][M][kGroup];
  for (int m = 0; m < M; ++m) {
    const float* z = scratch + m * size * kGroup;
    convolve_any(image, kernels[m], plane, scratch + m * size * kGroup);
    sum_over(size, kGroup, mean[m], [&](int64_t p, int c) INLINE_LAMBDA { return z[p * kGroup + c]; });
    for (int c = 0; c < kGroup; ++c) mean[m][c] /= float(size);
    for (int n = 0; n <= m; ++n) {
      const float* other = scratch + n * size * kGroup;
      sum_over(size, kGroup, covariance[m][n], [&](int64_t p, int c) INLINE_LAMBDA {
        return (z[p * kGroup + c] - mean[m][c]) * (other[p * kGroup + c] - mean[n][c]);
      });
      for (int c = 0; c < kGroup; ++c) covariance[n][m][c] = covariance[m][n][c] /= float(size);
    }
  }
  for (int64_t k = 0; k < points; ++k)
    for (int c = 0; c < kGroup; ++c) {
      const float* a = coefficients + k * M;
      float centre = 0, variance = 0;
      for (int m = 0; m < M; ++m) {
        centre += a[m] * mean[m][c];
        for (int n = 0; n < M; ++n) variance += a[m] * a[n] * covariance[m][n][c];
      }
      const float scale = affine.weight[k * channels + c] / std::sqrt(std::max(variance, 0.f) + eps);
      float* to = folded + k * (M + 1) * kGroup + c;
      for (int m = 0; m < M; ++m) to[m * kGroup] = .25f * scale * a[m];
      to[M * kGroup] = .25f * (affine.bias[k * channels + c] - scale * centre);
    }
  for (int64_t i = 0; i < plane.height / 2; ++i)
    for (int64_t k = 0; k < points; ++k) {
      V factor[M + 1][2];
      for (int m = 0; m <= M; ++m)
        for (int h = 0; h < 2; ++h) factor[m][h] = vec<kVec>(folded + (k * (M + 1) + m) * kGroup + h * kVec);
      float* to = pooled + k * pooled_step + i * half_width * channels;
      for (int64_t j = 0; j < half_width; ++j, to += channels) {
        V sum[2] = {};
        for (int64_t p : {2 * i * plane.width + 2 * j, 2 * i * plane.width + 2 * j + 1,
                          (2 * i + 1) * plane.width + 2 * j, (2 * i + 1) * plane.width + 2 * j + 1})
          for (int h = 0; h < 2; ++h) {
            V a = factor[M][h];
            for (int m = 0; m < M; ++m) a += factor[m][h] * vec<kVec>(scratch + (m * size + p) * kGroup + h * kVec);
            sum[h] += a < 0.f ? V{} : a;  // keeps NaN, as torch does
          }
        vec<kVec>(to) = sum[0], vec<kVec>(to + kVec) = sum[1];
      }
    }
}

// kernel [C, I, h, w] as [groups of 16 channels, taps, 16], the last group filled up with zeros
Tensor grouped(const Tensor& kernel) {
  const int64_t channels = kernel.size(0), taps = kernel.numel() / channels,
                groups = ceil_div<int64_t>(channels, kGroup);
  Tensor padded = kernel.new_zeros({groups * kGroup, taps});
  padded.slice(0, 0, channels).copy_(kernel.reshape({channels, taps}));
  return padded.view({groups, kGroup, taps}).transpose(1, 2).contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool(const Tensor& x_, const Tensor& kernel_, const Tensor& weight_,
                                                       const Tensor& bias_, int64_t padding, double eps) {
  const auto [height, width] = check_conv_norm_relu_pool(x_, kernel_, weight_, bias_, padding);
  const Tensor x = x_.contiguous(), kernel = grouped(kernel_), weight = weight_.contiguous(), bias = bias_.contiguous();
  const int64_t images = x.size(0), channels = weight.size(0), taps = kernel.size(1),
                image_size = x.numel() / std::max<int64_t>(images, 1);
  const Plane plane{height, width};
  Tensor pooled = empty_channels_last(x, {images, channels, height / 2, width / 2});
  Tensor mean = x.new_empty({images, channels}), rstd = mean.new_empty(mean.sizes());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_norm_relu_pool", [&] {
    using A = scalar_t;
    const A *in = x.const_data_ptr<A>(), *k = kernel.const_data_ptr<A>();
    const A *w = weight.const_data_ptr<A>(), *b = bias.const_data_ptr<A>();
    A *out = pooled.mutable_data_ptr<A>(), *m = mean.mutable_data_ptr<A>(), *r = rstd.mutable_data_ptr<A>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      Padded<A> image(x.size(1), x.size(2), x.size(3), kernel_.size(2), kernel_.size(3), padding);
      std::vector<A> scratch(plane.size() * kGroup);
      for (int64_t i = begin; i < end; ++i) {
        image.load(in + i * image_size);
        for (int64_t c = 0; c < channels; c += kGroup)
          forward<A>(image, k + c * taps, plane, channels, int(std::min<int64_t>(kGroup, channels - c)), {w + c, b + c},
                     A(eps), scratch.data(), out + i * plane.pooled_size() * channels + c, m + i * channels + c,
                     r + i * channels + c);
      }
    });
  });
  return {pooled, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool_backward(const Tensor& grad_, const Tensor& x_,
                                                                const Tensor& kernel_, const Tensor& weight_,
                                                                const Tensor& bias_, const Tensor& mean_,
                                                                const Tensor& rstd_, int64_t padding) {
  const auto [height, width] =
      check_conv_norm_relu_pool_backward(grad_, x_, kernel_, weight_, bias_, mean_, rstd_, padding);
  const Tensor grad = grad_.contiguous(kChannelsLast), x = x_.contiguous(), kernel = grouped(kernel_),
               weight = weight_.contiguous(), bias = bias_.contiguous(), mean = mean_.contiguous(),
               rstd = rstd_.contiguous();
  const int64_t images = x.size(0), channels = weight.size(0), taps = kernel.size(1),
                image_size = x.numel() / std::max<int64_t>(images, 1);
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(images, at::get_num_threads()));  // each sums its own images
  const Plane plane{height, width};
  Tensor dkernel = x.new_zeros({parts, kernel.size(0), taps, kGroup});
  Tensor dweight = x.new_zeros({parts, channels}), dbias = dweight.new_zeros(dweight.sizes());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_norm_relu_pool_backward", [&] {
    using A = scalar_t;
    const A *in = x.const_data_ptr<A>(), *k = kernel.const_data_ptr<A>(), *g = grad.const_data_ptr<A>();
    const A *w = weight.const_data_ptr<A>(), *b = bias.const_data_ptr<A>();
    const A *m = mean.const_data_ptr<A>(), *r = rstd.const_data_ptr<A>();
    A *dk = dkernel.mutable_data_ptr<A>(), *dw = dweight.mutable_data_ptr<A>(), *db = dbias.mutable_data_ptr<A>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Padded<A> image(x.size(1), x.size(2), x.size(3), kernel_.size(2), kernel_.size(3), padding);
      std::vector<A> scratch(plane.size() * kGroup);
      for (int64_t part = begin; part < end; ++part)
        for (int64_t i = part * images / parts; i < (part + 1) * images / parts; ++i) {
          image.load(in + i * image_size);
          for (int64_t c = 0; c < channels; c += kGroup)
            backward<A>(image, k + c * taps, plane, channels, int(std::min<int64_t>(kGroup, channels - c)),
                        {w + c, b + c}, m + i * channels + c, r + i * channels + c,
                        g + i * plane.pooled_size() * channels + c, scratch.data(),
                        dk + (part * kernel.size(0) * kGroup + c) * taps, dw + part * channels + c,
                        db + part * channels + c);
        }
    });
  });
  const Tensor flat = dkernel.sum(0).transpose(1, 2).reshape({-1, taps}).slice(0, 0, channels);
  return {flat.reshape(kernel_.sizes()).contiguous(), dweight.sum(0), dbias.sum(0)};
}

Tensor conv_norm_relu_pool_points(const Tensor& x_, const Tensor& kernels_, const Tensor& coefficients_,
                                  const Tensor& weight_, const Tensor& bias_, int64_t padding, double eps) {
  const auto [height, width] =
      check_conv_norm_relu_pool_points(x_, kernels_, coefficients_, weight_, bias_, padding);
  const Tensor x = x_.contiguous(), coefficients = coefficients_.contiguous(), weight = weight_.contiguous(),
               bias = bias_.contiguous();
  std::vector<Tensor> kernels;
  for (const Tensor& kernel : kernels_.unbind()) kernels.push_back(grouped(kernel));
  const int64_t images = x.size(0), points = weight.size(0), channels = weight.size(1), M = kernels.size(),
                taps = kernels[0].size(1), image_size = x.numel() / std::max<int64_t>(images, 1);
  const Plane plane{height, width};
  const int64_t pooled_size = plane.pooled_size() * channels;
  Tensor pooled = x.new_empty({points, images, height / 2, width / 2, channels});
  const float *in = x.const_data_ptr<float>(), *a = coefficients.const_data_ptr<float>();
  const Affine<float> affine{weight.const_data_ptr<float>(), bias.const_data_ptr<float>()};
  float* out = pooled.mutable_data_ptr<float>();
  const auto forward = M == 2 ? forward_points<2> : forward_points<3>;
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    Padded<float> image(x.size(1), x.size(2), x.size(3), kernels_.size(3), kernels_.size(4), padding);
    std::vector<float> scratch(M * plane.size() * kGroup), folded(points * (M + 1) * kGroup);
    for (int64_t i = begin; i < end; ++i) {
      image.load(in + i * image_size);
      for (int64_t c = 0; c < channels; c += kGroup) {
        const float* group[3];
        for (int64_t m = 0; m < M; ++m) group[m] = kernels[m].const_data_ptr<float>() + c * taps;
        forward(image, group, plane, channels, a, points, {affine.weight + c, affine.bias + c}, float(eps),
                scratch.data(), folded.data(), out + i * pooled_size + c, images * pooled_size);
      }
    }
  });
  return pooled.movedim(4, 2);
}

}  // namespace lottery
