// Every kernel of csrc/kernels/ against a plain computation in double: several sizes with tails, misaligned tensors,
// float32, float16 and bfloat16, in several orders of threads. Arguments: how many orders (seeds) to run.
#define SIMT_CPU
#include "simt.h"
//
#include "../../csrc/kernels/bias_relu.cuh"
#include "../../csrc/kernels/combine.cuh"
#include "../../csrc/kernels/cross_entropy_top1.cuh"
#include "../../csrc/kernels/masked_sgd.cuh"
#include "../../csrc/kernels/norm_relu_pool.cuh"

using namespace lottery;

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

// A tensor on the heap that ends where its memory ends; `shift` elements behind a 16-byte boundary.
template <class T>
struct Tensor {
  char* memory;
  T* data;
  size_t size;

  explicit Tensor(size_t size, int shift = 0) : size(size) {
    memory = static_cast<char*>(malloc((size + shift) * sizeof(T)));
    data = reinterpret_cast<T*>(memory) + shift;
    for (size_t i = 0; i < size; ++i) data[i] = rounded<T>(uniform());
  }
  ~Tensor() { free(memory); }
  Tensor(const Tensor&) = delete;
  double operator[](size_t i) const { return value(data[i]); }
};

int failures = 0;

void check(const std::string& what, double error, double allowed) {
  if (error <= allowed) return;  // false for NaN
  printf("FAIL %s: error %g, allowed %g\n", what.c_str(), error, allowed);
  ++failures;
}

void keep_largest(double& error, double one, double other) {
  const double d = std::abs(one - other) / std::max(1., std::abs(other));
  if (!(d <= error)) error = d;
}

template <class T>
void test_masked_sgd(const SgdStep& step) {
  const std::vector<int> sizes = {1, 3, 8, 63, 1025, 4096, 4100, 64, 64};
  std::vector<Tensor<T>*> params, grads;
  std::vector<Tensor<float>*> momenta;
  std::vector<Tensor<unsigned char>*> masks;
  std::vector<std::vector<double>> want_p, want_m;
  SgdTensors<T> batch;
  batch.count = int(sizes.size());
  batch.first_block[0] = 0;
  for (int i = 0; i < batch.count; ++i) {
    const int n = sizes[i], shift = i == 7;  // one misaligned
    params.push_back(new Tensor<T>(n, shift));
    grads.push_back(new Tensor<T>(n));
    momenta.push_back(new Tensor<float>(n));
    masks.push_back(new Tensor<unsigned char>(n));
    want_p.emplace_back(n), want_m.emplace_back(n);
    const bool masked = i % 3 != 2;
    for (int j = 0; j < n; ++j) {
      const bool keep = (masks[i]->data[j] = rand() % 2);
      const double p = (*params[i])[j], g = (*grads[i])[j] + step.weight_decay * p;
      const double m = step.momentum * (*momenta[i])[j] + (1 - step.dampening) * g;
      const double update = step.nesterov ? g + step.momentum * m : m;
      want_p[i][j] = keep || !masked ? p - step.lr * update : 0;
      want_m[i][j] = keep || !masked ? m : 0;
    }
    batch.param[i] = params[i]->data, batch.grad[i] = grads[i]->data, batch.momentum[i] = momenta[i]->data;
    batch.mask[i] = masked ? masks[i]->data : nullptr;
    batch.size[i] = n;
    batch.first_block[i + 1] = batch.first_block[i] + (n + kSgdBlock - 1) / kSgdBlock;
  }
  LAUNCH(masked_sgd_kernel<T>, batch.first_block[batch.count], kSgdThreads, 0, 0, batch, step);
  double error = 0;
  for (int i = 0; i < batch.count; ++i)
    for (int j = 0; j < sizes[i]; ++j) {
      keep_largest(error, (*params[i])[j], want_p[i][j]);
      keep_largest(error, (*momenta[i])[j], want_m[i][j]);
      if (batch.mask[i] && !batch.mask[i][j] && ((*params[i])[j] != 0 || (*momenta[i])[j] != 0)) error = NAN;
    }
  check(std::string("masked_sgd ") + name_of<T>, error, tolerance<T>);
  for (int i = 0; i < batch.count; ++i) delete params[i], delete grads[i], delete momenta[i], delete masks[i];
}

