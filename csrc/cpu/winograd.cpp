// conv3x3: 3x3 convolution, stride 1, padding 1, of channels-last activations, and its gradients, by Winograd's minimal
// filtering F(4x4, 3x3) (Lavin & Gray 2016): 36 multiplications give 4x4 outputs instead of 144. A tile of 6x6 inputs d
// and the kernel g become V = B' d B and U = G g G'; then, at each of the 36 points, M = V U over channels, a matrix
// product, and the outputs are A' M A. The kernel's gradient is the adjoint: dU = V' (A dy A'), dg = G' dU G.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "clones.h"

namespace lottery {
namespace {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;
constexpr int kPoints = 36, kGroup = 16;
constexpr int kTiles = 18;      // whose V stays in a core's second-level cache, forward
constexpr int kGradTiles = 48;  // that share a pass over dU, backward

typedef float Vec __attribute__((vector_size(32), aligned(4)));
constexpr int kVec = 8;

// ---- one-dimensional transforms of elements a, a + stride, ... ----
template <class V>
INLINE void input_transform(const V* d, int stride, V* out, int out_stride) {  // B': 6 -> 6
  const V d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
  const V even = d4 - 4 * d2, odd = d3 - 4 * d1, even2 = d4 - d2, odd2 = 2 * (d3 - d1);
  out[0] = 4 * d0 - 5 * d2 + d4;
  out[out_stride] = even + odd;
  out[2 * out_stride] = even - odd;
  out[3 * out_stride] = even2 + odd2;
  out[4 * out_stride] = even2 - odd2;
  out[5 * out_stride] = 4 * d1 - 5 * d3 + d5;
}

template <class V>
INLINE void output_transform(const V* m, int stride, V* out, int out_stride) {  // A': 6 -> 4
  const V sum = m[stride] + m[2 * stride], difference = m[stride] - m[2 * stride];
  const V sum2 = m[3 * stride] + m[4 * stride], difference2 = m[3 * stride] - m[4 * stride];
  out[0] = m[0] + sum + sum2;
  out[out_stride] = difference + 2 * difference2;
  out[2 * out_stride] = sum + 4 * sum2;
  out[3 * out_stride] = difference + 8 * difference2 + m[5 * stride];
}

template <class V>
INLINE void output_adjoint(const V* g, int stride, V* out, int out_stride) {  // A: 4 -> 6
  const V g0 = g[0], g1 = g[stride], g2 = g[2 * stride], g3 = g[3 * stride];
  const V even = g0 + g2, odd = g1 + g3, even2 = g0 + 4 * g2, odd2 = 2 * g1 + 8 * g3;
  out[0] = g0;
  out[out_stride] = even + odd;
  out[2 * out_stride] = even - odd;
  out[3 * out_stride] = even2 + odd2;
  out[4 * out_stride] = even2 - odd2;
  out[5 * out_stride] = g3;
}

template <class V>
INLINE void kernel_transform(const V* g, int stride, V* out, int out_stride) {  // G: 3 -> 6
  const V g0 = g[0], g1 = g[stride], g2 = g[2 * stride];
  const V even = (g0 + g2) * (1 / 6.f), odd = g1 * (1 / 6.f), even2 = g0 * (1 / 24.f) + g2 * (1 / 6.f),
          odd2 = g1 * (1 / 12.f);
  out[0] = g0 * .25f;
  out[out_stride] = -even - odd;
  out[2 * out_stride] = odd - even;
  out[3 * out_stride] = even2 + odd2;
  out[4 * out_stride] = even2 - odd2;
  out[5 * out_stride] = g2;
}

template <class V>
INLINE void kernel_adjoint(const V* u, int stride, V* out, int out_stride) {  // G': 6 -> 3
  const V sum = u[stride] + u[2 * stride], difference = u[2 * stride] - u[stride];
  const V sum2 = u[3 * stride] + u[4 * stride], difference2 = u[3 * stride] - u[4 * stride];
  out[0] = .25f * u[0] - sum * (1 / 6.f) + sum2 * (1 / 24.f);
  out[out_stride] = difference * (1 / 6.f) + difference2 * (1 / 12.f);
  out[2 * out_stride] = (sum2 - sum) * (1 / 6.f) + u[5 * stride];
}

// ---- tiles ----
struct Tiles {  // of activations [N, H, W, C]: tile i covers 4x4 outputs
  int64_t height, width, across, count;

