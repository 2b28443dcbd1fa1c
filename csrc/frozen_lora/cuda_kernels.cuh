// Bodies of the frozen-A layer's kernels, written against a thin set of primitives P (threads, barriers, copies, matrix
// instructions). P is cuda_device.cuh's on a GPU and cuda_emulation.h's in the tests, which run this very source.
// What is computed, in what order and how exactly: see cuda.cu.
#pragma once

#include <cstdint>

#include "../common/cuda_bits.cuh"
#include "../common/cuda_layouts.cuh"

namespace kore_fast::frozen_lora {

enum class Load { async, copy };  // cp.async | through registers (rows that don't start on 16 bytes)
enum class Major { k, n };        // the index along which the right factors' elements are neighbours

constexpr int kBand = 8;  // rows of tiles that the schedule walks together

// A factor's rows in memory: of the left ones one an m; of the right ones one an n (Major::k) or one a k (Major::n).
struct Factor {
  const uint16_t* at;
  int64_t pitch;  // elements from row to row
};

// C (M, N) = P (M, K1) Q (K1, N) + scale · R (M, K2) S (K2, N) [+ bias (N)] [+ C], rounded once.
struct Product {
  Factor P, Q, R, S;
  uint16_t* C;
  int64_t C_row;         // elements from row to row
  const uint16_t* bias;  // or null
  float scale;
  bool add;              // to C's old values
  bool whole;            // C's rows are whole chunks that start on 16 bytes
  int M, N, K1, K2;
};

KF_HOST_DEVICE int over(int size, int part) { return (size + part - 1) / part; }

struct Tile {
  int i, j;  // in tiles
};

// Bands of kBand rows of tiles are walked column by column: blocks that run together share what they read.
KF_HOST_DEVICE Tile tile_of(int64_t id, int rows, int columns) {
  const int64_t top = id / (int64_t(kBand) * columns) * kBand, rest = id - top * columns;
  const int64_t height = rows - top < kBand ? rows - top : kBand;
  return {int(top + rest % height), int(rest / height)};
}

// ---- storing --------------------------------------------------------------------------------------------------------

template <Format F, class P>
KF_DEVICE uint32_t pack(P& p, float low, float high) {
  return F == Format::bf16 ? p.pack_bf16(low, high) : p.pack_fp16(low, high);
}

// Of four neighbouring lanes with four words each: lane q's word f becomes lane f's word q.
template <class P>
KF_DEVICE void transpose(P& p, uint32_t (&w)[4]) {
  const int q = p.thread() % 4;
  KF_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2)
    KF_UNROLL
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
      const bool upper = (q & bit) != 0;
      const uint32_t got = p.shuffle_xor(upper ? w[low] : w[low + bit], bit);
      if (upper)
        w[low] = got;
      else
        w[low + bit] = got;
    }
}

// Eight entries of a thread's row, v[2 f + e] at column first + 8 f + 2 q + e: as all matrix fragments have them, q the
// thread's place of the four that share the row. These exchange them, so that each stores 16 bytes, 64 together.
template <Format F, class P>
KF_DEVICE void store_row(P& p, const Product& a, int row, int first, float (&v)[8]) {
  const int q = p.thread() % 4;
  if (a.bias != nullptr) {
    KF_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int column = first + i / 2 * 8 + 2 * q + i % 2;
      if (column < a.N) v[i] += to_float<F>(a.bias[column]);
    }
  }
  uint16_t* const to = a.C + int64_t(row) * a.C_row + first;
  if (a.whole) {
    const bool inside = row < a.M && first + 8 * q < a.N;
    uint32_t words[4] = {0, 0, 0, 0};
    if (a.add) {
      if (inside) p.load_old16(to + 8 * q, words);
      transpose(p, words);
      KF_UNROLL
      for (int i = 0; i < 8; ++i) v[i] += to_float<F>(uint16_t(words[i / 2] >> i % 2 * 16));
    }
    KF_UNROLL
    for (int f = 0; f < 4; ++f) words[f] = pack<F>(p, v[2 * f], v[2 * f + 1]);
    transpose(p, words);
    if (inside) p.store_global16(to + 8 * q, words);
  } else {
    KF_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int column = i / 2 * 8 + 2 * q + i % 2;
      if (row >= a.M || first + column >= a.N) continue;
      if (a.add) v[i] += to_float<F>(to[column]);
      to[column] = uint16_t(pack<F>(p, v[i], 0.0f));
    }
  }
}

