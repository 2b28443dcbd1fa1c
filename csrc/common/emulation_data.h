// What the tests of emulated kernels feed them: memory whose end may not be passed, and 16-bit numbers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda_bits.cuh"

namespace kore_fast {

// Elements right before a page that may not be touched: a read past the end stops the program.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count, size_t offset = 0) : bytes_((count + offset) * sizeof(T)) {
    page_ = size_t(sysconf(_SC_PAGESIZE));
    whole_ = (bytes_ + 31) / page_ * page_ + page_;
    constexpr int kAccess = PROT_READ | PROT_WRITE, kKind = MAP_PRIVATE | MAP_ANONYMOUS;
    base_ = static_cast<char*>(mmap(nullptr, whole_ + page_, kAccess, kKind, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + whole_, page_, PROT_NONE)) std::abort();
    std::memset(base_, 0xff, whole_);
    // Starts on 16 bytes plus the offset, so that the end is at most 15 bytes short of the guard.
    data_ = reinterpret_cast<T*>(base_ + (whole_ - bytes_) / 16 * 16) + offset;
  }
  ~Guarded() { munmap(base_, whole_ + page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* get() { return data_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  size_t bytes_, page_, whole_;
  char* base_;
  T* data_;
};

inline uint16_t narrow_to(Format format, float value) {
  if (format == Format::bf16) return float_to_bf16(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::abs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);
  return sign | uint16_t(((exponent + 13) << 10) + int(std::nearbyint(std::ldexp(fraction, 11))));
}

inline double widen(Format format, uint16_t bits) {
  if (format == Format::bf16) return bf16_to_float(bits);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(mantissa, -24)
                                      : std::ldexp(mantissa + 1024, exponent - 25);
  return bits >> 15 ? -size : size;
}

}  // namespace kore_fast
