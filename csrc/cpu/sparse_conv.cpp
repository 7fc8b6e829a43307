// Sparse convolution with the norm, ReLU, pooling and residual addition behind it, forward and backward.
//
// A SparseConv is built once per mask and image size: it lists the surviving weights in the orders in which the three
// passes meet them. See sparse.h for the layout [B, C, H, W, L]; activations carry a halo of zeros around H x W, so
// that no kernel ever tests for a border. Results do not depend on the number of threads: every sum has one owner.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "sparse.h"

namespace lottery::sparse {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kFirstLevelBytes = 24 << 10;    // of the cache, for a tile of the source
constexpr int64_t kSecondLevelBytes = 256 << 10;  // of the cache, for the planes between convolution and norm
constexpr int64_t kGradChannels = 32;             // gradient channels that a tile of the weight gradient keeps close
constexpr int64_t kGradParts = 8;                 // at least, of a weight gradient, for as many threads
constexpr int64_t kCheapWeights = 32;             // per output: below this, recomputing beats storing

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* forced = std::getenv("LOTTERY_SPARSE_ISA");  // for the tests
    const std::string isa = forced ? forced : "";
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (has_avx512 && (isa.empty() || isa == "avx512")) return avx512;
    if (has_avx2 && (isa.empty() || isa == "avx2")) return avx2;
#endif
    TORCH_CHECK(isa.empty() || isa == "portable", "LOTTERY_SPARSE_ISA=", isa,
                ": this processor has no such instructions");
    return portable;
  }();
  return chosen;
}

