// A B in float64 on a CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/product.h"

namespace kore_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
View<T> view(T* first, const Tensor& of) {
  return {first, of.size(0), of.size(1), of.stride(0), of.stride(1)};
}

void check(const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(A.dim() == 2 && B.dim() == 2 && A.size(1) == B.size(0) && A.is_cpu() && B.is_cpu() &&
                      A.scalar_type() == ScalarType::Double && B.scalar_type() == ScalarType::Double,
                  "product_native: want A (n, k) and B (k, m) in float64 on the CPU");
}

void multiply(const Tensor& A, const Tensor& B, Tensor& out, bool subtract) {
  const Product<double, double> product{view(static_cast<const double*>(A.const_data_ptr()), A),
                                        view(static_cast<const double*>(B.const_data_ptr()), B)};
  const auto to = view(static_cast<double*>(out.mutable_data_ptr()), out);
  if (subtract)
    multiply<double, double>("product_native", {product}, to,
                             [](double* place, int64_t, int64_t, double value) { *place -= value; });
  else
    multiply<double, double>("product_native", {product}, to,
                             [](double* place, int64_t, int64_t, double value) { *place = value; });
}

Tensor product_native_cpu(Tensor A, Tensor B) {
  check(A, B);
  Tensor out = torch::stable::new_empty(A, {A.size(0), B.size(1)});
  multiply(A, B, out, false);
  return out;
}

void subtract_product_native_cpu_(Tensor X, Tensor A, Tensor B) {
  check(A, B);
  STD_TORCH_CHECK(X.dim() == 2 && X.size(0) == A.size(0) && X.size(1) == B.size(1) && X.is_cpu() &&
                      X.scalar_type() == ScalarType::Double,
                  "subtract_product_native_: want X (n, m) in float64 on the CPU");
  multiply(A, B, X, true);
}

}  // namespace
}  // namespace kore_fast

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CPU, library) {
  library.impl("product_native", TORCH_BOX(&kore_fast::product_native_cpu));
  library.impl("subtract_product_native_", TORCH_BOX(&kore_fast::subtract_product_native_cpu_));
}
