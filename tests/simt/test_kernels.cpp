// Every kernel of csrc/kernels/ against a plain computation in double: several sizes with tails, each tensor misaligned
// on its own, offsets beyond 2^31, float32, float16 and bfloat16, in several orders of threads. Argument: how many
// orders (seeds) to run. bench/mutants.py shows which mistakes in the kernels this finds.
#define SIMT_CPU
#include "simt.h"
//
#include "../../csrc/kernels/bias_relu.cuh"
#include "../../csrc/kernels/combine.cuh"
#include "../../csrc/kernels/cross_entropy_top1.cuh"
#include "../../csrc/kernels/dsa.cuh"
#include "../../csrc/kernels/masked_sgd.cuh"
#include "../../csrc/kernels/norm_relu_pool.cuh"
#include "../../csrc/kernels/norm_relu_pool_last.cuh"

#include <climits>

using namespace lottery;

constexpr size_t kHuge = size_t(1) << 31;

struct BFloat16 {  // the upper half of a float, rounded to nearest even
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float v) {
    uint32_t b;
    memcpy(&b, &v, 4);
    bits = uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t b = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &b, 4);
    return v;
  }
};
using Half = _Float16;

template <class T>
const char* name_of = "double";
template <>
const char* name_of<float> = "float32";
template <>
const char* name_of<Half> = "float16";
template <>
const char* name_of<BFloat16> = "bfloat16";

template <class T>
double tolerance = 1e-12;
template <>
double tolerance<float> = 4e-6;
template <>
double tolerance<Half> = 2e-3;
template <>
double tolerance<BFloat16> = 1.6e-2;

double uniform() { return (rand() + .5) / (RAND_MAX + 1.) * 2 - 1; }

template <class T>
double value(T v) {
  if constexpr (std::is_same_v<T, double>)
    return v;
  else
    return double(float(v));
}
template <class T>
T rounded(double v) {
  if constexpr (std::is_same_v<T, double>)
    return v;
  else
    return T(float(v));
}

// A tensor on the heap that ends where its memory ends; `shift` elements behind a 16-byte boundary. A huge one takes
// addresses alone: its pages come when they are touched, as zeros, and fill() is for the part that is used.
template <class T>
struct Tensor {
  size_t bytes;
  bool huge;
  char* memory;
  T* data;

  explicit Tensor(size_t size, bool shift = false)
      : bytes((size + shift) * sizeof(T)), huge(bytes > 1 << 26),
        memory(static_cast<char*>(huge ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                                       : malloc(bytes))),
        data(reinterpret_cast<T*>(memory) + shift) {
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (!huge) fill(0, size);
  }
  ~Tensor() {
    if (huge)
      munmap(memory, bytes);
    else
      free(memory);
  }
  Tensor(const Tensor&) = delete;
  void fill(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) data[i] = rounded<T>(uniform());
  }
  double operator[](size_t i) const { return value(data[i]); }
};

int failures = 0;

void check(const std::string& what, double error, double allowed) {
  if (error <= allowed) return;  // false for NaN
  printf("FAIL %s: error %g, allowed %g\n", what.c_str(), error, allowed);
  ++failures;
}

void keep_largest(double& error, double one, double other) {  // NaN is the largest
  const double d = std::abs(one - other) / std::max(1., std::abs(other));
  if (!std::isnan(error) && !(d <= error)) error = d;
}

// What masked_sgd_ makes of a weight and its momentum.
struct Updated {
  double p, m;
  Updated(double p, double g, double momentum, bool keep, const SgdStep& step) {
    g += step.weight_decay * p;
    m = step.momentum * momentum + (1 - step.dampening) * g;
    this->p = keep ? p - step.lr * (step.nesterov ? g + step.momentum * m : m) : 0;
    m = keep ? m : 0;
  }
};

// The step as it is launched: its learning rate lies on the device.
SgdStep launched(SgdStep step) {
  step.lr = NAN;
  return step;
}