int64_t lanes() { return kernels().lanes; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Planes an odd number of cache lines apart do not compete for the same sets of the first-level cache.
int64_t spread(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

enum Norm { kAffine, kInstance, kBatch };  // scale and shift as given, statistics per image, statistics per batch

// Surviving weights in one order: lists of (offset, index into the dense weight).
struct Lists {
  std::vector<int32_t> begin{0};
  std::vector<Weight> weights;
  std::vector<int64_t> index;
  int64_t blocks = 1, rows = 0, sources = 0, ahead = 0;

  void push(int64_t where, int64_t which) {
    weights.push_back({static_cast<int32_t>(where), 0.f});
    index.push_back(which);
  }
  void close() { begin.push_back(static_cast<int32_t>(weights.size())); }
  void read(const float* weight) {
    for (size_t k = 0; k < index.size(); k++) weights[k].value = weight[index[k]];
  }
  Walk walk(int64_t part = 0) const {
    return {begin.data() + part * blocks * rows, weights.data(), blocks, rows, sources, ahead};
  }
};

// A [B, C, H + 2 halo, W + 2 halo, L] tensor.
struct Layout {
  int64_t channels, height, width, halo;

  int64_t row() const { return (width + 2 * halo) * lanes(); }
  int64_t plane() const { return (height + 2 * halo) * row(); }
  int64_t inside() const { return halo * row() + halo * lanes(); }
  std::vector<int64_t> sizes(int64_t blocks) const {
    return {blocks, channels, height + 2 * halo, width + 2 * halo, lanes()};
  }
  void zero_halo(float* p) const {
    std::memset(p, 0, sizeof(float) * inside());
    for (int64_t y = 0; y < height - 1; y++)
      std::memset(p + (halo + y) * row() + (halo + width) * lanes(), 0, sizeof(float) * 2 * halo * lanes());
    std::memset(p + plane() - inside(), 0, sizeof(float) * inside());
  }
};

struct SparseConv : torch::CustomClassHolder {
  int64_t stride, padding;
  std::vector<int64_t> weight_sizes;
  Layout in, out;     // out: the convolution's output; its halo is what the input gradient needs
  int64_t z_plane;    // out without halo, spread
  int64_t dz_plane;   // out with halo, spread
  Lists forward_lists, input_lists;
  std::vector<int32_t> quad_source, quad_grad;
  std::vector<int64_t> quad_index;  // into the dense weight, -1 = filler
  std::vector<Quads> quads;
  Tensor z_scratch, dz_scratch;

  SparseConv(const Tensor& mask, int64_t height, int64_t width, int64_t halo, int64_t stride, int64_t padding)
      : stride(stride), padding(padding) {
    TORCH_CHECK(mask.dim() == 4 && mask.scalar_type() == at::kBool && mask.device().is_cpu(),
                "mask should be a 4d bool tensor on the CPU, got ", mask.dim(), "d ", mask.scalar_type());
    TORCH_CHECK(stride == 1 || stride == 2, "stride should be 1 or 2, got ", stride);
    TORCH_CHECK(0 <= padding && padding <= halo, "padding should be between 0 and the halo ", halo, ", got ", padding);
    weight_sizes = mask.sizes().vec();
    const int64_t O = mask.size(0), C = mask.size(1), KH = mask.size(2), KW = mask.size(3);
    in = {C, height, width, halo};
    out = {O, (height + 2 * padding - KH) / stride + 1, (width + 2 * padding - KW) / stride + 1, 0};
    TORCH_CHECK(out.height > 0 && out.width > 0 && height + 2 * padding >= KH && width + 2 * padding >= KW,
                "a ", KH, " x ", KW, " kernel does not fit ", height, " x ", width, " images with padding ", padding);
    out.halo = gradient_halo(height, out.height, KH);
    out.halo = std::max(out.halo, gradient_halo(width, out.width, KW));
    z_plane = spread(out.height * out.width * lanes());
    dz_plane = spread(out.plane());
    TORCH_CHECK(std::max({C * in.plane(), O * dz_plane, mask.numel()}) < std::numeric_limits<int32_t>::max(),
                "layer too large: ", C, " channels of ", height, " x ", width);
    const Tensor kept = mask.contiguous();
    list_forward(kept.data_ptr<bool>());
    list_input(kept.data_ptr<bool>());
    list_quads(kept.data_ptr<bool>());
  }

  // Input position stride * i + p receives the output positions i + (p + padding - k) / stride.
  int64_t gradient_halo(int64_t size, int64_t out_size, int64_t kernel) const {
    int64_t halo = 0;
    for (int64_t p = 0; p < stride; p++)
      for (int64_t k = 0; k < kernel; k++) {
        if ((p + padding - k) % stride) continue;
        const int64_t shift = (p + padding - k) / stride, last = ceil_div(size - p, stride) - 1;
        halo = std::max({halo, -shift, last + shift - (out_size - 1)});
      }
    return halo;
  }

  // Source channels per block: a tile of them fits the first-level cache, yet lists are not too short to be worth it.
  static int64_t channels_per_block(int64_t channels, int64_t tile, double weights_per_channel) {
    const int64_t fit = kFirstLevelBytes / (tile * lanes() * sizeof(float));
    const int64_t worth = weights_per_channel > 0 ? std::ceil(6 / weights_per_channel) : channels;
    const int64_t most = std::min(channels, std::max({fit, worth, int64_t(1)}));
    return ceil_div(channels, ceil_div(channels, most));  // blocks of equal size
  }

  void list_forward(const bool* mask) {
    const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
    const int64_t tile = KH * (7 * stride + KW), start = (in.halo - padding) * (in.row() + lanes());
    const int64_t n = std::count(mask, mask + O * C * KH * KW, true);
    const int64_t step = channels_per_block(C, tile, double(n) / (O * C));
    Lists& lists = forward_lists;
    lists.blocks = ceil_div(C, step), lists.rows = O;
    lists.sources = C, lists.ahead = start + KH * in.row();
    for (int64_t block = 0; block < C; block += step)
      for (int64_t o = 0; o < O; o++, lists.close())
        for (int64_t c = block; c < std::min(C, block + step); c++)
          for (int64_t k = 0; k < KH * KW; k++)
            if (mask[(o * C + c) * KH * KW + k])
              lists.push(start + c * in.plane() + k / KW * in.row() + k % KW * lanes(), (o * C + c) * KH * KW + k);
  }

  // One set of lists for each parity of the input position.
  void list_input(const bool* mask) {
    const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
    const int64_t tile = KH * (7 + KW);
    const int64_t step = channels_per_block(O, tile, double(forward_lists.index.size()) / (O * C * stride * stride));
    Lists& lists = input_lists;
    lists.blocks = ceil_div(O, step), lists.rows = C;
    lists.sources = O, lists.ahead = (2 * out.halo + 1) * out.row();
    for (int64_t py = 0; py < stride; py++)
      for (int64_t px = 0; px < stride; px++)
        for (int64_t block = 0; block < O; block += step)
          for (int64_t c = 0; c < C; c++, lists.close())
            for (int64_t o = block; o < std::min(O, block + step); o++)
              for (int64_t k = 0; k < KH * KW; k++) {
                const int64_t y = py + padding - k / KW, x = px + padding - k % KW;
                if (y % stride == 0 && x % stride == 0 && mask[(o * C + c) * KH * KW + k])
                  lists.push(o * dz_plane + out.inside() + y / stride * out.row() + x / stride * lanes(),
                             (o * C + c) * KH * KW + k);
              }
  }

  // Per chunk of output and of input channels: weights of one input channel and tap by fours, then the rest by fours.
  void list_quads(const bool* mask) {
    const int64_t O = out.channels, C = in.channels, KH = weight_sizes[2], KW = weight_sizes[3];
    const int64_t start = (in.halo - padding) * (in.row() + lanes());
    struct Entry {
      int64_t source, grad, index;
    };
    auto push = [&](const Entry& e) {
      quad_source.push_back(static_cast<int32_t>(e.source));
      quad_grad.push_back(static_cast<int32_t>(e.grad));
      quad_index.push_back(e.index);
    };
    const int64_t sources = ceil_div(C, ceil_div(kGradParts, ceil_div(O, kGradChannels)));
    for (int64_t part = 0; part < ceil_div(O, kGradChannels) * ceil_div(C, sources); part++) {
      const int64_t chunk = part / ceil_div(C, sources) * kGradChannels, first = part % ceil_div(C, sources) * sources;
      Quads q{nullptr, nullptr, static_cast<int64_t>(quad_index.size()), 0, 0};
      std::vector<Entry> rest, group;
      for (int64_t c = first; c < std::min(C, first + sources); c++)
        for (int64_t k = 0; k < KH * KW; k++) {
          group.clear();
          for (int64_t o = chunk; o < std::min(O, chunk + kGradChannels); o++)
            if (mask[(o * C + c) * KH * KW + k])
              group.push_back({start + c * in.plane() + k / KW * in.row() + k % KW * lanes(),
                               o * dz_plane + out.inside(), (o * C + c) * KH * KW + k});
          const size_t full = group.size() / 4 * 4;
          std::for_each(group.begin(), group.begin() + full, push);
          rest.insert(rest.end(), group.begin() + full, group.end());
        }
      q.any = quad_index.size();
      while (rest.size() % 4) rest.push_back({start, chunk * dz_plane + out.inside(), -1});
      std::for_each(rest.begin(), rest.end(), push);
      q.end = quad_index.size();
      quads.push_back(q);
    }
    for (Quads& q : quads) q.source = quad_source.data(), q.grad = quad_grad.data();
  }

  int64_t nonzero() const { return forward_lists.index.size(); }

  // In how many parts the output channels of a block of images are done, so that all threads have work and, where
  // reading the source again costs little, a part stays in the second-level cache between convolution and norm.
  int64_t parts(int64_t blocks) const {
    const int64_t threads = at::get_num_threads();
    int64_t n = blocks < 2 * threads ? ceil_div(2 * threads, std::max(blocks, int64_t(1))) : 1;
    if (in.channels * in.plane() * int64_t(sizeof(float)) <= kSecondLevelBytes)
      n = std::max(n, ceil_div(out.channels * z_plane * int64_t(sizeof(float)), kSecondLevelBytes));
    return std::min(n, out.channels);
  }

  void check(const Tensor& x) const {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 5 && x.sizes() == in.sizes(x.size(0)),
                "x should be contiguous float32 ", in.sizes(x.dim() ? x.size(0) : 0), ", got ", x.scalar_type(), " ",
                x.sizes());
  }

  Tensor& scratch(Tensor& kept, std::vector<int64_t> sizes) {
    if (!kept.defined() || kept.sizes() != sizes) kept = at::zeros(sizes, at::kFloat);
    return kept;
  }

  Grid<float> grid(float* data, const Layout& layout) const {
    return {data + layout.inside(), layout.plane(), layout.row(), lanes()};
  }
  Grid<const float> grid(const float* data, const Layout& layout) const {
    return {data + layout.inside(), layout.plane(), layout.row(), lanes()};
  }

  // z[first..last] of one block of images, without gaps, channel `first` at z.
  void convolve(const float* x, float* z, const float* bias, int64_t first, int64_t last) const {
    kernels().gather({x, in.plane(), in.row(), lanes()}, stride,
                     {z - first * z_plane, z_plane, out.width * lanes(), lanes()}, out.height, out.width,
                     forward_lists.walk(), bias, first, last);
  }
};

// Channels-last activations x [N, C, H, W] in the layout y [B, C, H + 2 halo, W + 2 halo, L], C a multiple of 16; with
// `back` the other way. The lanes after the last image are 0.
void change_layout(const Tensor& x, const Tensor& y, int64_t halo, bool back) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                  x.size(1) % kMaxLanes == 0,
              "activations should be channels-last float32 [N, C, H, W], C a multiple of 16, got ", x.scalar_type(),
              " ", x.sizes());
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), L = lanes(), B = ceil_div(N, L);
  const Layout layout{C, H, W, halo};
  TORCH_CHECK(y.sizes() == layout.sizes(B) && y.scalar_type() == at::kFloat && y.is_contiguous(),
              "blocks should be contiguous float32 ", layout.sizes(B), ", got ", y.scalar_type(), " ", y.sizes());
  std::vector<float> nothing(C * H * W);
  float *images = x.data_ptr<float>(), *blocks = y.data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float *lane[kMaxLanes], *block = blocks + b * C * layout.plane();
      for (int64_t l = 0; l < L; l++) lane[l] = b * L + l < N ? images + (b * L + l) * C * H * W : nothing.data();
      const Grid<float> grid{block + layout.inside(), layout.plane(), layout.row(), L};
      if (back) {
        kernels().separate({grid.data, grid.plane, grid.row, grid.step}, lane, C, H, W);
        continue;
      }
      for (int64_t c = 0; c < C; c++) layout.zero_halo(block + c * layout.plane());
      kernels().interleave(lane, C, grid, H, W);
    }
  });
}

