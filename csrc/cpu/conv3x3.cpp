// conv3x3: 3x3 convolution, stride 1, padding 1, of channels-last activations, and its gradients, by Winograd's minimal
// filtering F(4x4, 3x3) (Lavin & Gray 2016): 36 multiplications give 4x4 outputs instead of 144. A tile of 6x6 inputs d
// and the kernel g become V = B' d B and U = G g G'; then, at each of the 36 points, M = V U over channels, a matrix
// product, and the outputs are A' M A. The kernel's gradient is the adjoint: dU = V' (A dy A'), dg = G' dU G.
#include <ATen/Parallel.h>

#include "norm_group.h"
#include "ops.h"

namespace lottery {
namespace {

constexpr int kPoints = 36;
constexpr int kTiles = 18;      // whose V stays in a core's second-level cache, forward
constexpr int kGradTiles = 48;  // that share a pass over dU, backward

using V = Vec<float, kVec>;

// The distance between the 36 points' matrices of so many floats: keeps them out of each other's cache sets.
constexpr int64_t spread(int64_t floats) { return floats + kGroup; }

// ---- one-dimensional transforms ----
INLINE void input_transform(const V* d, V* out) {  // B': 6 -> 6
  const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1], even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
  out[0] = 4 * d[0] - 5 * d[2] + d[4];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = 4 * d[1] - 5 * d[3] + d[5];
}

INLINE void output_transform(const V* m, V* out) {  // A': 6 -> 4
  const V sum = m[1] + m[2], difference = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum + sum2;
  out[1] = difference + 2 * difference2;
  out[2] = sum + 4 * sum2;
  out[3] = difference + 8 * difference2 + m[5];
}

INLINE void output_adjoint(const V* g, V* out) {  // A: 4 -> 6
  const V even = g[0] + g[2], odd = g[1] + g[3], even2 = g[0] + 4 * g[2], odd2 = 2 * g[1] + 8 * g[3];
  out[0] = g[0];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[3];
}

INLINE void kernel_transform(const V* g, V* out) {  // G: 3 -> 6
  const V even = (g[0] + g[2]) * (1 / 6.f), odd = g[1] * (1 / 6.f), even2 = g[0] * (1 / 24.f) + g[2] * (1 / 6.f),
            odd2 = g[1] * (1 / 12.f);
  out[0] = g[0] * .25f;
  out[1] = -even - odd;
  out[2] = odd - even;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = g[2];
}

INLINE void kernel_adjoint(const V* u, V* out) {  // G': 6 -> 3
  const V sum = u[1] + u[2], difference = u[2] - u[1], sum2 = u[3] + u[4], difference2 = u[3] - u[4];
  out[0] = .25f * u[0] - sum * (1 / 6.f) + sum2 * (1 / 24.f);
  out[1] = difference * (1 / 6.f) + difference2 * (1 / 12.f);
  out[2] = (sum2 - sum) * (1 / 6.f) + u[5];
}

// The transform of a square's columns, then of its rows: read(i, j) of kFrom x kFrom, write(i, j, value) of kTo x kTo.
template <auto transform, int kFrom, int kTo, class Read, class Write>
INLINE void both_ways(const Read& read, const Write& write) {
  V half[kTo][kFrom], from[kFrom], to[kTo];
  UNROLL for (int j = 0; j < kFrom; ++j) {
    UNROLL for (int i = 0; i < kFrom; ++i) from[i] = read(i, j);
    transform(from, to);
    UNROLL for (int i = 0; i < kTo; ++i) half[i][j] = to[i];
  }
  UNROLL for (int i = 0; i < kTo; ++i) {
    transform(half[i], to);
    UNROLL for (int j = 0; j < kTo; ++j) write(i, j, to[j]);
  }
}

// ---- tiles ----
struct Tiles {  // of activations [N, H, W, C]: tile i covers 4x4 outputs
  int64_t height, width, channels, down, across, count;

