// Numbers as their bits, the same on a GPU and on a host.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KF_DEVICE __device__ __forceinline__
#define KF_HOST_DEVICE __host__ __device__ __forceinline__
#define KF_UNROLL _Pragma("unroll")
#define KF_NO_UNROLL _Pragma("unroll 1")
#else
#define KF_DEVICE inline
#define KF_HOST_DEVICE inline
#define KF_UNROLL
#define KF_NO_UNROLL
#endif

namespace kore_fast {

enum class Format { bf16, fp16 };  // of a tensor core's operands

constexpr int kChunk = 8;  // elements of a 16-byte chunk

KF_HOST_DEVICE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

KF_HOST_DEVICE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

KF_HOST_DEVICE float bf16_to_float(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

// Nearest, ties to even. A NaN stays one; an overflow becomes an infinity.
KF_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

KF_HOST_DEVICE float fp16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24: fp16's subnormals are fp32's normals
    return as_float(as_bits(magnitude) | sign);
  }
  return as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (mantissa << 13));
}

template <Format F>
KF_HOST_DEVICE float to_float(uint16_t bits) {
  return F == Format::bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

}  // namespace kore_fast