template <class T>
void test_masked_sgd(const SgdStep& step) {
  const std::string off[] = {"", "", "", "", "", "", "", "param", "grad", "momentum", "mask", ""};
  const std::vector<int> sizes = {1, 3, 8, 63, 1025, 4096, 4100, 64, 64, 64, 64, 64};
  std::vector<Tensor<T>*> params, grads;
  std::vector<Tensor<float>*> momenta;
  std::vector<Tensor<unsigned char>*> masks;
  std::vector<std::vector<Updated>> want;
  SgdTensors<T> batch;
  batch.count = int(sizes.size());
  batch.first_block[0] = 0;
  for (int i = 0; i < batch.count; ++i) {
    const int n = sizes[i];
    params.push_back(new Tensor<T>(n, off[i] == "param"));
    grads.push_back(new Tensor<T>(n, off[i] == "grad"));
    momenta.push_back(new Tensor<float>(n, off[i] == "momentum"));
    masks.push_back(new Tensor<unsigned char>(n, off[i] == "mask"));
    want.emplace_back();
    const bool masked = i % 3 != 2;
    for (int j = 0; j < n; ++j) {
      const bool keep = (masks[i]->data[j] = rand() % 2);
      want[i].emplace_back((*params[i])[j], (*grads[i])[j], (*momenta[i])[j], keep || !masked, step);
    }
    batch.param[i] = params[i]->data, batch.grad[i] = grads[i]->data, batch.momentum[i] = momenta[i]->data;
    batch.mask[i] = masked ? masks[i]->data : nullptr;
    batch.size[i] = n;
    batch.first_block[i + 1] = batch.first_block[i] + (n + kSgdBlock - 1) / kSgdBlock;
  }
  LAUNCH(masked_sgd_kernel<T>, batch.first_block[batch.count], kSgdThreads, 0, 0, batch, launched(step), &step.lr);
  double error = 0;
  for (int i = 0; i < batch.count; ++i)
    for (int j = 0; j < sizes[i]; ++j) {
      keep_largest(error, (*params[i])[j], want[i][j].p);
      keep_largest(error, (*momenta[i])[j], want[i][j].m);
      if (batch.mask[i] && !batch.mask[i][j] && ((*params[i])[j] != 0 || (*momenta[i])[j] != 0)) error = NAN;
    }
  check(std::string("masked_sgd ") + name_of<T>, error, tolerance<T>);
  for (int i = 0; i < batch.count; ++i) delete params[i], delete grads[i], delete momenta[i], delete masks[i];
}

void test_masked_sgd_of_a_huge_tensor() {
  const size_t size = kHuge + kSgdBlock + 5, ends[] = {0, size - kSgdBlock - 5};  // the first block, the last two
  const SgdStep step{.1f, .9f, 0.f, .01f, false};
  Tensor<Half> params(size), grads(size);
  Tensor<float> momenta(size);
  Tensor<unsigned char> mask(size);
  for (const size_t begin : ends) {
    const size_t end = std::min(size, begin + kSgdBlock + 5);
    params.fill(begin, end), grads.fill(begin, end), momenta.fill(begin, end);
    std::vector<Updated> want;
    for (size_t i = begin; i < end; ++i)
      want.emplace_back(params[i], grads[i], momenta[i], mask.data[i] = rand() % 2, step);
    SgdTensors<Half> batch{{params.data}, {grads.data}, {momenta.data}, {mask.data}, {(long long)size}};
    batch.count = 1;
    batch.first_block[1] = (size + kSgdBlock - 1) / kSgdBlock;
    const simt::Part part(dim3(begin / kSgdBlock, 0), begin ? 2 : 1);
    LAUNCH(masked_sgd_kernel<Half>, batch.first_block[1], kSgdThreads, 0, 0, batch, launched(step), &step.lr);
    double error = 0;
    for (size_t i = begin; i < (begin ? end : kSgdBlock); ++i) {
      keep_largest(error, params[i], want[i - begin].p);
      keep_largest(error, momenta[i], want[i - begin].m);
    }
    check("masked_sgd of a huge tensor", error, tolerance<Half>);
  }
}