  Tiles(const Tensor& x)
      : height(x.size(2)), width(x.size(3)), channels(x.size(1)), down(ceil_div<int64_t>(height, 4)),
        across(ceil_div<int64_t>(width, 4)), count(x.size(0) * down * across) {}

  // at[i * size + j]: the channels of position (i, j) of tile t, which begins `border` before its outputs; `outside`
  // where that is not in the image.
  template <int size, class T>
  INLINE void find(T* x, int64_t t, int border, T* outside, T** at) const {
    const int64_t image = t / (down * across), rest = t % (down * across);
    const int64_t top = rest / across * 4 - border, left = rest % across * 4 - border;
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j) {
        const int64_t y = top + i, z = left + j;
        const bool inside = y >= 0 && y < height && z >= 0 && z < width;
        at[i * size + j] = inside ? x + ((image * height + y) * width + z) * channels : outside;
      }
  }
};

// V[point, t, c] of tiles first, first + 1, ...; points lie `pitch` apart. size 6: B' d B of the tile with its border;
// size 4: A dy A' of the tile itself.
template <int size>
INLINE void transform_tiles(const float* x, const Tiles& tiles, int64_t first, int count, const float* zeros, float* v,
                            int64_t pitch) {
  constexpr auto transform = size == 6 ? input_transform : output_adjoint;
  for (int t = 0; t < count; ++t) {
    const float* at[size * size];
    tiles.find<size>(x, first + t, (size - 4) / 2, zeros, at);
    for (int64_t c = 0; c < tiles.channels; c += kVec)
      both_ways<transform, size, 6>([&](int i, int j) INLINE_LAMBDA { return vec<kVec>(at[i * size + j] + c); },
                                    [&](int i, int j, V value) INLINE_LAMBDA {
                                      vec<kVec>(v + (6 * i + j) * pitch + t * tiles.channels + c) = value;
                                    });
  }
}

// ---- matrix products held in registers ----
// m[rows, 16] = v[rows, k] u[k, 16]
template <int rows>
INLINE void multiply(const float* v, int64_t k, const float* u, float* m) {
  V sum[rows][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const V low = vec<kVec>(u + i * kGroup), high = vec<kVec>(u + i * kGroup + kVec);
    UNROLL for (int r = 0; r < rows; ++r) sum[r][0] += v[r * k + i] * low, sum[r][1] += v[r * k + i] * high;
  }
  UNROLL for (int r = 0; r < rows; ++r) {
    vec<kVec>(m + r * kGroup) = sum[r][0];
    vec<kVec>(m + r * kGroup + kVec) = sum[r][1];
  }
}

// du[4 rows, 16] += v[t, 4 rows]' dm[t, 16]
INLINE void accumulate(const float* v, int64_t v_pitch, const float* dm, int64_t dm_pitch, int count, float* du,
                       int64_t du_pitch) {
  V sum[4][2];
  UNROLL for (int r = 0; r < 4; ++r) {
    sum[r][0] = vec<kVec>(du + r * du_pitch);
    sum[r][1] = vec<kVec>(du + r * du_pitch + kVec);
  }
  for (int t = 0; t < count; ++t) {
    const V low = vec<kVec>(dm + t * dm_pitch), high = vec<kVec>(dm + t * dm_pitch + kVec);
    UNROLL for (int r = 0; r < 4; ++r) sum[r][0] += v[t * v_pitch + r] * low, sum[r][1] += v[t * v_pitch + r] * high;
  }
  UNROLL for (int r = 0; r < 4; ++r) {
    vec<kVec>(du + r * du_pitch) = sum[r][0];
    vec<kVec>(du + r * du_pitch + kVec) = sum[r][1];
  }
}

struct Kernel {  // a [out, in, 3, 3] tensor and its strides
  const float* data;
  int64_t out, in, row, column;