// ---- sm_80: mma.sync, every warp loads and multiplies ---------------------------------------------------------------

struct Sm80 {
  static constexpr int kThreads = 128, kTile = 128, kDepth = 32, kStages = 3;
  static constexpr int kOperandBytes = kTile * kDepth * 2, kStageBytes = 2 * kOperandBytes;
  static constexpr int kShared = kStages * kStageBytes;
};

// Brings ROWS × COLUMNS of a factor's rows in memory, from (row0, column0) on; zeros past its last row and column.
template <Load L, class Layout, int ROWS, int COLUMNS, class P>
KF_DEVICE void load_panel(P& p, uint32_t to, const Factor& factor, int row0, int rows, int column0, int columns) {
  constexpr int chunks = COLUMNS / kChunk;
  KF_UNROLL
  for (int i = 0; i < ROWS * chunks / Sm80::kThreads; ++i) {
    const int id = p.thread() + i * Sm80::kThreads, r = id / chunks, c = id % chunks;
    const int row = row0 + r, column = column0 + c * kChunk;
    const int left = row < rows && column < columns ? columns - column : 0, real = left < kChunk ? left : kChunk;
    const uint16_t* from = factor.at + (real ? row * factor.pitch + column : 0);
    const uint32_t at = to + Layout::at(r, c);
    if constexpr (L == Load::async) {
      p.cp_async16(at, from, real * 2);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
      KF_UNROLL
      for (int e = 0; e < kChunk; ++e)
        if (e < real) words[e / 2] |= uint32_t(from[e]) << e % 2 * 16;
      p.store_shared16(at, words);
    }
  }
}

