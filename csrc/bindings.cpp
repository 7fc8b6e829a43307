// The Python module, the schemas of all ops of the namespace `lottery`, and their CPU implementations. cuda/*.cu, where
// they are compiled in, register their own. common/kernels/ops.py documents each op beside its PyTorch reference.
#include <pybind11/pybind11.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "cpu/ops.h"
#include "cpu/sparse/sparse_conv.h"

#define TEXT_OF(token) #token
#define TEXT(token) TEXT_OF(token)

// Loading this module registers the ops. common/kernels/build.py looks for `sources` in the file before it loads it.
PYBIND11_MODULE(lottery_csrc, m) {
  m.attr("version") = "1";
  m.attr("sources") = "lottery-sources:" TEXT(LOTTERY_SOURCES);
  m.attr("cuda") = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("lottery::masked_sgd_", "")
                       .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  m.def("instruction_set", [] { return lottery::sparse::kernels().instruction_set; });
}

TORCH_LIBRARY(lottery, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, Tensor lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov) -> ()");
  m.def("combine_(Tensor(a!) points, Tensor states, Tensor coefficients, Tensor? keep) -> ()");
  m.def("cross_entropy_top1(Tensor logits, Tensor labels) -> Tensor");
  m.def("norm_relu_pool(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_relu_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("norm_relu_pool_points(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
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
  m.def("dsa(Tensor images, Tensor colour, Tensor transform) -> Tensor");

  using lottery::sparse::SparseConv;
  m.class_<SparseConv>("SparseConv")
      .def(torch::init<const at::Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t>(), "",
           {torch::arg("mask"), torch::arg("height"), torch::arg("width"), torch::arg("halo"), torch::arg("stride"),
            torch::arg("padding")})
      .def("positions", [](const c10::intrusive_ptr<SparseConv>& conv) { return conv->positions(); });
  m.def("sparse_lanes() -> int", &lottery::sparse::lanes);
  m.def("sparse_blocked(Tensor x, int halo) -> Tensor");
  m.def("sparse_unblocked(Tensor y, int halo, int images) -> Tensor");
  m.def(
      "sparse_conv_forward(__torch__.torch.classes.lottery.SparseConv conv, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? gamma, Tensor? beta, Tensor? residual, int norm, float eps, bool relu, int pool, int halo, int images, "
      "bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sparse_conv_backward(__torch__.torch.classes.lottery.SparseConv conv, Tensor dy, Tensor x, Tensor y, Tensor z, "
      "Tensor mean, Tensor rstd, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, bool residual, int norm, "
      "bool relu, int pool, int halo, int images, bool wants_input) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lottery, CPU, m) {
  m.impl("masked_sgd_", &lottery::masked_sgd_);
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
  m.impl("dsa", &lottery::dsa);
  m.impl("sparse_blocked", &lottery::sparse::blocked);
  m.impl("sparse_unblocked", &lottery::sparse::unblocked);
  m.impl("sparse_conv_forward", &lottery::sparse::conv_forward);
  m.impl("sparse_conv_backward", &lottery::sparse::conv_backward);
}
