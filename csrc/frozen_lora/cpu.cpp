// A linear layer with a frozen-A LoRA on a CPU, forward and backward.
//
//   z = x Aᵀ          y  = [x | z] [W | s B]ᵀ + bias
//   u = s dy B        dx = [dy | u] [W ; A]          dB = s dyᵀ z
//
// The adapter's products continue the sums of the base's while these are in registers: y and dx are written once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/product.h"

namespace kore_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "frozen_lora";

template <typename E>
View<const E> view(const Tensor& of) {
  return {static_cast<const E*>(of.const_data_ptr()), of.size(0), of.size(1), of.stride(0), of.stride(1)};
}
template <typename E>
View<E> writable(Tensor& of) {
  return {static_cast<E*>(of.mutable_data_ptr()), of.size(0), of.size(1), of.stride(0), of.stride(1)};
}

// Sums of E in float (of double in double).
template <typename E>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename E>
void multiply(std::vector<Product<E, typename SumOf<E>::type>> products, Tensor& out, const E* bias = nullptr) {
  using T = typename SumOf<E>::type;
  if (bias == nullptr)
    kore_fast::multiply<E, T>(kName, std::move(products), writable<E>(out),
                              [](E* place, int64_t, int64_t, T value) { narrow(value, place); });
  else
    kore_fast::multiply<E, T>(
        kName, std::move(products), writable<E>(out),
        [bias](E* place, int64_t, int64_t j, T value) { narrow(value + static_cast<T>(widen(bias[j])), place); });
}

template <typename E>
void forward(const Tensor& x, const Tensor& thinned, const Tensor& W, const Tensor& A, const Tensor& B,
             const std::optional<Tensor>& bias, double scaling, Tensor& y, Tensor& z) {
  using T = typename SumOf<E>::type;
  multiply<E>({{view<E>(thinned), transposed(view<E>(A))}}, z);
  const E* const offset = bias ? static_cast<const E*>(bias->const_data_ptr()) : nullptr;
  multiply<E>({{view<E>(x), transposed(view<E>(W))},
               {view<E>(z), transposed(view<E>(B)), static_cast<T>(scaling)}},
              y, offset);
}

// dz, and dx, which is made from it.
template <typename E>
void backward_x(const Tensor& dy, const Tensor& W, const Tensor& A, const Tensor& B, double scaling, Tensor& dz,
                Tensor& dx) {
  using T = typename SumOf<E>::type;
  multiply<E>({{view<E>(dy), view<E>(B), static_cast<T>(scaling)}}, dz);
  multiply<E>({{view<E>(dy), view<E>(W)}, {view<E>(dz), view<E>(A)}}, dx);
}

template <typename E>
void backward_B(const Tensor& dy, const Tensor& z, double scaling, Tensor& dB) {
  using T = typename SumOf<E>::type;
  const std::vector<Product<E, T>> product{{transposed(view<E>(dy)), view<E>(z), static_cast<T>(scaling)}};
  if (dB.scalar_type() == ScalarType::Float)
    kore_fast::multiply<E, T>(kName, product, writable<float>(dB), [](float* place, int64_t, int64_t, T value) {
      *place = static_cast<float>(value);
    });
  else
    multiply<E>(product, dB);
}

void check(bool fits) {
  STD_TORCH_CHECK(fits, "frozen_lora_native: arguments that kore_fast.ops.frozen_lora would refuse; call that one");
}

bool matrix(const Tensor& of, int64_t rows, int64_t columns, ScalarType type) {
  return of.is_cpu() && of.dim() == 2 && of.size(0) == rows && of.size(1) == columns && of.scalar_type() == type;
}

// `run` with the element type of x.
template <typename Run>
void with_type(ScalarType type, Run run) {
  switch (type) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Half: return run(Half{});
    default: check(false);
  }
}

std::vector<Tensor> forward_native_cpu(Tensor x, Tensor thinned, Tensor W, Tensor A, Tensor B,
                                       std::optional<Tensor> bias, double scaling) {
  check(x.dim() == 2 && W.dim() == 2 && A.dim() == 2);
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = W.size(0), r = A.size(0);
  const ScalarType type = x.scalar_type();
  check(matrix(x, tokens, d_in, type) && matrix(thinned, tokens, d_in, type) && matrix(W, d_out, d_in, type) &&
        matrix(A, r, d_in, type) && matrix(B, d_out, r, type));
  check(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == d_out && bias->scalar_type() == type &&
                  bias->is_contiguous()));
  Tensor y = torch::stable::new_empty(x, {tokens, d_out}), z = torch::stable::new_empty(x, {tokens, r});
  if (tokens > 0)
    with_type(type, [&](auto element) {
      forward<decltype(element)>(x, thinned, W, A, B, bias, scaling, y, z);
    });
  return {y, z};
}

std::vector<Tensor> backward_x_native_cpu(Tensor dy, Tensor W, Tensor A, Tensor B, double scaling) {
  check(dy.dim() == 2 && W.dim() == 2 && A.dim() == 2);
  const int64_t tokens = dy.size(0), d_in = W.size(1), d_out = W.size(0), r = A.size(0);
  const ScalarType type = dy.scalar_type();
  check(matrix(dy, tokens, d_out, type) && matrix(W, d_out, d_in, type) && matrix(A, r, d_in, type) &&
        matrix(B, d_out, r, type));
  Tensor dx = torch::stable::new_empty(dy, {tokens, d_in}), dz = torch::stable::new_empty(dy, {tokens, r});
  if (tokens > 0)
    with_type(type, [&](auto element) { backward_x<decltype(element)>(dy, W, A, B, scaling, dz, dx); });
  return {dx, dz};
}

Tensor backward_b_native_cpu(Tensor dy, Tensor z, Tensor like, double scaling) {
  check(dy.dim() == 2 && z.dim() == 2);
  const ScalarType type = dy.scalar_type();
  check(matrix(dy, dy.size(0), dy.size(1), type) && matrix(z, dy.size(0), z.size(1), type) &&
        matrix(like, dy.size(1), z.size(1), like.scalar_type()) &&
        (like.scalar_type() == type || like.scalar_type() == ScalarType::Float));
  Tensor dB = torch::stable::new_empty(like, {dy.size(1), z.size(1)});
  with_type(type, [&](auto element) { backward_B<decltype(element)>(dy, z, scaling, dB); });
  return dB;
}

}  // namespace
}  // namespace kore_fast

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CPU, library) {
  library.impl("frozen_lora_forward_native", TORCH_BOX(&kore_fast::forward_native_cpu));
  library.impl("frozen_lora_backward_x_native", TORCH_BOX(&kore_fast::backward_x_native_cpu));
  library.impl("frozen_lora_backward_b_native", TORCH_BOX(&kore_fast::backward_b_native_cpu));
}