Tensor blocked(const Tensor& x, int64_t halo) {
  Tensor y = at::empty({ceil_div(x.size(0), lanes()), x.size(1), x.size(2) + 2 * halo, x.size(3) + 2 * halo, lanes()},
                       x.options());
  change_layout(x, y, halo, false);
  return y;
}

Tensor unblocked(const Tensor& y, int64_t halo, int64_t images) {
  Tensor x = at::empty({images, y.size(1), y.size(2) - 2 * halo, y.size(3) - 2 * halo}, y.options(),
                       at::MemoryFormat::ChannelsLast);
  change_layout(x, y, halo, true);
  return x;
}

// Calls work(block, first, last, thread) for every block and part of `channels`, thread < at::get_num_threads().
template <typename Work>
void parallel(int64_t blocks, int64_t parts, int64_t channels, Work work) {
  const int64_t size = ceil_div(channels, parts), share = ceil_div(blocks * parts, at::get_num_threads());
  at::parallel_for(0, blocks * parts, share, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % parts * size;
      if (first < channels) work(i / parts, first, std::min(channels, first + size), at::get_thread_num());
    }
  });
}

const float* data(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// scale and shift of one channel and block such that a = scale * z + shift.
struct Affine {
  float scale[kMaxLanes], shift[kMaxLanes];

  Affine(const float* mean, const float* rstd, float gamma, float beta) {
    for (int64_t l = 0; l < lanes(); l++) {
      scale[l] = gamma * rstd[l];
      shift[l] = beta - mean[l] * scale[l];
    }
  }
};

template <typename Work>
void for_each_channel(int64_t channels, Work work) {
  at::parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) work(o);
  });
}

