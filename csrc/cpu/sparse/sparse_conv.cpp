// Sparse convolution with the norm, ReLU, pooling and residual addition behind it, forward and backward. Results do not
// depend on the number of threads: every sum has one owner.
#include "sparse_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lottery::sparse {
namespace {

constexpr int64_t kSecondLevelBytes = 256 << 10;  // of the cache, for the planes between convolution and norm
constexpr int64_t kCheapWeights = 32;             // per output: below this, recomputing beats storing

Tensor& scratch_of(Tensor& kept, std::vector<int64_t> sizes) {
  if (!kept.defined() || kept.sizes() != sizes) kept = at::zeros(sizes, at::kFloat);
  return kept;
}

// Calls work(block, first, last, thread) for every block and part of `channels`, thread < at::get_num_threads().
template <typename Work>
void parallel(int64_t blocks, int64_t parts, int64_t channels, Work work) {
  const int64_t size = ceil_div(channels, parts), share = ceil_div<int64_t>(blocks * parts, at::get_num_threads());
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

}  // namespace

// In how many parts the output channels of a block of images are done, so that all threads have work and, where
// reading the source again costs little, a part stays in the second-level cache between convolution and norm.
int64_t SparseConv::parts(int64_t blocks) const {
  const int64_t threads = at::get_num_threads();
  int64_t n = blocks < 2 * threads ? ceil_div(2 * threads, std::max(blocks, int64_t(1))) : 1;
  if (in.channels * in.plane() * int64_t(sizeof(float)) <= kSecondLevelBytes)
    n = std::max(n, ceil_div(out.channels * z_plane * int64_t(sizeof(float)), kSecondLevelBytes));
  return std::min(n, out.channels);
}

void SparseConv::check(const Tensor& x) const {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 5 && x.sizes() == in.sizes(x.size(0)),
              "x should be contiguous float32 ", in.sizes(x.dim() ? x.size(0) : 0), ", got ", x.scalar_type(), " ",
              x.sizes());
}

// z[first..last] of one block of images, without gaps, channel `first` at z.
void SparseConv::convolve(const float* x, float* z, const float* bias, int64_t first, int64_t last) const {
  kernels().gather({x, in.plane(), in.row(), lanes()}, stride,
                   {z - first * z_plane, z_plane, out.width * lanes(), lanes()}, out.height, out.width,
                   forward_lists.walk(), bias, first, last);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_forward(
    const c10::intrusive_ptr<SparseConv>& conv, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual, int64_t norm, double eps,
    bool relu, int64_t pool, int64_t halo, int64_t images, bool keep) {
  SparseConv& c = *conv;
  c.check(x);
  TORCH_CHECK(weight.sizes() == c.weight_sizes && weight.is_contiguous(), "weight should be ", c.weight_sizes,
              ", got ", weight.sizes());
  const int64_t B = x.size(0), O = c.out.channels, L = lanes(), positions = c.positions();
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
                       : scratch_of(c.z_scratch, {at::get_num_threads(), part, c.z_plane}).data_ptr<float>();
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
                      add ? after.grid(add + i * after.plane()) : Grid<const float>{}, after.grid(to));
  };
  parallel(B, parts, O, [&](int64_t b, int64_t first, int64_t last, int64_t thread) {
    const float* source = xp + b * c.in.channels * c.in.plane();
    if (plain) {
      for (int64_t o = first; o < last; o++) after.zero_halo(yp + (b * O + o) * after.plane());
      return kernels().gather({source, c.in.plane(), c.in.row(), L}, c.stride,
                              after.grid(yp + b * O * after.plane()), c.out.height, c.out.width,
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
  std::vector<float> weight_sums(c.dot_index.size(), 0.f);
  c.forward_lists.read(weight.const_data_ptr<float>());
  c.input_lists.read(weight.const_data_ptr<float>());
  float* scratch = whole || plain ? nullptr : scratch_of(c.z_scratch, {threads, part, c.z_plane}).data_ptr<float>();
  float* dz = scratch_of(c.dz_scratch, {std::min(threads, B), O, c.dz_plane}).data_ptr<float>();  // its halo stays 0
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
                            after.grid(dyp + i * after.plane()),
                            residual ? after.grid(yp + i * after.plane()) : Grid<const float>{},
                            residual ? after.grid(gp + i * after.plane()) : Grid<float>{}, sum0 + i * L, sum1 + i * L);
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
                       after.grid(dyp + i * after.plane()),
                       residual ? after.grid<const float>(gp + i * after.plane()) : Grid<const float>{},
                       c.out.grid(to));
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
          const Grid<float> into = c.out.grid(to);
          const Grid<const float> from = after.grid(dyp + i * after.plane());
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
          Grid<float> into = c.in.grid(to);
          into.data += py * into.row + px * into.step;
          into.row *= c.stride, into.step *= c.stride;
          kernels().gather({dz + j * O * c.dz_plane, c.dz_plane, c.out.row(), L}, 1, into,
                           ceil_div(c.in.height - py, c.stride), ceil_div(c.in.width - px, c.stride),
                           c.input_lists.walk(p), nullptr, first, last);
        }
      });
    }
    at::parallel_for(0, c.dots.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = 0; j < blocks; j++)
        kernels().weight_grad({xp + (start + j) * C * c.in.plane(), c.in.plane(), c.in.row(), L}, c.stride,
                              {dz + j * O * c.dz_plane, c.dz_plane, c.out.row(), L}, H, W, c.dots.data() + begin,
                              end - begin, weight_sums.data());
    });
  }
  Tensor dweight = at::zeros(c.weight_sizes, x.options());
  float* dw = dweight.data_ptr<float>();
  for (size_t k = 0; k < weight_sums.size(); k++)
    if (c.dot_index[k] >= 0) dw[c.dot_index[k]] = weight_sums[k];
  Tensor dbeta = own_sums[0].sum(at::IntArrayRef({0, 2})), dbias,
         dgamma = own_sums[1].mul(rstd).sum(at::IntArrayRef({0, 2}));
  if (bias) {  // a norm over data takes the mean, and the bias with it, away
    dbias = norm != kAffine ? at::zeros({O}, x.options())
            : plain         ? dy.narrow(2, halo, H).narrow(3, halo, W).sum(at::IntArrayRef({0, 2, 3, 4}))
            : gamma         ? dbeta.mul(*gamma)
                            : dbeta;
  }
  return {dx, dweight, dbias, dgamma, dbeta, g};
}

}  // namespace lottery::sparse