  // The kernel of the gradient for the input: outputs and inputs change places, taps are mirrored.
  Kernel(const Tensor& k, bool transposed)
      : data(k.const_data_ptr<float>()), out(k.stride(0)), in(k.stride(1)), row(k.stride(2)), column(k.stride(3)) {
    if (!transposed) return;
    std::swap(out, in);
    data += 2 * (row + column);
    row = -row, column = -column;
  }
};

// u[point, in, 16] of the kernel's 16 outputs from `first` on
CLONES void transform_kernels(Kernel kernel, int64_t first, int64_t inputs, float* u) {
  const int64_t pitch = spread(inputs * kGroup);
  for (int64_t in = 0; in < inputs; ++in)
    for (int half = 0; half < kGroup; half += kVec) {
      const float* g = kernel.data + (first + half) * kernel.out + in * kernel.in;
      both_ways<kernel_transform, 3, 6>(
          [&](int i, int j) INLINE_LAMBDA {
            V v;
            for (int lane = 0; lane < kVec; ++lane) v[lane] = g[lane * kernel.out + i * kernel.row + j * kernel.column];
            return v;
          },
          [&](int i, int j, V v) INLINE_LAMBDA { vec<kVec>(u + (6 * i + j) * pitch + in * kGroup + half) = v; });
    }
  for (int p = 0; p < kPoints; ++p) std::fill_n(u + p * pitch + inputs * kGroup, kGroup, 0.f);  // between two points
}

struct Scratch {  // a thread's
  Tensor v, m, zeros, trash, planes;

  Scratch(const Tensor& x, int64_t outputs, int64_t positions = 0)
      : v(x.new_empty({kPoints * spread(kTiles * x.size(1))})), m(x.new_empty({kPoints * kTiles * kGroup})),
        zeros(x.new_zeros({x.size(1)})), trash(x.new_empty({outputs})), planes(x.new_empty({positions * kGroup})) {}
};

// The convolution at `count` tiles from `first` on, 16 output channels at a time: those from c on at position k of tile
// t go to to[16 * t + k] + c * step, then finish(c) is called. While it multiplies, it fetches what it writes and reads
// next.
template <class Finish>
INLINE void convolve_tiles(const float* x, const Tiles& tiles, const float* u, int64_t outputs, int64_t first,
                           int count, const Scratch& scratch, float* const* to, int64_t step, const Finish& finish) {
  float *v = scratch.v.mutable_data_ptr<float>(), *m = scratch.m.mutable_data_ptr<float>();
  const float* zeros = scratch.zeros.const_data_ptr<float>();
  const int64_t inputs = tiles.channels, pitch = spread(kTiles * inputs), u_pitch = spread(inputs * kGroup);
  transform_tiles<6>(x, tiles, first, count, zeros, v, pitch);
  const float* next[kTiles * 16];
  for (int t = 0; t < count; ++t)
    tiles.find<4>(x, std::min(first + count + t, tiles.count - 1), 0, zeros, next + 16 * t);
  for (int64_t c = 0; c < outputs; c += kGroup) {
    for (int p = 0; p < kPoints; ++p, u += u_pitch) {
      for (int i = p * count * 16 / kPoints; i < (p + 1) * count * 16 / kPoints; ++i) {
        __builtin_prefetch(to[i] + c * step, 1);
        if (c < inputs) __builtin_prefetch(next[i] + c);
      }
      const float* in = v + p * pitch;
      float* out = m + p * kTiles * kGroup;
      int t = 0;
      for (; t + 4 < count; t += 6) multiply<6>(in + t * inputs, inputs, u, out + t * kGroup);
      if (t < count) multiply<4>(in + t * inputs, inputs, u, out + t * kGroup);
    }
    for (int t = 0; t < count; ++t)
      for (int half = 0; half < kGroup; half += kVec)
        both_ways<output_transform, 6, 4>(
            [&](int i, int j) INLINE_LAMBDA { return vec<kVec>(m + ((6 * i + j) * kTiles + t) * kGroup + half); },
            [&](int i, int j, V v) INLINE_LAMBDA { vec<kVec>(to[16 * t + 4 * i + j] + c * step + half) = v; });
    finish(c);
  }
}