// Calls visit(i) with the place in a [B, O, L] tensor of channel o of each of the first `images` images.
template <typename Visit>
void for_each_image(int64_t images, int64_t O, int64_t o, Visit visit) {
  const int64_t L = lanes();
  for (int64_t b = 0; b * L < images; b++)
    for (int64_t l = 0; l < std::min(L, images - b * L); l++) visit((b * O + o) * L + l);
}

// Batch statistics from per-lane means and squared deviations (Chan et al. 1979), written back over both: mean and
// rstd.
void batch_statistics(Tensor& mean, Tensor& deviation, Tensor& variance, int64_t images, int64_t positions,
                      double eps) {
  const int64_t B = mean.size(0), O = mean.size(1), L = lanes();
  float *m = mean.data_ptr<float>(), *d = deviation.data_ptr<float>(), *v = variance.data_ptr<float>();
  for_each_channel(O, [&](int64_t o) {
    double centre = 0, square = 0;
    for_each_image(images, O, o, [&](int64_t i) { centre += m[i]; });
    centre /= images;
    for_each_image(images, O, o, [&](int64_t i) { square += d[i] + positions * (m[i] - centre) * (m[i] - centre); });
    v[o] = square / (images * positions);
    const float rstd = 1 / std::sqrt(square / (images * positions) + eps);
    for_each_image(B * L, O, o, [&](int64_t i) { m[i] = centre, d[i] = rstd; });
  });
}