template <class P, Format F, Load L, Major O>
KF_DEVICE void product_sm80(P& p, const Product& a) {
  using S = Sm80;
  constexpr int BK = S::kDepth;
  const Tile tile = tile_of(p.block_x(), over(a.M, S::kTile), over(a.N, S::kTile));
  const int row0 = tile.i * S::kTile, column0 = tile.j * S::kTile;
  const int small = over(a.K2, BK), steps = small + over(a.K1, BK);  // the small product comes first
  const uint32_t base = p.shared();

  const int lane = p.thread() % 32, warp = p.thread() / 32;
  const int warp_m = warp / 2 * 64, warp_n = warp % 2 * 64;  // a warp's 64 × 64 of the tile
  // Rows of four 8 × 8 matrices that ldmatrix's lanes name: left (m, k), (m+8, k), (m, k+8), (m+8, k+8); right
  // (k, n), (k+8, n), (k, n+8), (k+8, n+8), of which Major::n has a row of memory for each k and wants them turned.
  const int a_row = warp_m + lane % 16, a_chunk = lane / 16;
  const int n_row = warp_n + lane % 8 + lane / 16 * 8, n_chunk = lane / 8 % 2;
  const int k_row = lane % 16, k_chunk = warp_n / kChunk + lane / 16;

  const auto load = [&](int step) {
    const uint32_t at = base + step % S::kStages * S::kStageBytes;
    const bool first = step < small;
    const int k = (first ? step : step - small) * BK, K = first ? a.K2 : a.K1;
    const Factor left{first ? a.R.at : a.P.at, first ? a.R.pitch : a.P.pitch};
    const Factor right{first ? a.S.at : a.Q.at, first ? a.S.pitch : a.Q.pitch};
    load_panel<L, NarrowLayout, S::kTile, BK>(p, at, left, row0, a.M, k, K);
    if constexpr (O == Major::k)
      load_panel<L, NarrowLayout, S::kTile, BK>(p, at + S::kOperandBytes, right, column0, a.N, k, K);
    else
      load_panel<L, RowsLayout, BK, S::kTile>(p, at + S::kOperandBytes, right, k, K, column0, a.N);
  };

  float acc[4][8][4];
  KF_UNROLL
  for (int m = 0; m < 4; ++m)
    KF_UNROLL
    for (int n = 0; n < 8; ++n)
      KF_UNROLL
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;

  KF_NO_UNROLL
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load(step);
    p.cp_async_commit();
  }
  KF_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    p.template cp_async_wait<S::kStages - 2>();
    p.sync();  // this step's stage is there for all, and the one before it is free
    if (step + S::kStages - 1 < steps) load(step + S::kStages - 1);
    p.cp_async_commit();

    const uint32_t left = base + step % S::kStages * S::kStageBytes, right = left + S::kOperandBytes;
    KF_UNROLL
    for (int k = 0; k < BK; k += 16) {
      uint32_t b[4][4];
      KF_UNROLL
      for (int n = 0; n < 4; ++n) {
        if constexpr (O == Major::k)
          p.ldmatrix(right + NarrowLayout::at(n_row + n * 16, n_chunk + k / kChunk), b[n]);
        else
          p.ldmatrix_trans(right + RowsLayout::at(k_row + k, k_chunk + n * 2), b[n]);
      }
      KF_UNROLL
      for (int m = 0; m < 4; ++m) {
        uint32_t fragment[4];
        p.ldmatrix(left + NarrowLayout::at(a_row + m * 16, a_chunk + k / kChunk), fragment);
        KF_UNROLL
        for (int n = 0; n < 8; ++n)
          p.template mma<F>(acc[m][n], fragment, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    if (step + 1 == small) {
      KF_UNROLL
      for (int m = 0; m < 4; ++m)
        KF_UNROLL
        for (int n = 0; n < 8; ++n)
          KF_UNROLL
          for (int e = 0; e < 4; ++e) acc[m][n][e] *= a.scale;
    }
  }

  KF_UNROLL
  for (int m = 0; m < 4; ++m)
    KF_UNROLL
    for (int h = 0; h < 2; ++h)  // rows 8 apart
      KF_UNROLL
      for (int g = 0; g < 2; ++g) {
        float v[8];
        KF_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = acc[m][4 * g + i / 2][2 * h + i % 2];
        store_row<F>(p, a, row0 + warp_m + m * 16 + h * 8 + lane / 4, column0 + warp_n + g * 32, v);
      }
}

// ---- sm_90a: clusters of two blocks; one thread of each orders from the copy engine, two warpgroups multiply ---

// A cluster's blocks own tiles below each other, of kTile × TN. Each brings its rows of the left factor, and half of
// the right one's tile to both.
template <int TN>
struct Sm90 {
  static constexpr int kThreads = 384, kTile = 128, kDepth = 64, kStages = TN == 256 ? 4 : 6;
  static constexpr int kLeftBytes = kTile * kDepth * 2, kRightBytes = TN * kDepth * 2;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kBarriers = 1024, kShared = kBarriers + kStages * kStageBytes;
  static constexpr int kConsumerWarps = 8, kCluster = 2;
};

// Boxes that the copy engine brings: rows of a factor's memory, of 64 elements.
constexpr int kBoxColumns = 64;
constexpr int kLeftBoxRows = 128;
template <int TN, Major O>
constexpr int kRightBoxRows = O == Major::k ? TN / 2 : Sm90<TN>::kDepth;

// The factors as the copy engine knows them.
template <class Map>
struct Maps {
  Map P, Q, R, S;
};

// Pairs of tiles, one below the other, that a product has.
KF_HOST_DEVICE int64_t pair_count(const Product& a, int TN) { return int64_t(over(a.M, 2 * 128)) * over(a.N, TN); }

// The width of tiles that takes less time: rounds of clusters times a tile's columns. A narrow tile reads more for what
// it multiplies, and is put at an eighth more of its time (arithmetic on bytes a step, 32 KB to 24 KB for half the
// products, of which the cache's bandwidth bears most; not measured).
KF_HOST_DEVICE int tile_columns(const Product& a, int processors) {
  const int clusters = processors / 2;
  const int64_t wide = (pair_count(a, 256) + clusters - 1) / clusters * 16;
  const int64_t narrow = (pair_count(a, 128) + clusters - 1) / clusters * 9;
  return wide <= narrow ? 256 : 128;
}

template <class P, Format F, Major O, int TN>
KF_DEVICE void product_sm90(P& p, const Product& a, const Maps<typename P::TensorMap>& maps) {
  using S = Sm90<TN>;
  constexpr int BK = S::kDepth;
  const uint32_t full = p.shared(), empty = full + S::kStages * 8, base = full + S::kBarriers;
  const int rank = p.cluster_rank();
  const int rows = over(a.M, 2 * S::kTile), columns = over(a.N, TN);  // of pairs of tiles
  const int64_t pairs = int64_t(rows) * columns, cluster = p.block_x() / S::kCluster;
  const int64_t clusters = p.blocks() / S::kCluster;
  // Steps of the two products; the small one comes first.
  const auto steps_of = [&](int part) { return over(part == 0 ? a.K2 : a.K1, BK); };
  if (p.thread() == 0)
    for (int stage = 0; stage < S::kStages; ++stage) {
      p.barrier_init(full + stage * 8, 1);
      p.barrier_init(empty + stage * 8, S::kConsumerWarps * S::kCluster);
    }
  p.cluster_sync();

  uint32_t count = 0;  // steps of all tiles so far
  if (p.thread() < 128) {
    p.template registers_down<40>();
    if (p.thread() == 0) {
      KF_NO_UNROLL
      for (int64_t id = cluster; id < pairs; id += clusters) {
        const Tile tile = tile_of(id, rows, columns);
        const int row = (tile.i * S::kCluster + rank) * S::kTile, column = tile.j * TN;
        KF_NO_UNROLL
        for (int part = 0; part < 2; ++part) {
          const typename P::TensorMap &left = part ? maps.P : maps.R, &right = part ? maps.Q : maps.S;
          KF_NO_UNROLL
          for (int step = 0, steps = steps_of(part); step < steps; ++step, ++count) {
            const uint32_t stage = count % S::kStages, round = count / S::kStages;
            // Free in both blocks: what this one brings goes to both.
            if (round > 0) p.barrier_wait_cluster(empty + stage * 8, (round - 1) % 2);
            const uint32_t at = base + stage * S::kStageBytes, ready = full + stage * 8;
            p.barrier_expect(ready, S::kStageBytes);
            p.load_tile(at, left, step * BK, row, ready);
            if constexpr (O == Major::k) {
              const int half = rank * (TN / 2);
              p.load_tile_to_all(at + S::kLeftBytes + half * (BK * 2), right, step * BK, column + half, ready);
            } else {
              KF_UNROLL
              for (int i = 0; i < TN / 128; ++i) {
                const int box = rank * (TN / 128) + i;
                p.load_tile_to_all(at + S::kLeftBytes + box * (BK * 128), right, column + box * kBoxColumns, step * BK,
                                   ready);
              }
            }
          }
        }
      }
    }
  } else {
    p.template registers_up<232>();
    const int half = p.thread() / 128 - 1;  // of the tile's rows
    const int lane = p.thread() % 32, warp = p.thread() / 32 % 4;
    const auto release = [&](uint32_t step) {
      if (lane < S::kCluster) p.barrier_arrive_at(empty + step % S::kStages * 8, lane);
    };
    KF_NO_UNROLL
    for (int64_t id = cluster; id < pairs; id += clusters) {
      const Tile tile = tile_of(id, rows, columns);
      float acc[TN / 2];
      KF_UNROLL
      for (int e = 0; e < TN / 2; ++e) acc[e] = 0.0f;
      KF_NO_UNROLL
      for (int part = 0; part < 2; ++part) {
        KF_NO_UNROLL
        for (int step = 0, steps = steps_of(part); step < steps; ++step, ++count) {
          const uint32_t stage = count % S::kStages;
          p.barrier_wait(full + stage * 8, count / S::kStages % 2);
          const uint32_t left = base + stage * S::kStageBytes + half * (64 * BK * 2);
          const uint32_t right = base + stage * S::kStageBytes + S::kLeftBytes;
          p.wgmma_hold(acc);
          p.wgmma_fence();
          KF_UNROLL
          for (int k = 0; k < BK; k += 16)
            p.template wgmma<F, false, O == Major::n>(
                acc, descriptor_k(left + k * 2),
                O == Major::n ? descriptor_mn<BK>(right + k * 128) : descriptor_k(right + k * 2), true);
          p.wgmma_commit();
          if (step > 0) {
            p.template wgmma_wait<1>();
            release(count - 1);
          }
        }
        p.template wgmma_wait<0>();
        p.wgmma_hold(acc);
        release(count - 1);
        if (part == 0) {
          KF_UNROLL
          for (int e = 0; e < TN / 2; ++e) acc[e] *= a.scale;
        }
      }
      const int row = (tile.i * S::kCluster + rank) * S::kTile + half * 64 + warp * 16 + lane / 4;
      KF_UNROLL
      for (int g = 0; g < TN / 32; ++g)
        KF_UNROLL
        for (int h = 0; h < 2; ++h) {
          float v[8];
          KF_UNROLL
          for (int i = 0; i < 8; ++i) v[i] = acc[(4 * g + i / 2) * 4 + 2 * h + i % 2];
          store_row<F>(p, a, row + h * 8, tile.j * TN + g * 32, v);
        }
    }
  }
  p.cluster_sync();  // neither block ends while the other may still write into it or arrive at its barriers
}

}  // namespace kore_fast::frozen_lora
