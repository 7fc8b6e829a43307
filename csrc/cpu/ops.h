// The dense ops of the CPU, for bindings.cpp to register, and how they lay out their results. Their files include
// neither torch/library.h nor ATen/ops/, which would add seconds to the compilation of each.
#pragma once
#include <tuple>

#include "../checks.h"

namespace lottery {

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                 at::ArrayRef<OptionalTensor> masks, const Tensor& lr, double momentum, double dampening,
                 double weight_decay, bool nesterov);
void combine_(Tensor points, const Tensor& states, const Tensor& coefficients, const OptionalTensor& keep);
Tensor cross_entropy_top1(const Tensor& logits, const Tensor& labels);
std::tuple<Tensor, Tensor, Tensor> norm_relu_pool(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  double eps);
std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const Tensor& bias, const Tensor& mean, const Tensor& rstd);
std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool(const Tensor& x, const Tensor& kernel, const Tensor& weight,
                                                       const Tensor& bias, int64_t padding, double eps);
std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool_backward(const Tensor& grad, const Tensor& x,
                                                                const Tensor& kernel, const Tensor& weight,
                                                                const Tensor& bias, const Tensor& mean,
                                                                const Tensor& rstd, int64_t padding);
Tensor conv_norm_relu_pool_points(const Tensor& x, const Tensor& kernels, const Tensor& coefficients,
                                  const Tensor& weight, const Tensor& bias, int64_t padding, double eps);
Tensor conv3x3_kernel(const Tensor& kernel);
Tensor conv3x3(const Tensor& x, const Tensor& kernel);
std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel);
Tensor conv3x3_norm_relu_pool(const Tensor& x, const Tensor& kernel, const Tensor& weight, const Tensor& bias,
                              double eps);
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   const OptionalTensor& residual, bool relu, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& x,
                                                                    const OptionalTensor& y, const Tensor& weight,
                                                                    const Tensor& bias, const Tensor& mean,
                                                                    const Tensor& variance, bool relu, double eps);
void bias_relu_(Tensor x, const Tensor& bias, const OptionalTensor& shortcut);
Tensor dsa(const Tensor& images, const Tensor& colour, const Tensor& transform);

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

// [N, C, H, W] with the channels innermost, of x's type
inline Tensor empty_channels_last(const Tensor& x, at::IntArrayRef sizes) {
  return x.new_empty({sizes[0], sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2});
}

}  // namespace lottery