// y = pool(relu(norm(conv(x) + bias) + residual)), and what the backward pass wants: z = conv(x) + bias (empty when it
// is cheaper to recompute), mean and rstd [B, O, L], and the variance [O] of the batch.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_forward(
    const c10::intrusive_ptr<SparseConv>& conv, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual, int64_t norm, double eps,
    bool relu, int64_t pool, int64_t halo, int64_t images, bool keep) {
  SparseConv& c = *conv;
  c.check(x);
  TORCH_CHECK(weight.sizes() == c.weight_sizes && weight.is_contiguous(), "weight should be ", c.weight_sizes,
              ", got ", weight.sizes());
  const int64_t B = x.size(0), O = c.out.channels, L = lanes(), positions = c.out.height * c.out.width;
  const Layout after{O, c.out.height / pool, c.out.width / pool, halo};
  TORCH_CHECK(!residual || (residual->sizes() == after.sizes(B) && residual->is_contiguous() && pool == 1),
              "residual should be ", after.sizes(B), " without pooling, got ",
              residual ? residual->sizes() : at::IntArrayRef());
  Tensor y = at::empty(after.sizes(B), x.options());
  Tensor mean = at::zeros({B, O, L}, x.options()), rstd = at::ones({B, O, L}, x.options());
  Tensor variance = at::empty({norm == kBatch ? O : 0}, x.options());
  const int64_t parts = c.parts(B), part = ceil_div(O, parts);
  const bool plain = norm == kAffine && !gamma && !relu && pool == 1 && !residual;
  const bool whole = norm == kBatch || (keep && !plain && c.nonzero() > kCheapWeights * O);
  Tensor z = at::empty({whole ? B : 0, O, c.z_plane}, x.options());
  float* scratch = whole || plain
                       ? nullptr
                       : c.scratch(c.z_scratch, {at::get_num_threads(), part, c.z_plane}).data_ptr<float>();
  c.forward_lists.read(weight.const_data_ptr<float>());
  const float *xp = x.const_data_ptr<float>(), *add = data(residual);
  float *yp = y.data_ptr<float>(), *zp = z.data_ptr<float>();
  float *mp = mean.data_ptr<float>(), *rp = rstd.data_ptr<float>();

  auto finish = [&](int64_t b, int64_t o, const float* plane) {
    const int64_t i = b * O + o;
    float* to = yp + i * after.plane();
    after.zero_halo(to);
    const Affine affine(mp + i * L, rp + i * L, gamma ? data(gamma)[o] : 1.f, beta ? data(beta)[o] : 0.f);
    kernels().forward(plane, {c.out.height, c.out.width, pool, relu, affine.scale, affine.shift},
                      add ? c.grid(add + i * after.plane(), after) : Grid<const float>{}, c.grid(to, after));
  };
  parallel(B, parts, O, [&](int64_t b, int64_t first, int64_t last, int64_t thread) {
    const float* source = xp + b * c.in.channels * c.in.plane();
    if (plain) {
      for (int64_t o = first; o < last; o++) after.zero_halo(yp + (b * O + o) * after.plane());
      return kernels().gather({source, c.in.plane(), c.in.row(), L}, c.stride,
                              c.grid(yp + b * O * after.plane(), after), c.out.height, c.out.width,
                              c.forward_lists.walk(), data(bias), first, last);
    }
    float* planes = whole ? zp + (b * O + first) * c.z_plane : scratch + thread * part * c.z_plane;
    c.convolve(source, planes, data(bias), first, last);
    for (int64_t o = first; o < last; o++) {
      const float* plane = planes + (o - first) * c.z_plane;
      float *m = mp + (b * O + o) * L, *r = rp + (b * O + o) * L;
      if (norm != kAffine) kernels().moments(plane, positions, m, r);
      if (norm == kBatch) continue;
      if (norm == kInstance)
        for (int64_t l = 0; l < L; l++) r[l] = 1 / std::sqrt(r[l] / positions + static_cast<float>(eps));
      finish(b, o, plane);
    }
  });
  if (norm == kBatch) {
    batch_statistics(mean, rstd, variance, images, positions, eps);
    parallel(B, parts, O, [&](int64_t b, int64_t first, int64_t last, int64_t) {
      for (int64_t o = first; o < last; o++) finish(b, o, zp + (b * O + o) * c.z_plane);
    });
  }
  return {y, z, mean, rstd, variance};
}