// Of states that are huge, the last `tail` parameters.
template <int M>
void test_combine(int count, size_t size, bool masked, const std::string& off = "", size_t tail = 0) {
  const int total = 7, chunk = 3;
  Tensor<float> states(count * size, off == "states"), points(total * size, off == "points");
  Tensor<float> coefficients(total * count);
  Tensor<unsigned char> keep(size, off == "keep");
  const size_t begin = tail ? size - tail : 0;
  for (int m = 0; m < count && tail; ++m) states.fill(m * size + begin, (m + 1) * size);
  for (size_t i = begin; i < size; ++i) keep.data[i] = rand() % 2;
  const unsigned chunks = (total + chunk - 1) / chunk, a_block = kCombineThreads * (size % 4 ? 1 : 4);
  const unsigned blocks = tail ? (size + a_block - 1) / a_block : 2, first = begin / a_block;
  const simt::Part part(dim3(first, 0), dim3(blocks - first, chunks));
  LAUNCH(combine_kernel<M>, dim3(blocks, chunks), kCombineThreads, chunk * count * sizeof(float), 0, points.data,
         (const float*)states.data, (const float*)coefficients.data,
         (const unsigned char*)(masked ? keep.data : nullptr), (long long)size, count, total, chunk);
  double error = 0;
  for (int k = 0; k < total; ++k)
    for (size_t i = begin; i < size; ++i) {
      double sum = 0;
      for (int m = 0; m < count; ++m) sum += coefficients[k * count + m] * states[m * size + i];
      keep_largest(error, points[k * size + i], masked && !keep.data[i] ? 0 : sum);
    }
  check("combine<" + std::to_string(M) + "> of " + std::to_string(size) + " " + off, error, tolerance<float>);
}

// The last network of `networks`; huge ones are not looked at whole.
template <class T>
void test_cross_entropy_top1(int classes, int networks = 2) {
  const int images = 21, blocks = 2, last = networks - 1;
  const size_t begin = size_t(last) * images * classes;
  Tensor<T> logits(size_t(networks) * images * classes);
  Tensor<long long> labels(images);
  Tensor<double> sums(size_t(networks) * blocks * 3);
  logits.fill(begin, begin + images * classes);
  for (int b = 0; b < images; ++b) labels.data[b] = rand() % classes;
  T* tied = logits.data + begin + 5 * classes;  // the first counts, whatever the lane it falls to
  tied[classes / 3] = tied[classes - 1] = T(9.f);
  labels.data[5] = classes / 3;
  const simt::Part part(dim3(0, last), dim3(blocks, 1));
  LAUNCH(cross_entropy_top1_kernel<T>, dim3(blocks, networks), 32 * kLossWarps, 0, 0, (const T*)logits.data,
         (const long long*)labels.data, (long long)images, classes, sums.data);
  double want[3] = {}, error = 0;
  for (int b = 0; b < images; ++b) {
    const size_t row = begin + b * classes;
    double total = 0;
    int top = 0;
    for (int c = 0; c < classes; ++c) {
      total += exp(logits[row + c]);
      if (logits[row + c] > logits[row + top]) top = c;
    }
    const double loss = log(total) - logits[row + labels.data[b]];
    want[0] += loss, want[1] += loss * loss, want[2] += top == labels.data[b];
  }
  const double* of_last = sums.data + last * blocks * 3;
  for (int i = 0; i < 3; ++i) keep_largest(error, of_last[i] + of_last[3 + i], want[i]);
  check(std::string("cross_entropy_top1 ") + name_of<T> + " of " + std::to_string(classes), error, 1e-5);
}

// One image of 5 classes: its loss must be NaN, and a hit as given.
void test_cross_entropy_top1_without_loss(const std::string& what, float logit, int at, long long label, int hit) {
  const int classes = 5;
  Tensor<float> logits(classes);
  Tensor<long long> labels(1);
  Tensor<double> sums(3);
  for (int c = 0; c < classes; ++c)
    if (at < 0 || c == at) logits.data[c] = logit;
  labels.data[0] = label;
  LAUNCH(cross_entropy_top1_kernel<float>, 1, 32 * kLossWarps, 0, 0, (const float*)logits.data,
         (const long long*)labels.data, 1ll, classes, sums.data);
  check("cross_entropy_top1 of " + what, std::isnan(sums[0]) && std::isnan(sums[1]) && sums[2] == hit ? 0 : 1, 0);
}