  Tiles(const Tensor& x)
      : height(x.size(2)), width(x.size(3)), across((width + 3) / 4), count(x.size(0) * ((height + 3) / 4) * across) {}

  // The first row, counted through all images, and the first row and column in the image.
  INLINE void place(int64_t i, int64_t& image_row, int64_t& y, int64_t& x) const {
    const int64_t down = (height + 3) / 4, image = i / (down * across), rest = i % (down * across);
    y = rest / across * 4;
    x = rest % across * 4;
    image_row = image * height;
  }
};

// V[point, t, c] of tiles first, first + 1, ...; points lie `pitch` apart. kSize 6: B' d B of the tile with its border;
// kSize 4: A dy A' of the tile itself.
template <int kSize>
INLINE void transform_tiles(const float* x, const Tiles& tiles, int64_t channels, int64_t first, int count, float* v,
                            int64_t pitch) {
  constexpr int border = (kSize - 4) / 2;
  for (int t = 0; t < count; ++t) {
    int64_t image_row, top, left;
    tiles.place(first + t, image_row, top, left);
    for (int64_t c = 0; c < channels; c += kVec) {
      Vec d[kSize * kSize], rows[6 * kSize], out[kPoints];
      for (int i = 0; i < kSize; ++i)
        for (int j = 0; j < kSize; ++j) {
          const int64_t y = top + i - border, z = left + j - border;
          const bool inside = y >= 0 && y < tiles.height && z >= 0 && z < tiles.width;
          d[i * kSize + j] = inside ? *(const Vec*)(x + ((image_row + y) * tiles.width + z) * channels + c) : Vec{};
        }
      for (int j = 0; j < kSize; ++j)
        kSize == 6 ? input_transform(d + j, kSize, rows + j, kSize) : output_adjoint(d + j, kSize, rows + j, kSize);
      for (int i = 0; i < 6; ++i)
        kSize == 6 ? input_transform(rows + i * kSize, 1, out + 6 * i, 1)
                   : output_adjoint(rows + i * kSize, 1, out + 6 * i, 1);
      for (int p = 0; p < kPoints; ++p) *(Vec*)(v + p * pitch + t * channels + c) = out[p];
    }
  }
}

// y's 16 channels from c on, of tiles first, ..., from M[point, t, 16]
INLINE void store_tiles(const float* m, const Tiles& tiles, int64_t channels, int64_t c, int64_t first, int count,
                        float* y) {
  for (int t = 0; t < count; ++t) {
    int64_t image_row, top, left;
    tiles.place(first + t, image_row, top, left);
    for (int half = 0; half < kGroup; half += kVec) {
      Vec in[kPoints], rows[4 * 6], out[16];
      for (int p = 0; p < kPoints; ++p) in[p] = *(const Vec*)(m + (p * kTiles + t) * kGroup + half);
      for (int j = 0; j < 6; ++j) output_transform(in + j, 6, rows + j, 6);
      for (int i = 0; i < 4; ++i) output_transform(rows + 6 * i, 1, out + 4 * i, 1);
      for (int i = 0; i < 4 && top + i < tiles.height; ++i)
        for (int j = 0; j < 4 && left + j < tiles.width; ++j)
          *(Vec*)(y + ((image_row + top + i) * tiles.width + left + j) * channels + c + half) = out[4 * i + j];
    }
  }
}

// ---- matrix products held in registers ----
// m[6 rows, 16] = v[6 rows, k] u[k, 16]
INLINE void multiply(const float* v, int64_t k, const float* u, float* m) {
  Vec sum[6][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const Vec low = *(const Vec*)(u + i * kGroup), high = *(const Vec*)(u + i * kGroup + kVec);
    for (int r = 0; r < 6; ++r) sum[r][0] += v[r * k + i] * low, sum[r][1] += v[r * k + i] * high;
  }
  for (int r = 0; r < 6; ++r) *(Vec*)(m + r * kGroup) = sum[r][0], *(Vec*)(m + r * kGroup + kVec) = sum[r][1];
}

// du[4 rows, 16] += v[t, 4 rows]' dm[t, 16]
INLINE void accumulate(const float* v, int64_t v_pitch, const float* dm, int64_t dm_pitch, int count, float* du,
                       int64_t du_pitch) {
  Vec sum[4][2];
  for (int r = 0; r < 4; ++r) sum[r][0] = *(Vec*)(du + r * du_pitch), sum[r][1] = *(Vec*)(du + r * du_pitch + kVec);
  for (int t = 0; t < count; ++t) {
    const Vec low = *(const Vec*)(dm + t * dm_pitch), high = *(const Vec*)(dm + t * dm_pitch + kVec);
    for (int r = 0; r < 4; ++r) sum[r][0] += v[t * v_pitch + r] * low, sum[r][1] += v[t * v_pitch + r] * high;
  }
  for (int r = 0; r < 4; ++r) *(Vec*)(du + r * du_pitch) = sum[r][0], *(Vec*)(du + r * du_pitch + kVec) = sum[r][1];
}

// u[point, in, 16] of the kernel's 16 outputs; its element (out, in, tap) lies at out * out_stride + in * in_stride +
// tap
CLONES void transform_kernels(const float* kernel, int64_t out_stride, int64_t in_stride, bool flipped, int64_t inputs,
                              float* u) {
  for (int64_t in = 0; in < inputs; ++in)
    for (int half = 0; half < kGroup; half += kVec) {
      Vec g[9], rows[6 * 3], out[kPoints];
      for (int tap = 0; tap < 9; ++tap)
        for (int lane = 0; lane < kVec; ++lane)
          g[tap][lane] = kernel[(half + lane) * out_stride + in * in_stride + (flipped ? 8 - tap : tap)];
      for (int j = 0; j < 3; ++j) kernel_transform(g + j, 3, rows + j, 3);
      for (int i = 0; i < 6; ++i) kernel_transform(rows + 3 * i, 1, out + 6 * i, 1);
      for (int p = 0; p < kPoints; ++p) *(Vec*)(u + (p * inputs + in) * kGroup + half) = out[p];
    }
}

CLONES void convolve_block(const float* x, const Tiles& tiles, int64_t inputs, int64_t outputs, const float* u,
                           int64_t first, int count, float* v, float* m, float* y) {
  const int64_t pitch = kTiles * inputs + kGroup;  // keeps the 36 points out of each other's cache sets
  transform_tiles<6>(x, tiles, inputs, first, count, v, pitch);
  for (int64_t c = 0; c < outputs; c += kGroup) {
    for (int p = 0; p < kPoints; ++p)
      for (int t = 0; t < kTiles; t += 6)
        multiply(v + p * pitch + t * inputs, inputs, u + (c * kPoints + p * kGroup) * inputs,
                 m + (p * kTiles + t) * kGroup);
    store_tiles(m, tiles, outputs, c, first, count, y);
  }
}

CLONES void gradient_block(const float* x, const float* grad, const Tiles& tiles, int64_t inputs, int64_t outputs,
                           int64_t first, int count, float* v, float* dm, float* du) {
  const int64_t pitch = kGradTiles * inputs + kGroup, dm_pitch = kGradTiles * outputs + kGroup;
  transform_tiles<6>(x, tiles, inputs, first, count, v, pitch);
  transform_tiles<4>(grad, tiles, outputs, first, count, dm, dm_pitch);
  for (int p = 0; p < kPoints; ++p)
    for (int64_t c = 0; c < outputs; c += kGroup)
      for (int64_t in = 0; in < inputs; in += 4)
        accumulate(v + p * pitch + in, inputs, dm + p * dm_pitch + c, outputs, count,
                   du + (p * inputs + in) * outputs + c, outputs);
}

// dkernel[out, in, 9] from the sum of `parts` du[point, in, out], for one `in`
CLONES void kernel_gradient(const float* du, int64_t parts, int64_t inputs, int64_t outputs, int64_t in,
                            float* dkernel) {
  for (int64_t c = 0; c < outputs; c += kVec) {
    Vec u[kPoints] = {}, rows[3 * 6], out[9];
    for (int64_t part = 0; part < parts; ++part)
      for (int p = 0; p < kPoints; ++p) u[p] += *(const Vec*)(du + ((part * kPoints + p) * inputs + in) * outputs + c);
    for (int j = 0; j < 6; ++j) kernel_adjoint(u + j, 6, rows + j, 6);
    for (int i = 0; i < 3; ++i) kernel_adjoint(rows + 6 * i, 1, out + 3 * i, 1);
    for (int lane = 0; lane < kVec; ++lane)
      for (int tap = 0; tap < 9; ++tap) dkernel[((c + lane) * inputs + in) * 9 + tap] = out[tap][lane];
  }
}

// ---- ops ----
// `transposed`: the convolution's gradient for its input instead
Tensor convolve(const Tensor& x_, const Tensor& kernel_, bool transposed) {
  const Tensor x = x_.contiguous(kChannelsLast), kernel = kernel_.contiguous();
  const int64_t inputs = x.size(1), outputs = kernel.size(transposed ? 1 : 0);
  const int64_t out_stride = transposed ? 9 : inputs * 9, in_stride = transposed ? outputs * 9 : 9;
  Tensor y = at::empty({x.size(0), outputs, x.size(2), x.size(3)}, x.options(), kChannelsLast);
  Tensor transformed = at::empty({outputs, kPoints, inputs}, x.options());
  const float *in = x.const_data_ptr<float>(), *k = kernel.const_data_ptr<float>();
  float *out = y.mutable_data_ptr<float>(), *u = transformed.mutable_data_ptr<float>();
  at::parallel_for(0, outputs / kGroup, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kGroup; c < end * kGroup; c += kGroup)
      transform_kernels(k + c * out_stride, out_stride, in_stride, transposed, inputs, u + c * kPoints * inputs);
  });
  const Tiles tiles(x);
  at::parallel_for(0, (tiles.count + kTiles - 1) / kTiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> v(kPoints * (kTiles * inputs + kGroup)), m(kPoints * kTiles * kGroup);
    for (int64_t i = begin * kTiles; i < std::min(end * kTiles, tiles.count); i += kTiles)
      convolve_block(in, tiles, inputs, outputs, u, i, int(std::min<int64_t>(kTiles, tiles.count - i)), v.data(),
                     m.data(), out);
  });
  return y;
}

