// The Python module: importing it registers the CPU kernels; `build` says what was compiled and how.
// The torch dispatcher carries the operations themselves.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"

STABLE_TORCH_LIBRARY_FRAGMENT(kore_fast, library) {
  library.def(
      "covariance_update_native_(Tensor(a!) C, Tensor(b!) count, Tensor x, Tensor? mask, Tensor? scale) -> ()");
  // The same, but arguments that need checks or preparation in Python change nothing and give False.
  library.def(
      "covariance_update_if_ready_(Tensor(a!) C, Tensor(b!) count, Tensor x, Tensor? mask, Tensor? scale) -> bool");
  // L⁻¹ V (n, columns), or L⁻ᵀ V; of L (n, n) the lower triangle is read.
  library.def("solve_triangular_native(Tensor L, Tensor V, bool transposed) -> Tensor");
  // A B, or X −= A B, in float64.
  library.def("product_native(Tensor A, Tensor B) -> Tensor");
  library.def("subtract_product_native_(Tensor(a!) X, Tensor A, Tensor B) -> ()");
  // The parts of frozen_lora and its gradients, see kore_fast/ops/native/frozen_lora.py.
  library.def(
      "frozen_lora_forward_native(Tensor x, Tensor thinned, Tensor W, Tensor A, Tensor B, Tensor? bias, "
      "float scaling) -> Tensor[]");
  library.def("frozen_lora_backward_x_native(Tensor dy, Tensor W, Tensor A, Tensor B, float scaling) -> Tensor[]");
  library.def("frozen_lora_backward_b_native(Tensor dy, Tensor z, Tensor like, float scaling) -> Tensor");
  // C = P Q + scale · R S [+ bias] [+ C], rounded once; on CUDA.
  library.def(
      "frozen_lora_product_native_(Tensor(a!) C, Tensor P, Tensor Q, Tensor R, Tensor S, Tensor? bias, float scale, "
      "bool add) -> ()");
}

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native kernels of kore_fast; their operations are torch.ops.kore_fast.*";
  pybind11::dict build;
  build["compiler"] = KORE_FAST_COMPILER;
  build["torch_headers"] = KORE_FAST_TORCH;
  build["torch_abi"] = "2.11";
  build["cuda"] = KORE_FAST_CUDA_TOOLKIT;  // empty: built without
  build["cuda_architectures"] = KORE_FAST_CUDA_ARCHITECTURES;
  module.attr("build") = build;
  module.def("cpu_capability", &kore_fast::cpu_capability_name, "The instruction set that the CPU kernels use.");
}
