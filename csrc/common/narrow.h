// Types of 16 bits: as float, and back.
#pragma once

#include <cstdint>
#include <cstring>

namespace kore_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace {  // each instruction set gets its own copy: the linker must not merge them

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float widen(Half value) {
  // Shift exponent and mantissa into place; the product puts the exponent's bias right, also for subnormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  float out;
  std::memcpy(&out, &magnitude, sizeof out);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, sizeof bits);
  bits |= sign;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// To the nearest, ties to even.
inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }
inline void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, Half* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x47800000) {  // 2^16 and up, infinities; a NaN stays one
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: added to 1/2, the last bits are multiples of 2^-24
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    std::memcpy(&half, &small, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace kore_fast
