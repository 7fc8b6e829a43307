// The vector code of sparse training, included once per instruction set inside a namespace, with LANES defined.
// GCC and clang vector types: the same source becomes SSE, NEON, AVX2 or AVX-512, and products and sums are contracted
// to fused multiply-adds. See sparse.h for what each kernel computes.

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 16")

static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline vec positive(vec a) { return a < 0.f ? vec{} : a; }  // keeps NaN, as torch does

// ---- convolution: eight positions in registers, one broadcast and eight multiply-adds for each weight ----

// Fetches n vectors into the cache.
static inline void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n * LANES; i += 16) __builtin_prefetch(p + i);
}

// While it multiplies, it fetches what the tile below reads and writes.
template <int TY, int TX, int S>
static void gather_tile(const float* src, int64_t src_plane, int64_t src_row, float* dst, const Grid<float>& grid,
                        const int32_t* begin, const Walk& walk, const float* bias, int64_t first, int64_t last,
                        bool fresh) {
  int64_t due = 0;
  const float* below = src + walk.ahead;
  for (int64_t r = first; r < last; r++) {
    float* out = dst + r * grid.plane;
    if (TX == 8 && fresh) {
      fetch(out + grid.row, grid.step / LANES * TX);
      for (due += walk.sources; due >= last - first; due -= last - first, below += src_plane)
        UNROLL for (int i = 0; i < S; i++) fetch(below + i * src_row, TX * S + 2);
    }
    vec sum[TY][TX];
    UNROLL for (int i = 0; i < TY; i++)
      UNROLL for (int j = 0; j < TX; j++)
        sum[i][j] = fresh ? vec{} + (bias ? bias[r] : 0.f) : load(out + i * grid.row + j * grid.step);
    const Weight* end = walk.weights + begin[r + 1];
    for (const Weight* weight = walk.weights + begin[r]; weight < end; weight++) {
      const float* p = src + weight->offset;
      const float w = weight->value;
      UNROLL for (int i = 0; i < TY; i++)
        UNROLL for (int j = 0; j < TX; j++) sum[i][j] += w * load(p + i * S * src_row + j * S * LANES);
    }
    UNROLL for (int i = 0; i < TY; i++)
      UNROLL for (int j = 0; j < TX; j++) store(out + i * grid.row + j * grid.step, sum[i][j]);
  }
}

// ---- change of layout: squares of LANES images and LANES channels, transposed ----

// Swaps the lanes of a that have bit S in their number with those of b that have not.
template <int S, int... lane>
static inline void swap_lanes(vec& a, vec& b, std::integer_sequence<int, lane...>) {
  const vec low = __builtin_shufflevector(a, b, (lane & S ? LANES + lane - S : lane)...);
  b = __builtin_shufflevector(a, b, (lane & S ? LANES + lane : lane + S)...);
  a = low;
}

template <int S>
static inline void transpose(vec* rows) {
  UNROLL for (int i = 0; i < LANES; i++)
    if (!(i & S)) swap_lanes<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
  if constexpr (S > 1) transpose<S / 2>(rows);
}

template <typename Visit>
static inline void for_each_square(int64_t channels, int64_t height, int64_t width, Visit visit) {
  for (int64_t c = 0; c < channels; c += LANES)
    for (int64_t y = 0; y < height; y++)
      for (int64_t x = 0; x < width; x++) visit(c, y, x, (y * width + x) * channels + c);
}

static void interleave(const float* const* images, int64_t channels, Grid<float> dst, int64_t height, int64_t width) {
  for_each_square(channels, height, width, [&](int64_t c, int64_t y, int64_t x, int64_t at) {
    vec square[LANES];
    UNROLL for (int l = 0; l < LANES; l++) square[l] = load(images[l] + at);
    transpose<LANES / 2>(square);
    float* to = dst.data + c * dst.plane + y * dst.row + x * dst.step;
    UNROLL for (int l = 0; l < LANES; l++) store(to + l * dst.plane, square[l]);
  });
}

static void separate(Grid<const float> src, float* const* images, int64_t channels, int64_t height, int64_t width) {
  for_each_square(channels, height, width, [&](int64_t c, int64_t y, int64_t x, int64_t at) {
    vec square[LANES];
    const float* from = src.data + c * src.plane + y * src.row + x * src.step;
    UNROLL for (int l = 0; l < LANES; l++) square[l] = load(from + l * src.plane);
    transpose<LANES / 2>(square);
    UNROLL for (int l = 0; l < LANES; l++) store(images[l] + at, square[l]);
  });
}

// ---- weight gradient: four dot products at a time, their lanes added up together ----

static inline vec4 fold(vec a) {
#if LANES == 16
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7) +
         (__builtin_shufflevector(a, a, 8, 9, 10, 11) + __builtin_shufflevector(a, a, 12, 13, 14, 15));
#elif LANES == 8
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  return a;
#endif
}

