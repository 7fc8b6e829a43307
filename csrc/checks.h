// The checks that the CPU and the CUDA launchers share. Each refuses with the offending value.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

// Runs a lambda with `scalar_t` = the element type, where double is not taken.
#define DISPATCH_FLOAT_OR_LOWER(type, name, ...)                                                        \
  AT_DISPATCH_SWITCH(type, name,                                                                        \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
#define DISPATCH_FLOATING(type, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, name, __VA_ARGS__)

namespace lottery {

using at::ceil_div;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The type a sum over elements of type `t` is taken in: double for double, else float.
inline at::ScalarType accumulation_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A mask's bytes: g++ makes no vectors of bool.
inline const uint8_t* bytes(const Tensor& mask) {
  return reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
}

inline bool is_floating(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16;
}

// One parameter of masked_sgd_ with its partners, all dense in the same memory order.
struct SgdTensor {
  Tensor param, grad, momentum, mask;
  Tensor strided_param, strided_momentum;  // where to copy the results back to, when the originals are not dense
};

inline std::vector<SgdTensor> check_masked_sgd(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                                               at::ArrayRef<OptionalTensor> masks, const Tensor& lr) {
  const size_t count = params.size();
  TORCH_CHECK(grads.size() == count && momenta.size() == count && masks.size() == count,
              "masked_sgd_: lists of equal length wanted, got ", count, " params, ", grads.size(), " grads, ",
              momenta.size(), " momenta, ", masks.size(), " masks");
  if (count)
    TORCH_CHECK(lr.scalar_type() == at::kFloat && lr.numel() == 1 && lr.device() == params[0].device(),
                "masked_sgd_: lr is one float32 number on ", params[0].device(), ", got ", lr.scalar_type(), " ",
                lr.sizes(), " on ", lr.device());
  std::vector<SgdTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &p = params[i], &g = grads[i], &m = momenta[i];
    const OptionalTensor& mask = masks[i];
    const auto type = p.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                "masked_sgd_: params are float32, float16 or bfloat16, param ", i, " is ", type);
    TORCH_CHECK(g.scalar_type() == type, "masked_sgd_: param ", i, " is ", type, ", its grad ", g.scalar_type());
    TORCH_CHECK(m.scalar_type() == at::kFloat, "masked_sgd_: momenta are float32, momentum ", i, " is ",
                m.scalar_type());
    TORCH_CHECK(g.sizes() == p.sizes() && m.sizes() == p.sizes(), "masked_sgd_: param ", i, " is ", p.sizes(),
                ", its grad ", g.sizes(), ", its momentum ", m.sizes());
    TORCH_CHECK(g.device() == p.device() && m.device() == p.device() && p.device() == params[0].device(),
                "masked_sgd_: param ", i, " is on ", p.device(), ", its grad on ", g.device(), ", its momentum on ",
                m.device(), ", the first param on ", params[0].device());
    if (mask) {
      TORCH_CHECK(mask->scalar_type() == at::kBool, "masked_sgd_: masks are bool, mask ", i, " is ",
                  mask->scalar_type());
      TORCH_CHECK(mask->sizes() == p.sizes(), "masked_sgd_: param ", i, " is ", p.sizes(), ", its mask ",
                  mask->sizes());
      TORCH_CHECK(mask->device() == p.device(), "masked_sgd_: param ", i, " is on ", p.device(), ", its mask on ",
                  mask->device());
    }
    if (p.numel() == 0) continue;
    SgdTensor t;
    t.param = p.is_non_overlapping_and_dense() ? p : p.contiguous();
    const auto in_order = [&](const Tensor& other) {
      if (other.strides() == t.param.strides()) return other;
      return other.new_empty_strided(t.param.sizes(), t.param.strides()).copy_(other);
    };
    t.grad = in_order(g);
    t.momentum = in_order(m);
    if (mask) t.mask = in_order(*mask);
    if (!t.param.is_same(p)) t.strided_param = p;
    if (!t.momentum.is_same(m)) t.strided_momentum = m;
    tensors.push_back(std::move(t));
  }
  return tensors;
}

inline void copy_back(const std::vector<SgdTensor>& tensors) {
  for (const auto& t : tensors) {
    if (t.strided_param.defined()) t.strided_param.copy_(t.param);
    if (t.strided_momentum.defined()) t.strided_momentum.copy_(t.momentum);
  }
}

