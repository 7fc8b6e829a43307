// batch_norm_relu: BatchNorm with the statistics of the batch, residual addition and ReLU, and the gradient, of
// channels-last activations. All sums over a batch are taken chunk by chunk and put together in double, so that they do
// not depend on the number of threads.
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "ops.h"
#include "vector.h"

namespace lottery {
namespace {

constexpr int64_t kChunk = 4096;  // elements, so that a chunk stays in the first-level cache when it is read twice

struct PerChannel {
  const float *mean, *scale, *shift;  // (x - mean) * rstd * weight + bias = x * scale + shift
};

// mean[c] and square[c], the sum of squared deviations from it, of x[rows, channels]
CLONES void moments(const float* x, int64_t rows, int64_t channels, float* __restrict mean, float* __restrict square) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = square[c] = 0;
  for (int64_t i = 0; i < rows * channels; i += channels)
    for (int64_t c = 0; c < channels; ++c) mean[c] += x[i + c];
  for (int64_t c = 0; c < channels; ++c) mean[c] /= float(rows);
  for (int64_t i = 0; i < rows * channels; i += channels)
    for (int64_t c = 0; c < channels; ++c) square[c] += (x[i + c] - mean[c]) * (x[i + c] - mean[c]);
}

CLONES void forward(const float* x, const float* residual, int64_t rows, int64_t channels, PerChannel p, bool relu,
                    float* __restrict y) {
  for (int64_t i = 0; i < rows * channels; i += channels)
    for (int64_t c = 0; c < channels; ++c) {
      const float a = x[i + c] * p.scale[c] + p.shift[c] + (residual ? residual[i + c] : 0.f);
      y[i + c] = relu && a < 0.f ? 0.f : a;
    }
}

// The sums over rows of g and of g * (x - mean), g = grad where the ReLU let pass. With a residual, y tells where that
// was and g is stored: it is the residual's gradient.
CLONES void backward_sums(const float* grad, const float* x, const float* y, int64_t rows, int64_t channels,
                          PerChannel p, bool relu, float* __restrict g, float* __restrict sum,
                          float* __restrict centred) {
  for (int64_t c = 0; c < channels; ++c) sum[c] = centred[c] = 0;
  for (int64_t i = 0; i < rows * channels; i += channels)
    for (int64_t c = 0; c < channels; ++c) {
      const float a = y ? y[i + c] : x[i + c] * p.scale[c] + p.shift[c];
      const float passed = relu && a <= 0.f ? 0.f : grad[i + c];
      if (g) g[i + c] = passed;
      sum[c] += passed;
      centred[c] += passed * (x[i + c] - p.mean[c]);
    }
}

// dx = scale * g - slope * (x - mean) - offset; `grad` is already g if `passed`
CLONES void backward(const float* grad, const float* x, int64_t rows, int64_t channels, PerChannel p, bool relu,
                     bool passed, const float* slope, const float* offset, float* __restrict dx) {
  for (int64_t i = 0; i < rows * channels; i += channels)
    for (int64_t c = 0; c < channels; ++c) {
      const float a = x[i + c] * p.scale[c] + p.shift[c];
      const float g = relu && !passed && a <= 0.f ? 0.f : grad[i + c];
      dx[i + c] = p.scale[c] * g - slope[c] * (x[i + c] - p.mean[c]) - offset[c];
    }
}

struct Chunks {
  int64_t rows, channels, step;

  explicit Chunks(const Tensor& x)
      : rows(x.size(0) * x.size(2) * x.size(3)), channels(x.size(1)),
        step(std::max<int64_t>(1, kChunk / std::max<int64_t>(1, channels))) {}

  int64_t count() const { return ceil_div(rows, step); }
  int64_t size(int64_t i) const { return std::min(step, rows - i * step); }

  // Calls work(chunk, its first element, its rows) for all chunks.
  template <class Work>
  void each(const Work& work) const {
    at::parallel_for(0, count(), 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i, i * step * channels, size(i));
    });
  }
};