static inline vec4 sums_of(const vec* s) {
  vec4 a = fold(s[0]), b = fold(s[1]), c = fold(s[2]), d = fold(s[3]);
  vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <int TY, int TX, int S>
static void weight_grad_tile(const float* src, int64_t src_row, const float* grad, int64_t grad_row, const Quads& quads,
                             float* sum) {
  for (int64_t k = quads.shared; k < quads.any; k += 4) {
    const float* a = src + quads.source[k];
    const float* g[4] = {grad + quads.grad[k], grad + quads.grad[k + 1], grad + quads.grad[k + 2],
                         grad + quads.grad[k + 3]};
    vec even[4] = {}, odd[4] = {};
    UNROLL for (int i = 0; i < TY; i++)
      UNROLL for (int j = 0; j < TX; j++) {
        vec x = load(a + i * S * src_row + j * S * LANES);
        UNROLL for (int q = 0; q < 4; q++)
          (j % 2 ? odd : even)[q] += x * load(g[q] + i * grad_row + j * LANES);
      }
    UNROLL for (int q = 0; q < 4; q++) even[q] += odd[q];
    *(vec4*)(sum + k) += sums_of(even);
  }
  for (int64_t k = quads.any; k < quads.end; k += 4) {
    const float* a[4] = {src + quads.source[k], src + quads.source[k + 1], src + quads.source[k + 2],
                         src + quads.source[k + 3]};
    const float* g[4] = {grad + quads.grad[k], grad + quads.grad[k + 1], grad + quads.grad[k + 2],
                         grad + quads.grad[k + 3]};
    vec s[4] = {};
    UNROLL for (int i = 0; i < TY; i++)
      UNROLL for (int j = 0; j < TX; j++)
        UNROLL for (int q = 0; q < 4; q++)
          s[q] += load(a[q] + i * S * src_row + j * S * LANES) * load(g[q] + i * grad_row + j * LANES);
    *(vec4*)(sum + k) += sums_of(s);
  }
}

// Cuts height x width into tiles of `positions` (8 or 16) vectors, as wide as fit, and smaller ones in the last rows
// and columns; calls tile(rows, columns, y, x) with compile-time sizes.
template <int N>
struct Size {
  static constexpr int value = N;
};

template <int positions, typename Tile>
static inline void for_each_tile(int64_t height, int64_t width, Tile tile) {
  int64_t x = 0;
  auto column = [&](auto rows, auto columns) {
    int64_t y = 0;
    for (; y + rows.value <= height; y += rows.value) tile(rows, columns, y, x);
    for (; y < height; y++) tile(Size<1>(), columns, y, x);
  };
  for (; x + positions <= width; x += positions) column(Size<1>(), Size<positions>());
  for (; x + 8 <= width; x += 8) column(Size<positions / 8>(), Size<8>());
  for (; x < width; x += 4) {
    constexpr Size<positions / 4> rows;
    switch (width - x) {
      case 1: column(rows, Size<1>()); break;
      case 2: column(rows, Size<2>()); break;
      case 3: column(rows, Size<3>()); break;
      default: column(rows, Size<4>());
    }
  }
}

template <int S>
static void gather_stride(const Grid<const float>& src, const Grid<float>& dst, int64_t height, int64_t width,
                          const Walk& walk, const float* bias, int64_t first, int64_t last) {
  for_each_tile<8>(height, width, [&](auto ty, auto tx, int64_t y, int64_t x) {
    for (int64_t block = 0; block < walk.blocks; block++)
      gather_tile<decltype(ty)::value, decltype(tx)::value, S>(
          src.data + y * S * src.row + x * S * LANES, src.plane, src.row, dst.data + y * dst.row + x * dst.step, dst,
          walk.begin + block * walk.rows, walk, bias, first, last, block == 0);
  });
}

static void gather(Grid<const float> src, int64_t stride, Grid<float> dst, int64_t height, int64_t width, Walk walk,
                   const float* bias, int64_t first, int64_t last) {
  (stride == 1 ? gather_stride<1> : gather_stride<2>)(src, dst, height, width, walk, bias, first, last);
}

template <int S>
static void weight_grad_stride(const Grid<const float>& src, const Grid<const float>& grad, int64_t height,
                               int64_t width, const Quads* quads, int64_t count, float* sum) {
  for_each_tile<16>(height, width, [&](auto ty, auto tx, int64_t y, int64_t x) {
    for (int64_t i = 0; i < count; i++)
      weight_grad_tile<decltype(ty)::value, decltype(tx)::value, S>(
          src.data + y * S * src.row + x * S * LANES, src.row, grad.data + y * grad.row + x * LANES, grad.row, quads[i],
          sum);
  });
}

static void weight_grad(Grid<const float> src, int64_t stride, Grid<const float> grad, int64_t height, int64_t width,
                        const Quads* quads, int64_t count, float* sum) {
  (stride == 1 ? weight_grad_stride<1> : weight_grad_stride<2>)(src, grad, height, width, quads, count, sum);
}

// ---- normalisation, ReLU, pooling ----

static void moments(const float* z, int64_t n, float* mean, float* deviation) {
  vec sum[4] = {}, square[4] = {};
  for (int64_t i = 0; i < n; i++) sum[i % 4] += load(z + i * LANES);
  vec centre = (sum[0] + sum[1] + (sum[2] + sum[3])) / (float)n;
  for (int64_t i = 0; i < n; i++) {
    vec d = load(z + i * LANES) - centre;
    square[i % 4] += d * d;
  }
  store(mean, centre);
  store(deviation, square[0] + square[1] + (square[2] + square[3]));
}

static void forward(const float* z, Pointwise p, Grid<const float> residual, Grid<float> y) {
  const vec scale = load(p.scale), shift = load(p.shift);
  const float floor = p.relu ? 0.f : -__builtin_inff();
  auto activation = [&](int64_t i, int64_t j) {
    vec a = load(z + (i * p.width + j) * LANES) * scale + shift;
    if (residual.data) a += load(residual.data + i * residual.row + j * LANES);
    return a < floor ? vec{} : a;
  };
  if (p.pool == 1) {
    for (int64_t i = 0; i < p.height; i++)
      for (int64_t j = 0; j < p.width; j++) store(y.data + i * y.row + j * LANES, activation(i, j));
    return;
  }
  for (int64_t i = 0; i + 1 < p.height; i += 2)
    for (int64_t j = 0; j + 1 < p.width; j += 2) {
      vec sum = activation(i, j) + activation(i, j + 1) + (activation(i + 1, j) + activation(i + 1, j + 1));
      store(y.data + i / 2 * y.row + j / 2 * LANES, .25f * sum);
    }
}

// Calls visit(i, j, z, g) with the gradient g of the activation at every position.
template <typename Visit>
static inline void for_each_gradient(const float* z, const Pointwise& p, const Grid<const float>& dy,
                                     const Grid<const float>& y, Visit visit) {
  const vec scale = load(p.scale), shift = load(p.shift);
  auto gradient = [&](int64_t i, int64_t j, vec upstream) {
    vec value = load(z + (i * p.width + j) * LANES);
    vec a = y.data ? load(y.data + i * y.row + j * LANES) : value * scale + shift;
    visit(i, j, value, !p.relu ? upstream : a > 0.f ? upstream : vec{});
  };
  if (p.pool == 1) {
    for (int64_t i = 0; i < p.height; i++)
      for (int64_t j = 0; j < p.width; j++) gradient(i, j, load(dy.data + i * dy.row + j * LANES));
    return;
  }
  int64_t height = p.height / 2 * 2, width = p.width / 2 * 2;  // an odd last row or column is not pooled
  for (int64_t i = 0; i < height; i += 2) {
    for (int64_t j = 0; j < width; j += 2) {
      vec quarter = .25f * load(dy.data + i / 2 * dy.row + j / 2 * LANES);
      gradient(i, j, quarter);
      gradient(i, j + 1, quarter);
      gradient(i + 1, j, quarter);
      gradient(i + 1, j + 1, quarter);
    }
    for (int64_t j = width; j < p.width; j++) gradient(i, j, vec{}), gradient(i + 1, j, vec{});
  }
  for (int64_t i = height; i < p.height; i++)
    for (int64_t j = 0; j < p.width; j++) gradient(i, j, vec{});
}

static void backward_sums(const float* z, Pointwise p, const float* mean, Grid<const float> dy, Grid<const float> y,
                          Grid<float> g, float* sum0, float* sum1) {
  const vec centre = load(mean);
  vec s0[2] = {}, s1[2] = {};
  for_each_gradient(z, p, dy, y, [&](int64_t i, int64_t j, vec value, vec gradient) {
    if (g.data) store(g.data + i * g.row + j * LANES, gradient);
    s0[j % 2] += gradient;
    s1[j % 2] += gradient * (value - centre);
  });
  store(sum0, s0[0] + s0[1]);
  store(sum1, s1[0] + s1[1]);
}

static void backward(const float* z, Pointwise p, const float* mean, const float* slope, const float* offset,
                     Grid<const float> dy, Grid<const float> g, Grid<float> dz) {
  const vec scale = load(p.scale), k = load(slope), centre = load(mean), constant = load(offset);
  auto write = [&](int64_t i, int64_t j, vec value, vec gradient) {
    store(dz.data + i * dz.row + j * LANES, scale * gradient - k * (value - centre) - constant);
  };
  if (!g.data) return for_each_gradient(z, p, dy, {}, write);
  for (int64_t i = 0; i < p.height; i++)
    for (int64_t j = 0; j < p.width; j++)
      write(i, j, load(z + (i * p.width + j) * LANES), load(g.data + i * g.row + j * LANES));
}

static constexpr Kernels kernels = {LANES,   gather,  interleave,    separate, weight_grad,
                                    moments, forward, backward_sums, backward};