inline void check_combine(const Tensor& points, const Tensor& states, const Tensor& coefficients,
                          const OptionalTensor& keep) {
  TORCH_CHECK(states.dim() == 2 && coefficients.dim() == 2 && points.dim() == 2,
              "combine_: points [K, P], states [M, P], coefficients [K, M] wanted, got ", points.sizes(), ", ",
              states.sizes(), ", ", coefficients.sizes());
  TORCH_CHECK(coefficients.size(1) == states.size(0) && points.size(0) == coefficients.size(0) &&
                  points.size(1) == states.size(1),
              "combine_: sizes do not fit, points ", points.sizes(), ", states ", states.sizes(), ", coefficients ",
              coefficients.sizes());
  TORCH_CHECK(states.size(0) > 0, "combine_: at least one state wanted, got none");
  for (const Tensor* t : {&points, &states, &coefficients}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat, "combine_: float32 wanted, got ", t->scalar_type());
    TORCH_CHECK(t->device() == points.device(), "combine_: points are on ", points.device(), ", others on ",
                t->device());
  }
  TORCH_CHECK(points.is_contiguous(), "combine_: points must be contiguous, their strides are ", points.strides());
  if (keep) {
    TORCH_CHECK(keep->dim() == 1 && keep->size(0) == states.size(1) && keep->scalar_type() == at::kBool,
                "combine_: keep is bool [", states.size(1), "], got ", keep->scalar_type(), " ", keep->sizes());
    TORCH_CHECK(keep->device() == points.device(), "combine_: points are on ", points.device(), ", keep on ",
                keep->device());
  }
}

inline void check_cross_entropy_top1(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 3 && labels.dim() == 1 && logits.size(1) == labels.size(0),
              "cross_entropy_top1: logits [K, B, C] and labels [B] wanted, got ", logits.sizes(), " and ",
              labels.sizes());
  TORCH_CHECK(logits.size(2) > 0, "cross_entropy_top1: logits of no class, ", logits.sizes());
  const auto type = logits.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
              "cross_entropy_top1: logits are float32, float16 or bfloat16, got ", type);
  TORCH_CHECK(labels.scalar_type() == at::kLong, "cross_entropy_top1: labels are int64, got ", labels.scalar_type());
  TORCH_CHECK(logits.device() == labels.device(), "cross_entropy_top1: logits are on ", logits.device(), ", labels on ",
              labels.device());
}

inline void check_norm(const char* op, const Tensor& x, int64_t channels, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(x.dim() == 4, op, ": x [N, C, H, W] wanted, got ", x.sizes());
  TORCH_CHECK(is_floating(x.scalar_type()), op, ": x is float32, float64, float16 or bfloat16, got ", x.scalar_type());
  const auto type = accumulation_type(x.scalar_type());
  for (const Tensor* t : {&weight, &bias}) {
    TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": weight and bias are [", channels, "], got ",
                t->sizes());
    TORCH_CHECK(t->scalar_type() == type, op, ": weight and bias are ", type, " for x of ", x.scalar_type(), ", got ",
                t->scalar_type());
    TORCH_CHECK(t->device() == x.device(), op, ": x is on ", x.device(), ", weight or bias on ", t->device());
  }
}

inline void check_norm_relu_pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_norm("norm_relu_pool", x, x.dim() == 4 ? x.size(1) : 0, weight, bias);
  TORCH_CHECK(x.size(2) >= 2 && x.size(3) >= 2, "norm_relu_pool: planes of at least 2 x 2 wanted, got ", x.sizes());
}

// K times as many channels as a row of weight has
inline void check_norm_relu_pool_points(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(weight.dim() == 2 && bias.sizes() == weight.sizes(),
              "norm_relu_pool_points: weight and bias [K, C] wanted, got ", weight.sizes(), " and ", bias.sizes());
  check_norm_relu_pool(x, weight.flatten(), bias.flatten());
}