template <int M>
void test_combine(int count, int size, int shift, bool masked) {
  const int total = 7, chunk = 3;
  Tensor<float> states(size_t(count) * size, shift), coefficients(total * count), points(size_t(total) * size);
  Tensor<unsigned char> keep(size);
  for (int i = 0; i < size; ++i) keep.data[i] = rand() % 2;
  LAUNCH(combine_kernel<M>, dim3(2, (total + chunk - 1) / chunk), kCombineThreads, chunk * count * sizeof(float), 0,
         points.data, (const float*)states.data, (const float*)coefficients.data,
         (const unsigned char*)(masked ? keep.data : nullptr), (long long)size, count, total, chunk);
  double error = 0;
  for (int k = 0; k < total; ++k)
    for (int i = 0; i < size; ++i) {
      double sum = 0;
      for (int m = 0; m < count; ++m) sum += coefficients[k * count + m] * states[size_t(m) * size + i];
      keep_largest(error, points[size_t(k) * size + i], masked && !keep.data[i] ? 0 : sum);
    }
  check("combine<" + std::to_string(M) + "> of " + std::to_string(size), error, tolerance<float>);
}

template <class T>
void test_cross_entropy_top1(int classes) {
  const int networks = 2, images = 21, blocks = 2;
  Tensor<T> logits(size_t(networks) * images * classes);
  Tensor<long long> labels(images);
  Tensor<double> sums(networks * blocks * 3);
  for (int b = 0; b < images; ++b) labels.data[b] = rand() % classes;
  for (int k = 0; k < networks; ++k) {  // ties: the first counts, whatever the lane it falls to
    T* row = logits.data + (k * images + 5) * classes;
    row[classes / 3] = row[classes - 1] = T(9.f);
  }
  labels.data[5] = classes / 3;
  LAUNCH(cross_entropy_top1_kernel<T>, dim3(blocks, networks), 32 * kLossWarps, 0, 0, (const T*)logits.data,
         (const long long*)labels.data, (long long)images, classes, sums.data);
  for (int k = 0; k < networks; ++k) {
    double want[3] = {}, error = 0;
    for (int b = 0; b < images; ++b) {
      const size_t row = (size_t(k) * images + b) * classes;
      double total = 0;
      int top = 0;
      for (int c = 0; c < classes; ++c) {
        total += exp(logits[row + c]);
        if (logits[row + c] > logits[row + top]) top = c;
      }
      const double loss = log(total) - logits[row + labels.data[b]];
      want[0] += loss, want[1] += loss * loss, want[2] += top == labels.data[b];
    }
    for (int i = 0; i < 3; ++i) keep_largest(error, sums[k * blocks * 3 + i] + sums[(k * blocks + 1) * 3 + i], want[i]);
    check(std::string("cross_entropy_top1 ") + name_of<T>, error, 1e-5);
  }
}

void test_cross_entropy_top1_of_nan_and_bad_label() {
  const int classes = 5;
  Tensor<float> logits(2 * classes);
  Tensor<long long> labels(2);
  Tensor<double> sums(3);
  logits.data[3] = NAN;  // on top, as in torch.argmax
  labels.data[0] = 3, labels.data[1] = classes;
  LAUNCH(cross_entropy_top1_kernel<float>, 1, 32 * kLossWarps, 0, 0, (const float*)logits.data,
         (const long long*)labels.data, 2ll, classes, sums.data);
  check("NaN and bad labels", std::isnan(sums[0]) && sums[2] == 1 ? 0 : 1, 0);
}