CLONES void convolve_block(const float* x, const Tiles& tiles, const float* u, int64_t first, int count,
                           const Scratch& scratch, float* y, const Tiles& results) {
  float* to[kTiles * 16];
  for (int t = 0; t < count; ++t)
    results.find<4>(y, first + t, 0, scratch.trash.mutable_data_ptr<float>(), to + 16 * t);
  convolve_tiles(x, tiles, u, results.channels, first, count, scratch, to, 1, [](int64_t) INLINE_LAMBDA {});
}

// Whole images: their 16 planes stay in the cache until they are normalised and pooled.
CLONES void convolve_norm_block(const float* x, const Tiles& tiles, const float* u, int64_t outputs,
                                int64_t first_image, int images, const Scratch& scratch, Affine<float> affine,
                                float eps, float* pooled) {
  const Plane plane{tiles.height, tiles.width};
  const int64_t size = plane.size(), pooled_size = plane.pooled_size();
  const int per_image = int(tiles.down * tiles.across), count = images * per_image;
  float *planes = scratch.planes.mutable_data_ptr<float>(), *to[kTiles * 16];
  Tiles results = tiles;
  results.channels = kGroup;
  for (int t = 0; t < count; ++t) results.find<4>(planes, t, 0, scratch.trash.mutable_data_ptr<float>(), to + 16 * t);
  convolve_tiles(x, tiles, u, outputs, first_image * per_image, count, scratch, to, 0, [&](int64_t c) INLINE_LAMBDA {
    for (int i = 0; i < images; ++i) {
      float mean[kGroup], rstd[kGroup];
      statistics(planes + i * size * kGroup, kGroup, plane, kGroup, eps, mean, rstd);
      normalise_and_pool(planes + i * size * kGroup, kGroup, plane, kGroup, mean, rstd,
                         Affine<float>{affine.weight + c, affine.bias + c},
                         pooled + (first_image + i) * pooled_size * outputs + c, outputs);
    }
  });
}

// The 9 taps of 8 outputs, `inputs` kernels apart, from du(point)
template <class Read>
INLINE void kernel_of_points(const Read& du, float* dkernel, int64_t inputs) {
  both_ways<kernel_adjoint, 6, 3>([&](int i, int j) INLINE_LAMBDA { return du(6 * i + j); },
                                  [&](int i, int j, V value) INLINE_LAMBDA {
                                    for (int lane = 0; lane < kVec; ++lane)
                                      dkernel[lane * inputs * 9 + 3 * i + j] = value[lane];
                                  });
}

// v[point, tile, in] and dm[point, tile, out] of `count` tiles from `first` on
CLONES void transform_block(const float* x, const float* grad, const Tiles& tiles, const Tiles& results, int64_t first,
                            int count, const float* zeros, float* v, int64_t pitch, float* dm, int64_t dm_pitch) {
  transform_tiles<6>(x, tiles, first, count, zeros, v, pitch);
  transform_tiles<4>(grad, results, first, count, zeros, dm, dm_pitch);
}

// du[point, in, out] += v' dm
CLONES void gradient_block(const float* v, int64_t pitch, int64_t inputs, const float* dm, int64_t dm_pitch,
                           int64_t outputs, int count, float* du) {
  for (int p = 0; p < kPoints; ++p)
    for (int64_t c = 0; c < outputs; c += kGroup)
      for (int64_t in = 0; in < inputs; in += 4)
        accumulate(v + p * pitch + in, inputs, dm + p * dm_pitch + c, outputs, count,
                   du + (p * inputs + in) * outputs + c, outputs);
}