Tensor kernel_gradient(const Tensor& grad, const Tensor& x_, const Tensor& kernel) {
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t inputs = x.size(1), outputs = kernel.size(0);
  const Tiles tiles(x);
  const int64_t blocks = (tiles.count + kGradTiles - 1) / kGradTiles;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(blocks, at::get_num_threads()));
  Tensor du = at::zeros({parts, kPoints, inputs, outputs}, x.options()),
         dkernel = at::empty(kernel.sizes(), kernel.options());
  const float *in = x.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
  float *sums = du.mutable_data_ptr<float>(), *out = dkernel.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> v(kPoints * (kGradTiles * inputs + kGroup)), dm(kPoints * (kGradTiles * outputs + kGroup));
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * blocks / parts * kGradTiles;
           i < std::min((part + 1) * blocks / parts * kGradTiles, tiles.count); i += kGradTiles)
        gradient_block(in, g, tiles, inputs, outputs, i, int(std::min<int64_t>(kGradTiles, tiles.count - i)), v.data(),
                       dm.data(), sums + part * kPoints * inputs * outputs);
  });
  at::parallel_for(0, inputs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel_gradient(sums, parts, inputs, outputs, i, out);
  });
  return dkernel;
}

Tensor conv3x3(const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  return convolve(x, kernel, false);
}

std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad_, const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  const Tensor grad = grad_.contiguous(kChannelsLast);
  return {convolve(grad, kernel, true), kernel_gradient(grad, x, kernel)};
}

}  // namespace
}  // namespace lottery

TORCH_LIBRARY_IMPL(lottery, CPU, m) {
  m.impl("conv3x3", &lottery::conv3x3);
  m.impl("conv3x3_backward", &lottery::conv3x3_backward);
}
