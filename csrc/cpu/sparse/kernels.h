// Sparse training on the CPU: what its passes (shapes, threads, PyTorch) ask of the vector code (kernels.inc).
//
// Activations are stored as [B, C, H, W, L]: L images side by side in one vector ("lanes"), B = ceil(batch / L) blocks.
// A weight then meets whole vectors at fixed offsets, and work is proportional to the number of surviving weights.
// All strides and offsets below count floats.
#pragma once
#include <cstdint>
#include <utility>

namespace lottery::sparse {

// One channel after the other, each a grid of vectors.
template <typename T>
struct Grid {
  T* data;        // channel 0, position (0, 0)
  int64_t plane;  // to the next channel
  int64_t row;    // to the next row
  int64_t step;   // to the next column
};

struct Weight {
  int32_t offset;  // from the position in the source to the vector that the weight multiplies
  float value;
};

// Surviving weights in the order in which a gather meets them. The source channels are cut into blocks that fit the
// first-level cache; list (block * rows + r) holds those of block `block` that contribute to output channel r.
struct Walk {
  const int32_t* begin;  // [blocks * rows + 1], into weights
  const Weight* weights;
  int64_t blocks, rows;
  int64_t sources;  // planes of the source
  int64_t ahead;    // from a position in the source to the row below those that a gather at it reads
};

// Weights whose gradients are dot products, in lists that share one channel of the output's gradient. A list has a
// multiple of four slots, for four are summed at a time. This is the part [first, last) of the lists, which has one
// owner.
struct Dots {
  const int32_t* begin;    // slots of list k: [begin[k], begin[k + 1])
  const int32_t* grad;     // of each list, offset in the gradient
  const int32_t* source;   // of each slot, offset in the source
  int64_t first, last;     // lists
  int64_t sources, plane;  // planes of the source that they meet, and floats from one to the next
  int64_t ahead;           // from a position in the source to the first of them, at the row below a tile of two rows
};

// The pointwise work behind a convolution, for one channel of L images: a = scale * z + shift (+ residual), ReLU,
// average pooling. Vectors of L floats; z is a plane of height x width vectors without gaps.
struct Pointwise {
  int64_t height, width;
  int64_t pool;  // 1 or 2
  bool relu;
  const float *scale, *shift;
};

struct Kernels {
  const char* instruction_set;
  int64_t lanes;

  // dst[r, y, x] = bias[r] + sum over list r of value * src[offset + y * stride rows + x * stride columns],
  // first <= r < last.
  void (*gather)(Grid<const float> src, int64_t stride, Grid<float> dst, int64_t height, int64_t width, Walk walk,
                 const float* bias, int64_t first, int64_t last);

  // dst[c, y, x] = the lanes' images[lane][y, x, c], channels innermost; their number is a multiple of the lanes.
  void (*interleave)(const float* const* images, int64_t channels, Grid<float> dst, int64_t height, int64_t width);

  // The way back: images[lane][y, x, c] = src[c, y, x].
  void (*separate)(Grid<const float> src, float* const* images, int64_t channels, int64_t height, int64_t width);

  // sum[k] += dot products over all positions and lanes of source k (walked with `stride`) and its list's gradient, for
  // `count` parts.
  void (*weight_grad)(Grid<const float> src, int64_t stride, Grid<const float> grad, int64_t height, int64_t width,
                      const Dots* parts, int64_t count, float* sum);

  // mean and sum of squared deviations of n vectors, per lane.
  void (*moments)(const float* z, int64_t n, float* mean, float* deviation);

  // y = pool(relu(scale * z + shift + residual)); residual.data may be null.
  void (*forward)(const float* z, Pointwise p, Grid<const float> residual, Grid<float> y);

  // g = gradient of a; sum[0] += g, sum[1] += g * (z - mean). With y (a residual was added) the ReLU is read from it
  // and g is stored; without, it is recomputed from z.
  void (*backward_sums)(const float* z, Pointwise p, const float* mean, Grid<const float> dy, Grid<const float> y,
                        Grid<float> g, float* sum0, float* sum1);

  // dz = scale * g - slope * (z - mean) - offset, g stored (g.data) or recomputed.
  void (*backward)(const float* z, Pointwise p, const float* mean, const float* slope, const float* offset,
                   Grid<const float> dy, Grid<const float> g, Grid<float> dz);
};

extern const Kernels portable, avx2, avx512;

// Those of the best instruction set that this processor has, or of LOTTERY_SPARSE_ISA (for the tests).
const Kernels& choose_kernels();

inline const Kernels& kernels() {  // inlined: the passes ask for every row
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

inline int64_t lanes() { return kernels().lanes; }

}  // namespace lottery::sparse