// A tensor that goes with others: of this type and shape, on this device.
inline void check_like(const char* what, const Tensor& t, at::ScalarType type, at::IntArrayRef sizes,
                       at::Device device) {
  TORCH_CHECK(t.scalar_type() == type && t.sizes() == sizes && t.device() == device, what, " should be ", type, " ",
              sizes, " on ", device, ", got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

inline void check_norm_relu_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                          const Tensor& mean, const Tensor& rstd) {
  check_norm_relu_pool(x, weight, bias);
  const std::array<int64_t, 4> pooled = {x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2};
  check_like("norm_relu_pool_backward: grad", grad, x.scalar_type(), pooled, x.device());
  for (const Tensor* t : {&mean, &rstd})
    check_like("norm_relu_pool_backward: mean or rstd", *t, weight.scalar_type(), x.sizes().slice(0, 2), x.device());
}

// Returns the convolution's output height and width.
inline std::array<int64_t, 2> check_conv_norm_relu_pool(const Tensor& x, const Tensor& kernel, const Tensor& weight,
                                                        const Tensor& bias, int64_t padding) {
  TORCH_CHECK(kernel.dim() == 4, "conv_norm_relu_pool: kernel [C, I, h, w] wanted, got ", kernel.sizes());
  check_norm("conv_norm_relu_pool", x, kernel.size(0), weight, bias);
  TORCH_CHECK(kernel.size(1) == x.size(1) && kernel.scalar_type() == x.scalar_type() && kernel.device() == x.device(),
              "conv_norm_relu_pool: x is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ", kernel ",
              kernel.scalar_type(), " ", kernel.sizes(), " on ", kernel.device());
  TORCH_CHECK(padding >= 0, "conv_norm_relu_pool: padding of at least 0 wanted, got ", padding);
  const int64_t height = x.size(2) + 2 * padding - kernel.size(2) + 1,
                width = x.size(3) + 2 * padding - kernel.size(3) + 1;
  TORCH_CHECK(height >= 2 && width >= 2, "conv_norm_relu_pool: the convolution's output is ", height, " x ", width,
              ", at least 2 x 2 wanted");
  return {height, width};
}

inline std::array<int64_t, 2> check_conv_norm_relu_pool_backward(const Tensor& grad, const Tensor& x,
                                                                 const Tensor& kernel, const Tensor& weight,
                                                                 const Tensor& bias, const Tensor& mean,
                                                                 const Tensor& rstd, int64_t padding) {
  const auto plane = check_conv_norm_relu_pool(x, kernel, weight, bias, padding);
  const std::array<int64_t, 4> pooled = {x.size(0), kernel.size(0), plane[0] / 2, plane[1] / 2};
  const std::array<int64_t, 2> statistics = {x.size(0), kernel.size(0)};
  check_like("conv_norm_relu_pool_backward: grad", grad, x.scalar_type(), pooled, x.device());
  for (const Tensor* t : {&mean, &rstd})
    check_like("conv_norm_relu_pool_backward: mean or rstd", *t, weight.scalar_type(), statistics, x.device());
  return plane;
}

inline std::array<int64_t, 2> check_conv_norm_relu_pool_points(const Tensor& x, const Tensor& kernels,
                                                               const Tensor& coefficients, const Tensor& weight,
                                                               const Tensor& bias, int64_t padding) {
  TORCH_CHECK(kernels.dim() == 5 && (kernels.size(0) == 2 || kernels.size(0) == 3) && kernels.size(1) % 16 == 0,
              "conv_norm_relu_pool_points: kernels [2 or 3, C, I, h, w], C a multiple of 16, wanted, got ",
              kernels.sizes());
  const std::array<int64_t, 2> affine = {coefficients.size(0), kernels.size(1)};
  TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) == kernels.size(0) &&
                  weight.sizes() == at::IntArrayRef(affine) && bias.sizes() == at::IntArrayRef(affine),
              "conv_norm_relu_pool_points: coefficients [K, ", kernels.size(0), "], weight and bias [K, ",
              kernels.size(1), "] wanted, got ", coefficients.sizes(), ", ", weight.sizes(), " and ", bias.sizes());
  for (const Tensor* t : {&x, &kernels, &coefficients, &weight, &bias})
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->device().is_cpu(),
                "conv_norm_relu_pool_points: float32 on a CPU wanted, got ", t->scalar_type(), " on ", t->device());
  return check_conv_norm_relu_pool(x, kernels[0], weight[0], bias[0], padding);
}

inline void check_conv3x3_kernel(const Tensor& kernel) {
  TORCH_CHECK(kernel.dim() == 4 && kernel.size(2) == 3 && kernel.size(3) == 3,
              "conv3x3: kernel [O, I, 3, 3] wanted, got ", kernel.sizes());
  TORCH_CHECK(kernel.scalar_type() == at::kFloat, "conv3x3: float32 wanted, got ", kernel.scalar_type());
  TORCH_CHECK(kernel.size(0) % 16 == 0 && kernel.size(1) % 16 == 0,
              "conv3x3: channels in multiples of 16 wanted, got kernel ", kernel.sizes());
}