// dkernel[out, in, 9] for 16 outputs from c on, from the v and dm of all tiles
CLONES void kernel_gradient_of_all(const float* v, int64_t pitch, int64_t inputs, const float* dm, int64_t dm_pitch,
                                   int64_t outputs, int count, int64_t c, float* dkernel) {
  for (int64_t in = 0; in < inputs; in += 4) {
    float du[kPoints][4 * kGroup] = {};
    for (int p = 0; p < kPoints; ++p)
      accumulate(v + p * pitch + in, inputs, dm + p * dm_pitch + c, outputs, count, du[p], kGroup);
    for (int i = 0; i < 4 * kGroup; i += kVec)
      kernel_of_points([&](int p) INLINE_LAMBDA { return vec<kVec>(du[p] + i); },
                       dkernel + ((c + i % kGroup) * inputs + in + i / kGroup) * 9, inputs);
  }
}

// dkernel[out, in, 9] from the sum of `parts` du[point, in, out], for one `in`
CLONES void kernel_gradient(const float* du, int64_t parts, int64_t inputs, int64_t outputs, int64_t in,
                            float* dkernel) {
  for (int64_t c = 0; c < outputs; c += kVec)
    kernel_of_points(
        [&](int p) INLINE_LAMBDA {
          V sum = {};
          for (int64_t part = 0; part < parts; ++part)
            sum += vec<kVec>(du + ((part * kPoints + p) * inputs + in) * outputs + c);
          return sum;
        },
        dkernel + (c * inputs + in) * 9, inputs);
}

// u [out / 16, point, spread(in x 16)]; `transposed` for the convolution's gradient for its input
Tensor transform(const Tensor& kernel, bool transposed) {
  const int64_t inputs = kernel.size(transposed ? 0 : 1), outputs = kernel.size(transposed ? 1 : 0);
  Tensor u = kernel.new_empty({outputs / kGroup, kPoints, spread(inputs * kGroup)});
  float* to = u.mutable_data_ptr<float>();
  at::parallel_for(0, outputs / kGroup, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      transform_kernels(Kernel(kernel, transposed), i * kGroup, inputs, to + i * u.stride(0));
  });
  return u;
}

// Cuts `count` into blocks of at most `most`, as many for each thread. A thread calls start(), and what that returns
// with the first and last + 1 of each of its blocks.
template <class F>
void for_each_block(int64_t count, int64_t most, const F& start) {
  const int64_t threads = at::get_num_threads(), blocks = ceil_div(count, most * threads) * threads;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const auto work = start();
    for (int64_t i = begin; i < end; ++i)
      if (i * count / blocks < (i + 1) * count / blocks) work(i * count / blocks, (i + 1) * count / blocks);
  });
}

Tensor convolve(const Tensor& x_, const Tensor& u) {
  const Tensor x = x_.contiguous(kChannelsLast);
  Tensor y = empty_channels_last(x, {x.size(0), u.size(0) * kGroup, x.size(2), x.size(3)});
  const Tiles tiles(x), results(y);
  const float *in = x.const_data_ptr<float>(), *kernel = u.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  for_each_block(tiles.count, kTiles, [&] {
    return [&, scratch = Scratch(x, y.size(1))](int64_t first, int64_t last) {
      convolve_block(in, tiles, kernel, first, int(last - first), scratch, out, results);
    };
  });
  return y;
}