// `planes` planes, the last 9 of which are looked at.
template <class T, class A, int kThreads>
void test_norm_relu_pool(int height, int width, const std::string& off = "", size_t planes = 9) {
  const int channels = 3, size = height * width, pooled_size = height / 2 * (width / 2);
  const size_t first = planes - 9;
  const double eps = 1e-5;
  Tensor<T> x(planes * size, off == "x"), pooled(planes * pooled_size, off == "pooled");
  Tensor<T> grad(planes * pooled_size, off == "grad"), dx(planes * size, off == "dx");
  Tensor<A> weight(channels), bias(channels), mean(planes), rstd(planes), dweight(planes), dbias(planes);
  x.fill(first * size, planes * size), grad.fill(first * pooled_size, planes * pooled_size);
  const unsigned a_block = kNormThreads / kThreads, blocks = (planes + a_block - 1) / a_block;
  const simt::Part part(dim3(first / a_block, 0), dim3(blocks - first / a_block));
  LAUNCH((norm_relu_pool_kernel<T, A, kThreads>), blocks, kNormThreads, 0, 0, (const T*)x.data, (const A*)weight.data,
         (const A*)bias.data, pooled.data, mean.data, rstd.data, (long long)planes, channels, height, width, A(eps));
  LAUNCH((norm_relu_pool_backward_kernel<T, A, kThreads>), blocks, kNormThreads, 0, 0, (const T*)grad.data,
         (const T*)x.data, (const A*)weight.data, (const A*)bias.data, (const A*)mean.data, (const A*)rstd.data,
         dx.data, dweight.data, dbias.data, (long long)planes, channels, height, width);
  double error = 0, error_backward = 0;
  for (size_t p = first; p < planes; ++p) {
    const double w = weight[p % channels], b = bias[p % channels];
    double m = 0, v = 0, sum = 0, sum_normal = 0;
    std::vector<double> normal(size), g(size, 0.), out(pooled_size, 0.);
    for (int i = 0; i < size; ++i) m += x[p * size + i] / size;
    for (int i = 0; i < size; ++i) v += (x[p * size + i] - m) * (x[p * size + i] - m) / size;
    for (int i = 0; i < size; ++i) {
      normal[i] = (x[p * size + i] - m) / sqrt(v + eps);
      const int row = i / width / 2, column = i % width / 2;
      if (row >= height / 2 || column >= width / 2) continue;
      const double z = normal[i] * w + b;
      out[row * (width / 2) + column] += std::max(z, 0.) / 4;
      g[i] = z > 0 ? grad[p * pooled_size + row * (width / 2) + column] / 4 : 0;
      sum += g[i], sum_normal += g[i] * normal[i];
    }
    for (int i = 0; i < pooled_size; ++i) keep_largest(error, pooled[p * pooled_size + i], out[i]);
    for (int i = 0; i < size; ++i)
      keep_largest(error_backward, dx[p * size + i],
                   w / sqrt(v + eps) * (g[i] - sum / size - normal[i] * sum_normal / size));
    keep_largest(error_backward, value(dweight.data[p]), sum_normal);
    keep_largest(error_backward, value(dbias.data[p]), sum);
  }
  const std::string what =
      std::string(name_of<T>) + " " + std::to_string(height) + " x " + std::to_string(width) + " " + off;
  check("norm_relu_pool " + what, error, tolerance<T>);
  check("norm_relu_pool_backward " + what, error_backward, 4 * tolerance<T>);
}