// scale and shift of every channel
std::vector<float> folded(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias,
                          double eps) {
  const int64_t channels = mean.numel();
  std::vector<float> both(2 * channels);
  const float *m = mean.const_data_ptr<float>(), *v = variance.const_data_ptr<float>(),
              *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    both[c] = w[c] / std::sqrt(v[c] + float(eps));
    both[channels + c] = b[c] - m[c] * both[c];
  }
  return both;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                   const OptionalTensor& residual_, bool relu, double eps) {
  check_batch_norm_relu(x_, weight_, bias_, residual_);
  const Tensor x = x_.contiguous(kChannelsLast), weight = weight_.contiguous(), bias = bias_.contiguous(),
               residual = residual_ ? residual_->contiguous(kChannelsLast) : Tensor();
  const Chunks chunks(x);
  const int64_t channels = chunks.channels;
  Tensor y = empty_channels_last(x, x.sizes());
  Tensor mean = weight.new_empty({channels}), variance = weight.new_empty({channels});
  const float *in = x.const_data_ptr<float>(), *added = residual_ ? residual.const_data_ptr<float>() : nullptr;
  float *out = y.mutable_data_ptr<float>();
  float *m = mean.mutable_data_ptr<float>(), *v = variance.mutable_data_ptr<float>();
  std::vector<float> parts(2 * channels * chunks.count());
  chunks.each([&](int64_t i, int64_t at, int64_t rows) {
    moments(in + at, rows, channels, &parts[2 * i * channels], &parts[(2 * i + 1) * channels]);
  });
  for (int64_t c = 0; c < channels; ++c) {  // Chan et al. 1979
    double centre = 0, square = 0;
    for (int64_t i = 0; i < chunks.count(); ++i) centre += chunks.size(i) * double(parts[2 * i * channels + c]);
    centre /= chunks.rows;
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const double d = parts[2 * i * channels + c] - centre;
      square += parts[(2 * i + 1) * channels + c] + chunks.size(i) * d * d;
    }
    m[c] = float(centre);
    v[c] = float(square / chunks.rows);
  }
  const std::vector<float> fold = folded(mean, variance, weight, bias, eps);
  chunks.each([&](int64_t, int64_t at, int64_t rows) {
    forward(in + at, added ? added + at : nullptr, rows, channels, {m, &fold[0], &fold[channels]}, relu, out + at);
  });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad_, const Tensor& x_,
                                                                    const OptionalTensor& y_, const Tensor& weight_,
                                                                    const Tensor& bias_, const Tensor& mean_,
                                                                    const Tensor& variance_, bool relu, double eps) {
  check_batch_norm_relu_backward(grad_, x_, y_, weight_, bias_, mean_, variance_);
  const Tensor grad = grad_.contiguous(kChannelsLast), x = x_.contiguous(kChannelsLast),
               weight = weight_.contiguous(), bias = bias_.contiguous(), mean = mean_.contiguous(),
               variance = variance_.contiguous(), y = y_ ? y_->contiguous(kChannelsLast) : Tensor();
  const Chunks chunks(x);
  const int64_t channels = chunks.channels;
  Tensor dx = empty_channels_last(x, x.sizes()), dresidual = y_ ? empty_channels_last(x, x.sizes()) : x.new_empty({0});
  Tensor dweight = weight.new_empty({channels}), dbias = weight.new_empty({channels});
  const float *up = grad.const_data_ptr<float>(), *in = x.const_data_ptr<float>(), *m = mean.const_data_ptr<float>(),
              *out = y_ ? y.const_data_ptr<float>() : nullptr;
  float *to = dx.mutable_data_ptr<float>(), *g = y_ ? dresidual.mutable_data_ptr<float>() : nullptr,
        *dw = dweight.mutable_data_ptr<float>(), *db = dbias.mutable_data_ptr<float>();
  const std::vector<float> fold = folded(mean, variance, weight, bias, eps);
  const PerChannel p{m, &fold[0], &fold[channels]};
  std::vector<float> parts(2 * channels * chunks.count()), slope(channels), offset(channels);
  chunks.each([&](int64_t i, int64_t at, int64_t rows) {
    backward_sums(up + at, in + at, out ? out + at : nullptr, rows, channels, p, relu, g ? g + at : nullptr,
                  &parts[2 * i * channels], &parts[(2 * i + 1) * channels]);
  });
  const float* v = variance.const_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, centred = 0;
    for (int64_t i = 0; i < chunks.count(); ++i)
      sum += parts[2 * i * channels + c], centred += parts[(2 * i + 1) * channels + c];
    const double rstd = 1 / std::sqrt(v[c] + eps);
    db[c] = float(sum);
    dw[c] = float(centred * rstd);
    offset[c] = float(p.scale[c] * sum / chunks.rows);
    slope[c] = float(p.scale[c] * centred * rstd * rstd / chunks.rows);
  }
  chunks.each([&](int64_t, int64_t at, int64_t rows) {
    backward((g ? g : up) + at, in + at, rows, channels, p, relu, g != nullptr, slope.data(), offset.data(), to + at);
  });
  return {dx, dweight, dbias, dresidual};
}

}  // namespace lottery