Tensor kernel_gradient(const Tensor& grad, const Tensor& x_, const Tensor& kernel) {
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t inputs = x.size(1), outputs = kernel.size(0);
  const Tiles tiles(x), results(grad);
  const int64_t blocks = ceil_div<int64_t>(tiles.count, kGradTiles);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(blocks, at::get_num_threads()));
  Tensor dkernel = kernel.new_empty(kernel.sizes());
  const Tensor zeros = x.new_zeros({std::max(inputs, outputs)});
  const float *in = x.const_data_ptr<float>(), *g = grad.const_data_ptr<float>(), *z = zeros.const_data_ptr<float>();
  float* out = dkernel.mutable_data_ptr<float>();
  const auto in_block = [&](int64_t i) { return int(std::min<int64_t>(kGradTiles, tiles.count - i * kGradTiles)); };

  if (tiles.count * (inputs + outputs) < parts * inputs * outputs) {  // V and dM are less than dU
    const int64_t pitch = spread(tiles.count * inputs), dm_pitch = spread(tiles.count * outputs);
    Tensor v = x.new_empty({kPoints * pitch}), dm = x.new_empty({kPoints * dm_pitch});
    float *vp = v.mutable_data_ptr<float>(), *dmp = dm.mutable_data_ptr<float>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        transform_block(in, g, tiles, results, i * kGradTiles, in_block(i), z, vp + i * kGradTiles * inputs, pitch,
                        dmp + i * kGradTiles * outputs, dm_pitch);
    });
    at::parallel_for(0, outputs / kGroup, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernel_gradient_of_all(vp, pitch, inputs, dmp, dm_pitch, outputs, int(tiles.count), i * kGroup, out);
    });
    return dkernel;
  }

  const int64_t pitch = spread(kGradTiles * inputs), dm_pitch = spread(kGradTiles * outputs);
  Tensor du = x.new_zeros({parts, kPoints, inputs, outputs});
  float* sums = du.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Tensor v = x.new_empty({kPoints * pitch}), dm = x.new_empty({kPoints * dm_pitch});
    float *vp = v.mutable_data_ptr<float>(), *dmp = dm.mutable_data_ptr<float>();
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        transform_block(in, g, tiles, results, i * kGradTiles, in_block(i), z, vp, pitch, dmp, dm_pitch);
        gradient_block(vp, pitch, inputs, dmp, dm_pitch, outputs, in_block(i),
                       sums + part * kPoints * inputs * outputs);
      }
  });
  at::parallel_for(0, inputs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel_gradient(sums, parts, inputs, outputs, i, out);
  });
  return dkernel;
}

}  // namespace

Tensor conv3x3_kernel(const Tensor& kernel) {
  check_conv3x3_kernel(kernel);
  return transform(kernel, false);
}

Tensor conv3x3(const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  return convolve(x, kernel.dim() == 3 ? kernel.contiguous() : transform(kernel, false));
}

Tensor conv3x3_norm_relu_pool(const Tensor& x_, const Tensor& kernel, const Tensor& weight_, const Tensor& bias_,
                              double eps) {
  check_conv3x3_norm_relu_pool(x_, kernel, weight_, bias_);
  const Tensor x = x_.contiguous(kChannelsLast), u = kernel.contiguous(), weight = weight_.contiguous(),
               bias = bias_.contiguous();
  const Tiles tiles(x);
  const int64_t outputs = weight.size(0), most = kTiles / (tiles.down * tiles.across);
  TORCH_CHECK(most > 0, "conv3x3_norm_relu_pool: at most ", kTiles, " tiles of 4 x 4 wanted, got ", x.sizes());
  Tensor pooled = empty_channels_last(x, {x.size(0), outputs, x.size(2) / 2, x.size(3) / 2});
  const float *in = x.const_data_ptr<float>(), *k = u.const_data_ptr<float>();
  const Affine<float> affine{weight.const_data_ptr<float>(), bias.const_data_ptr<float>()};
  float* out = pooled.mutable_data_ptr<float>();
  for_each_block(x.size(0), most, [&] {
    return [&, scratch = Scratch(x, kGroup, most * x.size(2) * x.size(3))](int64_t first, int64_t last) {
      convolve_norm_block(in, tiles, k, outputs, first, int(last - first), scratch, affine, float(eps), out);
    };
  });
  return pooled;
}

std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad_, const Tensor& x, const Tensor& kernel) {
  check_conv3x3_backward(grad_, x, kernel);
  const Tensor grad = grad_.contiguous(kChannelsLast);
  return {convolve(grad, transform(kernel, true)), kernel_gradient(grad, x, kernel)};
}

}  // namespace lottery