// The last image of `images` channels_last ones, N channels at a time where all tensors allow it.
template <class T, class A>
void test_norm_relu_pool_last(int channels, int groups, int height, int width, const std::string& off = "",
                              size_t images = 2) {
  const int size = height * width, cells = height / 2 * (width / 2), of_group = channels / groups;
  const size_t last = images - 1, at = last * size * channels, at_cells = last * cells * channels;
  const double eps = 1e-5;
  Tensor<T> x(images * size * channels, off == "x"), pooled(images * cells * channels, off == "pooled");
  Tensor<T> grad(images * cells * channels, off == "grad"), dx(images * size * channels, off == "dx");
  Tensor<A> weight(channels), bias(channels), mean(images * channels), rstd(images * channels);
  Tensor<A> dweight(images * channels), dbias(images * channels);
  x.fill(at, at + size * channels), grad.fill(at_cells, at_cells + cells * channels);
  const T* none = nullptr;
  const auto blocks_of = [&](int N) { return unsigned((channels + kLastLanes * N - 1) / (kLastLanes * N)); };
  const auto launch = [&](auto packs) {
    constexpr int N = decltype(packs)::value;
    const simt::Part part(dim3(blocks_of(N) * last, 0), dim3(blocks_of(N)));
    LAUNCH((norm_relu_pool_last_kernel<T, A, N>), blocks_of(N) * images, kLastThreads, 0, 0, (const T*)x.data,
           (const A*)weight.data, (const A*)bias.data, pooled.data, mean.data, rstd.data, (long long)images, channels,
           groups, height, width, A(eps));
  };
  const auto launch_backward = [&](auto packs) {
    constexpr int N = decltype(packs)::value;
    const simt::Part part(dim3(blocks_of(N) * last, 0), dim3(blocks_of(N)));
    LAUNCH((norm_relu_pool_last_backward_kernel<T, A, N>), blocks_of(N) * images, kLastThreads, 0, 0,
           (const T*)grad.data, (const T*)x.data, (const A*)weight.data, (const A*)bias.data, (const A*)mean.data,
           (const A*)rstd.data, dx.data, dweight.data, dbias.data, channels, height, width);
  };
  using Many = std::integral_constant<int, kPack<T>>;
  using One = std::integral_constant<int, 1>;
  takes_packs<kPack<T>>(channels, groups, (const T*)x.data, (const T*)pooled.data, none) ? launch(Many())
                                                                                         : launch(One());
  takes_packs<kPack<T>>(channels, 1, (const T*)x.data, (const T*)grad.data, (const T*)dx.data) ? launch_backward(Many())
                                                                                               : launch_backward(One());
  double error = 0, error_backward = 0;
  for (int c = 0; c < channels; ++c) {
    const double w = weight[c], b = bias[c];
    double m = 0, v = 0, sum = 0, sum_normal = 0;
    std::vector<double> normal(size), g(size, 0.), out(cells, 0.);
    for (int i = 0; i < size; ++i) m += x[at + i * channels + c] / size;
    for (int i = 0; i < size; ++i) v += (x[at + i * channels + c] - m) * (x[at + i * channels + c] - m) / size;
    for (int i = 0; i < size; ++i) {
      normal[i] = (x[at + i * channels + c] - m) / sqrt(v + eps);
      const int row = i / width / 2, column = i % width / 2;
      if (row >= height / 2 || column >= width / 2) continue;
      const int cell = row * (width / 2) + column;
      const double z = normal[i] * w + b;
      out[cell] += std::max(z, 0.) / 4;
      g[i] = z > 0 ? grad[at_cells + cell * channels + c] / 4 : 0;
      sum += g[i], sum_normal += g[i] * normal[i];
    }
    for (int i = 0; i < cells; ++i)
      keep_largest(error, pooled[((c / of_group * images + last) * cells + i) * of_group + c % of_group], out[i]);
    for (int i = 0; i < size; ++i)
      keep_largest(error_backward, dx[at + i * channels + c],
                   w / sqrt(v + eps) * (g[i] - sum / size - normal[i] * sum_normal / size));
    keep_largest(error_backward, value(dweight.data[last * channels + c]), sum_normal);
    keep_largest(error_backward, value(dbias.data[last * channels + c]), sum);
  }
  const std::string what = std::string(name_of<T>) + " of " + std::to_string(channels) + " channels, " +
                           std::to_string(height) + " x " + std::to_string(width) + " " + off;
  check("norm_relu_pool_last " + what, error, tolerance<T>);
  check("norm_relu_pool_last_backward " + what, error_backward, 4 * tolerance<T>);
}

void test_nan_passes_norm_relu_pool() {
  const int size = 8, pooled_size = 2;  // of a plane of 2 x 4, the first of two
  Tensor<float> x(2 * size), pooled(2 * pooled_size), weight(1), bias(1), mean(2), rstd(2);
  x.data[3] = NAN;
  LAUNCH((norm_relu_pool_kernel<float, float, 32>), 1, kNormThreads, 0, 0, (const float*)x.data,
         (const float*)weight.data, (const float*)bias.data, pooled.data, mean.data, rstd.data, 2ll, 1, 2, 4, 1e-5f);
  const bool first = std::isnan(pooled[0]) && std::isnan(pooled[1]), second = std::isnan(pooled[2] + pooled[3]);
  check("NaN in norm_relu_pool", first && !second ? 0 : 1, 0);
}