// Sums over the images of a batch, for every image: the same value in all lanes of real images, 0 in the others.
void batch_sums(Tensor& sums, int64_t images) {
  const int64_t B = sums.size(1), O = sums.size(2), L = lanes();
  for (int64_t s = 0; s < 2; s++) {
    float* p = sums.data_ptr<float>() + s * B * O * L;
    for_each_channel(O, [&](int64_t o) {
      double total = 0;
      for_each_image(images, O, o, [&](int64_t i) { total += p[i]; });
      for_each_image(B * L, O, o, [&](int64_t i) { p[i] = total; });
    });
  }
}

// Gradients of x (empty unless wanted), weight, bias, gamma, beta and residual (empty without).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const c10::intrusive_ptr<SparseConv>& conv, const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& z,
    const Tensor& mean, const Tensor& rstd, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, bool residual, int64_t norm, bool relu, int64_t pool,
    int64_t halo, int64_t images, bool wants_input) {
  SparseConv& c = *conv;
  const int64_t B = x.size(0), O = c.out.channels, C = c.in.channels, L = lanes(), H = c.out.height, W = c.out.width;
  const Layout after{O, H / pool, W / pool, halo};
  TORCH_CHECK(dy.sizes() == after.sizes(B) && dy.is_contiguous(), "dy should be contiguous ", after.sizes(B),
              ", got ", dy.sizes());
  const int64_t parts = c.parts(B), part = ceil_div(O, parts), threads = at::get_num_threads();
  const bool plain = norm == kAffine && !gamma && !relu && pool == 1 && !residual, whole = z.numel() > 0;
  Tensor dx = wants_input ? at::empty_like(x) : Tensor(), g = residual ? at::empty_like(dy) : Tensor();
  Tensor sums = at::zeros({2, B, O, L}, x.options());
  std::vector<float> weight_sums(c.quad_index.size(), 0.f);
  c.forward_lists.read(weight.const_data_ptr<float>());
  c.input_lists.read(weight.const_data_ptr<float>());
  float* scratch = whole || plain ? nullptr : c.scratch(c.z_scratch, {threads, part, c.z_plane}).data_ptr<float>();
  float* dz = c.scratch(c.dz_scratch, {std::min(threads, B), O, c.dz_plane}).data_ptr<float>();  // its halo stays 0
  const float *xp = x.const_data_ptr<float>(), *dyp = dy.const_data_ptr<float>(), *mp = mean.const_data_ptr<float>();
  const float *rp = rstd.const_data_ptr<float>(), *zp = z.const_data_ptr<float>(), *yp = y.const_data_ptr<float>();
  float *gp = residual ? g.data_ptr<float>() : nullptr, *sum0 = sums.data_ptr<float>(), *sum1 = sum0 + B * O * L;

  auto planes_of = [&](int64_t b, int64_t first, int64_t last, int64_t thread) -> const float* {
    if (whole) return zp + (b * O + first) * c.z_plane;
    float* planes = scratch + thread * part * c.z_plane;
    c.convolve(xp + b * C * c.in.plane(), planes, data(bias), first, last);
    return planes;
  };
  auto affine_of = [&](int64_t i) {
    return Affine(mp + i * L, rp + i * L, gamma ? data(gamma)[i % O] : 1.f, beta ? data(beta)[i % O] : 0.f);
  };
  auto reduce = [&](int64_t i, const float* plane) {
    const Affine affine = affine_of(i);
    if (residual) after.zero_halo(gp + i * after.plane());
    kernels().backward_sums(plane, {H, W, pool, relu, affine.scale, affine.shift}, mp + i * L,
                            c.grid(dyp + i * after.plane(), after),
                            residual ? c.grid(yp + i * after.plane(), after) : Grid<const float>{},
                            residual ? c.grid(gp + i * after.plane(), after) : Grid<float>{}, sum0 + i * L,
                            sum1 + i * L);
  };
  auto apply = [&](int64_t i, const float* plane, float* to) {
    Affine affine = affine_of(i);
    float slope[kMaxLanes] = {}, offset[kMaxLanes] = {};
    const float count = norm == kInstance ? H * W : images * H * W;
    for (int64_t l = 0; l < L && norm != kAffine; l++) {
      const float* r = rp + i * L;
      offset[l] = affine.scale[l] * sum0[i * L + l] / count;
      slope[l] = affine.scale[l] * r[l] * r[l] * sum1[i * L + l] / count;
      if (i / O * L + l >= images) affine.scale[l] = slope[l] = offset[l] = 0;  // a lane without image
    }
    kernels().backward(plane, {H, W, pool, relu, affine.scale, affine.shift}, mp + i * L, slope, offset,
                       c.grid(dyp + i * after.plane(), after),
                       residual ? c.grid(static_cast<const float*>(gp) + i * after.plane(), after)
                                : Grid<const float>{},
                       c.grid(to, c.out));
  };

  if (norm == kBatch) {
    parallel(B, parts, O, [&](int64_t b, int64_t first, int64_t last, int64_t) {
      for (int64_t o = first; o < last; o++) reduce(b * O + o, zp + (b * O + o) * c.z_plane);
    });
  }
  const Tensor own_sums = norm == kBatch ? sums.clone() : sums;
  if (norm == kBatch) batch_sums(sums, images);

  for (int64_t start = 0; start < B; start += threads) {  // as many blocks at a time as stay in the caches
    const int64_t blocks = std::min(threads, B - start);
    parallel(blocks, plain ? 1 : parts, O, [&](int64_t j, int64_t first, int64_t last, int64_t thread) {
      const float* planes = plain ? nullptr : planes_of(start + j, first, last, thread);
      for (int64_t o = first; o < last; o++) {
        const int64_t i = (start + j) * O + o;
        float* to = dz + (j * O + o) * c.dz_plane;
        if (plain) {
          const Grid<float> into = c.grid(to, c.out);
          const Grid<const float> from = c.grid(dyp + i * after.plane(), after);
          for (int64_t row = 0; row < H; row++)
            std::memcpy(into.data + row * into.row, from.data + row * from.row, sizeof(float) * W * L);
          continue;
        }
        const float* plane = planes + (o - first) * c.z_plane;
        if (norm != kBatch) reduce(i, plane);
        apply(i, plane, to);
      }
    });
    if (wants_input) {
      float* dxp = dx.data_ptr<float>();
      parallel(blocks, ceil_div(threads, blocks), C, [&](int64_t j, int64_t first, int64_t last, int64_t) {
        float* to = dxp + (start + j) * C * c.in.plane();
        for (int64_t channel = first; channel < last; channel++) c.in.zero_halo(to + channel * c.in.plane());
        for (int64_t p = 0; p < c.stride * c.stride; p++) {
          const int64_t py = p / c.stride, px = p % c.stride;
          Grid<float> into = c.grid(to, c.in);
          into.data += py * into.row + px * into.step;
          into.row *= c.stride, into.step *= c.stride;
          kernels().gather({dz + j * O * c.dz_plane, c.dz_plane, c.out.row(), L}, 1, into,
                           ceil_div(c.in.height - py, c.stride), ceil_div(c.in.width - px, c.stride),
                           c.input_lists.walk(p), nullptr, first, last);
        }
      });
    }
    at::parallel_for(0, c.quads.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = 0; j < blocks; j++)
        kernels().weight_grad({xp + (start + j) * C * c.in.plane(), c.in.plane(), c.in.row(), L}, c.stride,
                              {dz + j * O * c.dz_plane, c.dz_plane, c.out.row(), L}, H, W, c.quads.data() + begin,
                              end - begin, weight_sums.data());
    });
  }
  Tensor dweight = at::zeros(c.weight_sizes, x.options());
  float* dw = dweight.data_ptr<float>();
  for (size_t k = 0; k < weight_sums.size(); k++)
    if (c.quad_index[k] >= 0) dw[c.quad_index[k]] = weight_sums[k];
  Tensor dbeta = own_sums[0].sum({0, 2}), dgamma = own_sums[1].mul(rstd).sum({0, 2}), dbias;
  if (bias) {  // a norm over data takes the mean, and the bias with it, away
    dbias = norm != kAffine ? at::zeros({O}, x.options())
            : plain         ? dy.narrow(2, halo, H).narrow(3, halo, W).sum({0, 2, 3, 4})
            : gamma         ? dbeta.mul(*gamma)
                            : dbeta;
  }
  return {dx, dweight, dbias, dgamma, dbeta, g};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lottery, m) {
  m.class_<SparseConv>("SparseConv")
      .def(torch::init<const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t>(), "",
           {torch::arg("mask"), torch::arg("height"), torch::arg("width"), torch::arg("halo"), torch::arg("stride"),
            torch::arg("padding")})
      .def("positions", [](const c10::intrusive_ptr<SparseConv>& conv) { return conv->out.height * conv->out.width; });
  m.def("sparse_lanes", &lanes);
  m.def("sparse_blocked", &blocked);
  m.def("sparse_unblocked", &unblocked);
  m.def("sparse_conv_forward", &conv_forward);
  m.def("sparse_conv_backward", &conv_backward);
}

}  // namespace lottery::sparse
