// The schemas of all ops of the namespace `lottery`; ops.py documents each beside its PyTorch reference.
// cpu/*.cpp and cuda/*.cu register the implementations, so a back end is added by adding files.
#include <Python.h>
#include <torch/library.h>

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
  m.def("bias_relu_(Tensor(a!) x, Tensor bias, Tensor? shortcut) -> ()");
}