// Of a huge x, the last `tail` elements.
template <class T, class A, class I = unsigned>
void test_bias_relu(int channels, int inner, bool channels_last, bool with_shortcut, const std::string& off = "",
                    size_t images = 2, size_t tail = 0) {
  const size_t size = images * channels * inner, begin = tail ? size - tail : 0;
  Tensor<T> x(size, off == "x"), bias(channels, off == "bias"), shortcut(size, off == "shortcut");
  x.fill(begin, size), shortcut.fill(begin, size);
  if (!tail) x.data[1] = rounded<T>(NAN);
  std::vector<double> want;
  for (size_t i = begin; i < size; ++i) {
    const double z = x[i] + bias[(channels_last ? i : i / inner) % channels] + (with_shortcut ? shortcut[i] : 0);
    want.push_back(z < 0 ? 0 : z);
  }
  const unsigned a_block = kBiasReluThreads * ((channels_last ? channels : inner) % kPack<T> ? 1 : kPack<T>);
  const unsigned blocks = tail ? (size + a_block - 1) / a_block : 3, first = begin / a_block;
  const simt::Part part(dim3(first, 0), dim3(blocks - first));
  LAUNCH((bias_relu_kernel<T, A, I>), blocks, kBiasReluThreads, 0, 0, x.data, (const T*)bias.data,
         (const T*)(with_shortcut ? shortcut.data : nullptr), I(size), I(channels), I(channels_last ? 1 : inner));
  double error = 0;
  for (size_t i = begin; i < size; ++i)
    if (std::isnan(want[i - begin]))
      error = std::isnan(x[i]) ? error : NAN;
    else
      keep_largest(error, x[i], want[i - begin]);
  check(std::string("bias_relu ") + name_of<T> + " " + off, error, tolerance<T>);
}

// The last of `images` images, recoloured and moved.
template <int channels>
void test_dsa(int height, int width, DsaTransform t, size_t images = 2) {
  const int plane = height * width, size = channels * plane;
  const size_t last = images - 1;
  Tensor<float> x(images * size), y(images * size);
  x.fill(last * size, images * size);
  const DsaColour by{float(uniform()), float(uniform()) + 1, float(uniform()) / 2 + 1};
  std::vector<DsaColour> colours(images, {0, 1, 1});
  std::vector<DsaTransform> transforms(images, {1, 0, 0, 0, 1, 0});
  colours[last] = by, transforms[last] = t;
  const simt::Part part(dim3(last, 0), dim3(1));
  LAUNCH(dsa_kernel<channels>, images, kDsaThreads, 0, 0, (const float*)x.data, (const DsaColour*)colours.data(),
         (const DsaTransform*)transforms.data(), y.data, height, width);
  double mean = 0, error = 0;
  for (int i = 0; i < size; ++i) mean += x[last * size + i] / size;
  const double saturation = channels == 1 ? 1 : by.saturation;
  const auto at = [&](int row, int column, int c) {
    if (row < 0 || row >= height || column < 0 || column >= width) return 0.;
    double grey = 0;
    for (int k = 0; k < channels; ++k) grey += x[last * size + k * plane + row * width + column] / channels;
    const double value = x[last * size + c * plane + row * width + column] + by.brightness;
    const double saturated = (value - grey - by.brightness) * saturation + grey + by.brightness;
    return (saturated - mean - by.brightness) * by.contrast + mean + by.brightness;
  };
  for (int i = 0; i < plane; ++i) {
    const double row = i / width, column = i % width;
    const double u = t.a * column + t.b * row + t.c, v = t.d * column + t.e * row + t.f;
    const int left = int(floor(u)), top = int(floor(v));
    const double right = u - left, below = v - top;
    for (int c = 0; c < channels; ++c)
      keep_largest(error, y[last * size + c * plane + i],
                   (1 - below) * ((1 - right) * at(top, left, c) + right * at(top, left + 1, c)) +
                       below * ((1 - right) * at(top + 1, left, c) + right * at(top + 1, left + 1, c)));
  }
  check("dsa of " + std::to_string(channels) + " channels", error, 2e-5);
}

