// Where a tile's 16-byte chunks stand in shared memory, for ldmatrix and for wgmma.
#pragma once

#include "cuda_bits.cuh"

namespace kore_fast {

// Where chunk (row, chunk) of an operand's stage stands. All XOR a chunk's number with its row, so that the eight rows
// of an 8 × 8 matrix lie in different banks.
struct NarrowLayout {  // 64-byte rows: for ldmatrix
  static KF_DEVICE uint32_t at(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }
};

struct RowsLayout {  // 256-byte rows: for ldmatrix
  static constexpr int kPitch = 256;
  static KF_DEVICE uint32_t at(int row, int chunk) { return row * 256 + ((chunk ^ (row & 7)) << 4); }
};

template <int BK>
struct AtomsLayout {  // 64 columns of all rows, then the other 64: wgmma's MN-major 128-byte swizzle
  static constexpr int kPitch = 128;
  static KF_DEVICE uint32_t at(int row, int chunk) {
    return (chunk >> 3) * (BK * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  }
};

// Descriptors of wgmma operands (PTX ISA, "Matrix descriptor format", 128-byte swizzle): start address, leading and
// stride distance in units of 16 bytes.
// MN-major, in AtomsLayout: the next 64 columns are the leading distance away, the next 8 rows the stride.
template <int BK>
KF_DEVICE uint64_t descriptor_mn(uint32_t address) {
  constexpr uint64_t leading = BK * 128 / 16, stride = 8 * 128 / 16;
  return uint64_t((address & 0x3ffff) >> 4) | leading << 16 | stride << 32 | uint64_t(1) << 62;
}
// K-major, rows of 64 of k: the next 8 rows are the stride away; the leading distance counts for nothing.
KF_DEVICE uint64_t descriptor_k(uint32_t address) {
  constexpr uint64_t stride = 8 * 128 / 16;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | stride << 32 | uint64_t(1) << 62;
}

}  // namespace kore_fast
