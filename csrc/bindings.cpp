// The schemas of all dense ops of the namespace `lottery` and their CPU implementations; ops.py documents each beside
// its PyTorch reference. cuda/*.cu and cpu/sparse_conv.cpp register their own.
#include <Python.h>
#include <torch/library.h>

#include "cpu/ops.h"

// `import lottery_csrc` after `import torch` is one more way to load the ops. (pybind11 would double this file's
// compilation.)
PyMODINIT_FUNC PyInit_lottery_csrc() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "lottery_csrc", "Registers the ops of torch.ops.lottery.", -1};
  return PyModule_Create(&module);
}

TORCH_LIBRARY_FRAGMENT(lottery, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov) -> ()");
  m.def("combine_(Tensor(a!) points, Tensor states, Tensor coefficients, Tensor? keep) -> ()");
  m.def("cross_entropy_top1(Tensor logits, Tensor labels) -> Tensor");
  m.def("norm_relu_pool(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_relu_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_norm_relu_pool(Tensor x, Tensor kernel, Tensor weight, Tensor bias, int padding, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_norm_relu_pool_backward(Tensor grad, Tensor x, Tensor kernel, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor rstd, int padding) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_norm_relu_pool_points(Tensor x, Tensor kernels, Tensor coefficients, Tensor weight, Tensor bias, "
      "int padding, float eps) -> Tensor");
  m.def("conv3x3_kernel(Tensor kernel) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor kernel) -> Tensor");
  m.def("conv3x3_backward(Tensor grad, Tensor x, Tensor kernel) -> (Tensor, Tensor)");
  m.def("conv3x3_norm_relu_pool(Tensor x, Tensor kernel, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "batch_norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool relu, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor variance, bool relu, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_relu_(Tensor(a!) x, Tensor bias, Tensor? shortcut) -> ()");
}

TORCH_LIBRARY_IMPL(lottery, CPU, m) {
  m.impl("masked_sgd_", [](at::TensorList params, at::TensorList grads, at::TensorList momenta,
                           const c10::List<std::optional<at::Tensor>>& masks, double lr, double momentum,
                           double dampening, double weight_decay, bool nesterov) {
    lottery::masked_sgd_(params, grads, momenta, masks.vec(), lr, momentum, dampening, weight_decay, nesterov);
  });
  m.impl("combine_", &lottery::combine_);
  m.impl("cross_entropy_top1", &lottery::cross_entropy_top1);
  m.impl("norm_relu_pool", &lottery::norm_relu_pool);
  m.impl("norm_relu_pool_backward", &lottery::norm_relu_pool_backward);
  m.impl("conv_norm_relu_pool", &lottery::conv_norm_relu_pool);
  m.impl("conv_norm_relu_pool_backward", &lottery::conv_norm_relu_pool_backward);
  m.impl("conv_norm_relu_pool_points", &lottery::conv_norm_relu_pool_points);
  m.impl("conv3x3_kernel", &lottery::conv3x3_kernel);
  m.impl("conv3x3", &lottery::conv3x3);
  m.impl("conv3x3_backward", &lottery::conv3x3_backward);
  m.impl("conv3x3_norm_relu_pool", &lottery::conv3x3_norm_relu_pool);
  m.impl("batch_norm_relu", &lottery::batch_norm_relu);
  m.impl("batch_norm_relu_backward", &lottery::batch_norm_relu_backward);
  m.impl("bias_relu_", &lottery::bias_relu_);
}