template <class T, class A = float>
void test_all_of() {
  for (const char* off : {"", "x", "pooled", "grad", "dx"}) test_norm_relu_pool<T, A, 32>(8, 16, off);
  for (const char* off : {"", "x"}) test_norm_relu_pool<T, A, kNormThreads>(32, 32, off);
  test_norm_relu_pool<T, A, 32>(5, 7);
  test_norm_relu_pool<T, A, 32>(4, 7);
  test_norm_relu_pool<T, A, kNormThreads>(3, 64);
  for (const char* off : {"", "x", "pooled", "grad", "dx"}) test_norm_relu_pool_last<T, A>(16, 1, 8, 8, off);
  test_norm_relu_pool_last<T, A>(96, 3, 5, 7);
  test_norm_relu_pool_last<T, A>(24, 2, 4, 7);
  test_norm_relu_pool_last<T, A>(9, 3, 7, 4);
  test_norm_relu_pool_last<T, A>(36, 3, 2, 2);  // of 12 channels, no whole packs of 8
  for (const char* off : {"", "x", "shortcut"}) test_bias_relu<T, A>(8, 16, false, true, off);
  for (const char* off : {"", "x", "bias"}) test_bias_relu<T, A>(16, 9, true, false, off);
  test_bias_relu<T, A>(3, 25, false, true);
}

template <class T>
void test_low_precision_of() {
  test_masked_sgd<T>({.1f, .9f, 0.f, .01f, false});
  test_masked_sgd<T>({.1f, .9f, .3f, .01f, true});
  for (int classes : {10, 45}) test_cross_entropy_top1<T>(classes);
  test_all_of<T>();
}

// Offsets that 32 bits do not hold, and the largest plane, at whose end an int still counts.
void test_huge_tensors() {
  test_masked_sgd_of_a_huge_tensor();
  test_combine<2>(2, kHuge + 404, true, "", 404);
  test_combine<0>(2, kHuge + 403, true, "", 403);
  test_cross_entropy_top1<Half>(3121, 65535);  // more than 2^32 logits
  test_norm_relu_pool<Half, float, 32>(16, 32, "", (1 << 24) + 17);  // more than 2^31 cells
  test_norm_relu_pool<Half, float, kNormThreads>(16, 32, "", (1 << 24) + 17);
  test_norm_relu_pool_last<Half, float>(32, 1, 16, 16, "", (1 << 18) + 3);  // more than 2^31 values
  test_dsa<4>(64, 64, {1, 0, .5f, 0, 1, .5f}, (1 << 17) + 2);
  test_bias_relu<Half, float, long long>(2, 1024, false, true, "", (1 << 20) + 1, 2048);
  test_bias_relu<Half, float, long long>(2, 1023, false, true, "", (1 << 20) + 2000, 2046);
  check("the largest plane", double(kLargestPlane) + kNormThreads * kPack<Half> <= INT_MAX ? 0 : 1, 0);
}

int main(int, char** arguments) {
  const int seeds = atoi(arguments[1]);
  for (int seed = 1; seed <= seeds; ++seed) {
    simt::seed = 2 * seed + 1;
    srand(seed);
    test_low_precision_of<float>();
    test_low_precision_of<Half>();
    test_low_precision_of<BFloat16>();
    test_all_of<double, double>();
    test_nan_passes_norm_relu_pool();
    test_cross_entropy_top1_without_loss("NaN", NAN, 3, 3, 1);  // on top, as in torch.argmax
    test_cross_entropy_top1_without_loss("-infinity alone", -INFINITY, -1, 0, 1);
    test_cross_entropy_top1_without_loss("a label too large", 0, 0, 5, 0);
    test_cross_entropy_top1_without_loss("a negative label", 0, 0, -1, 0);
    test_combine<2>(2, 1200, true);
    for (const char* off : {"states", "points", "keep"}) test_combine<2>(2, 404, true, off);
    test_combine<3>(3, 401, true);
    test_combine<4>(4, 404, false);
    test_combine<0>(5, 404, true);
    test_dsa<1>(9, 12, {1, 0, 3, 0, 1, -2});
    test_dsa<2>(8, 8, {-1, 0, 7, 0, 1, 0});
    test_dsa<3>(19, 17, {.97f, -.26f, 2.3f, .26f, .97f, -1.9f});
    test_dsa<4>(9, 12, {1.7f, .3f, -40.f, -.2f, 1.3f, 100.f});
  }
  test_huge_tensors();
  printf("%d failures\n", failures);
  return failures != 0;
}