// `kernel`: [O, I, 3, 3], or what conv3x3_kernel makes of one.
inline void check_conv3x3(const Tensor& x, const Tensor& kernel) {
  TORCH_CHECK(x.dim() == 4, "conv3x3: x [N, I, H, W] wanted, got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "conv3x3: float32 wanted, got ", x.scalar_type());
  if (kernel.dim() != 3) check_conv3x3_kernel(kernel);
  TORCH_CHECK(kernel.scalar_type() == at::kFloat && (kernel.dim() == 3 ? kernel.size(2) == (x.size(1) + 1) * 16
                                                                      : kernel.size(1) == x.size(1)),
              "conv3x3: x is [N, I, H, W] ", x.sizes(), ", the kernel does not fit it: ", kernel.sizes());
}

inline void check_conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel) {
  check_conv3x3(x, kernel);
  TORCH_CHECK(kernel.dim() == 4, "conv3x3_backward: a transformed kernel has no gradient");
  const std::array<int64_t, 4> sizes = {x.size(0), kernel.size(0), x.size(2), x.size(3)};
  check_like("conv3x3_backward: grad", grad, at::kFloat, sizes, x.device());
}

inline void check_conv3x3_norm_relu_pool(const Tensor& x, const Tensor& kernel, const Tensor& weight,
                                         const Tensor& bias) {
  TORCH_CHECK(kernel.dim() == 3, "conv3x3_norm_relu_pool: a kernel from conv3x3_kernel wanted, got ", kernel.sizes());
  check_conv3x3(x, kernel);
  check_norm("conv3x3_norm_relu_pool", x, kernel.size(0) * 16, weight, bias);
  TORCH_CHECK(x.size(2) >= 2 && x.size(3) >= 2, "conv3x3_norm_relu_pool: planes of at least 2 x 2 wanted, got ",
              x.sizes());
}

// `added`: of x's shape, or none
inline void check_batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  const OptionalTensor& added) {
  check_norm("batch_norm_relu", x, x.dim() == 4 ? x.size(1) : 0, weight, bias);
  TORCH_CHECK(x.scalar_type() == at::kFloat, "batch_norm_relu: float32 wanted, got ", x.scalar_type());
  TORCH_CHECK(x.numel() > 0, "batch_norm_relu: no values to take statistics of, ", x.sizes());
  if (added)
    TORCH_CHECK(added->sizes() == x.sizes() && added->scalar_type() == at::kFloat,
                "batch_norm_relu: float32 ", x.sizes(), " wanted, got ", added->scalar_type(), " ", added->sizes());
}

inline void check_batch_norm_relu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& y,
                                           const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                           const Tensor& variance) {
  check_batch_norm_relu(x, weight, bias, y);
  check_like("batch_norm_relu_backward: grad", grad, at::kFloat, x.sizes(), x.device());
  for (const Tensor* t : {&mean, &variance})
    check_like("batch_norm_relu_backward: mean or variance", *t, at::kFloat, weight.sizes(), x.device());
}

inline void check_bias_relu(const Tensor& x, const Tensor& bias, const OptionalTensor& shortcut) {
  TORCH_CHECK(x.dim() == 4 && is_floating(x.scalar_type()), "bias_relu_: x floating [N, C, H, W] wanted, got ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast),
              "bias_relu_: x must be contiguous or channels_last, its strides are ", x.strides());
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.size(1) && bias.scalar_type() == x.scalar_type() &&
                  bias.device() == x.device(),
              "bias_relu_: bias is ", x.scalar_type(), " [", x.size(1), "] on ", x.device(), ", got ",
              bias.scalar_type(), " ", bias.sizes(), " on ", bias.device());
  if (shortcut)
    TORCH_CHECK(shortcut->sizes() == x.sizes() && shortcut->scalar_type() == x.scalar_type() &&
                    shortcut->device() == x.device(),
                "bias_relu_: shortcut is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ", got ",
                shortcut->scalar_type(), " ", shortcut->sizes(), " on ", shortcut->device());
}

inline void check_dsa(const Tensor& images, const Tensor& colour, const Tensor& transform) {
  TORCH_CHECK(images.dim() == 4 && images.size(1) >= 1 && images.size(1) <= 4 && images.scalar_type() == at::kFloat,
              "dsa: images float32 [N, 1 to 4 channels, H, W] wanted, got ", images.scalar_type(), " ", images.sizes());
  for (const auto& [part, name, columns] : {std::tuple{&colour, "colour", 3}, std::tuple{&transform, "transform", 6}})
    TORCH_CHECK(part->dim() == 2 && part->size(0) == images.size(0) && part->size(1) == columns &&
                    part->scalar_type() == at::kFloat && part->device() == images.device(),
                "dsa: ", name, " float32 [", images.size(0), ", ", columns, "] wanted, got ", part->scalar_type(), " ",
                part->sizes());
}

}  // namespace lottery