template <class T, class A, int kThreads>
void test_norm_relu_pool(int height, int width, int shift) {
  const int images = 3, channels = 3, planes = images * channels, size = height * width;
  const int pooled_size = height / 2 * (width / 2);
  const double eps = 1e-5;
  Tensor<T> x(size_t(planes) * size, shift), pooled(size_t(planes) * pooled_size), grad(size_t(planes) * pooled_size);
  Tensor<T> dx(size_t(planes) * size, shift);
  Tensor<A> weight(channels), bias(channels), mean(planes), rstd(planes), dweight(planes), dbias(planes);
  const unsigned blocks = kThreads == 32 ? (planes + kNormThreads / 32 - 1) / (kNormThreads / 32) : planes;
  LAUNCH((norm_relu_pool_kernel<T, A, kThreads>), blocks, kNormThreads, 0, 0, (const T*)x.data, (const A*)weight.data,
         (const A*)bias.data, pooled.data, mean.data, rstd.data, (long long)planes, channels, height, width, A(eps));
  LAUNCH((norm_relu_pool_backward_kernel<T, A, kThreads>), blocks, kNormThreads, 0, 0, (const T*)grad.data,
         (const T*)x.data, (const A*)weight.data, (const A*)bias.data, (const A*)mean.data, (const A*)rstd.data,
         dx.data, dweight.data, dbias.data, (long long)planes, channels, height, width);
  double error = 0, error_backward = 0;
  for (int p = 0; p < planes; ++p) {
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
  const std::string what = std::string(name_of<T>) + " " + std::to_string(height) + " x " + std::to_string(width);
  check("norm_relu_pool " + what, error, tolerance<T>);
  check("norm_relu_pool_backward " + what, error_backward, 4 * tolerance<T>);
}

template <class T, class A>
void test_bias_relu(int channels, int inner, bool channels_last, bool with_shortcut, int shift) {
  const int images = 2, size = images * channels * inner;
  Tensor<T> x(size, shift), bias(channels), shortcut(size, shift);
  std::vector<double> want(size);
  for (int i = 0; i < size; ++i)
    want[i] = std::max(0., x[i] + bias[(channels_last ? i : i / inner) % channels] + (with_shortcut ? shortcut[i] : 0));
  LAUNCH((bias_relu_kernel<T, A, unsigned>), 3, kBiasReluThreads, 0, 0, x.data, (const T*)bias.data,
         (const T*)(with_shortcut ? shortcut.data : nullptr), unsigned(size), unsigned(channels),
         unsigned(channels_last ? 1 : inner));
  double error = 0;
  for (int i = 0; i < size; ++i) keep_largest(error, x[i], want[i]);
  check(std::string("bias_relu ") + name_of<T>, error, tolerance<T>);
}

template <class T, class A = float>
void test_all_of() {
  for (int shift : {0, 1}) {
    test_norm_relu_pool<T, A, 32>(8, 16, shift);
    test_norm_relu_pool<T, A, kNormThreads>(32, 32, shift);
    test_bias_relu<T, A>(8, 16, false, true, shift);
    test_bias_relu<T, A>(16, 9, true, false, shift);
    test_bias_relu<T, A>(3, 25, shift, true, 0);
  }
  test_norm_relu_pool<T, A, 32>(5, 7, 0);
  test_norm_relu_pool<T, A, kNormThreads>(3, 64, 0);
}

template <class T>
void test_low_precision_of() {
  test_masked_sgd<T>({.1f, .9f, 0.f, .01f, false});
  test_masked_sgd<T>({.1f, .9f, .3f, .01f, true});
  for (int classes : {10, 45}) test_cross_entropy_top1<T>(classes);
  test_all_of<T>();
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
    test_cross_entropy_top1_of_nan_and_bad_label();
    test_combine<2>(2, 1200, 0, true);
    test_combine<2>(2, 1200, 1, false);
    test_combine<3>(3, 401, 0, true);
    test_combine<4>(4, 404, 0, false);
    test_combine<0>(5, 404, 0, true);
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
