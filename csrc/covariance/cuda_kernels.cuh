// Bodies of the covariance kernels, written against a thin set of primitives P (threads, barriers, copies, matrix
// instructions). P is cuda_device.cuh's on a GPU and cuda_emulation.h's in the tests, which run this very source.
// What is computed, in what order and how exactly: see cuda.cu.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cuda_bits.cuh"
#include "../common/cuda_layouts.cuh"

namespace kore_fast::covariance {

enum class Load { async, copy, weighted };          // cp.async | through registers (unaligned x) | w·x split in parts
enum class Scale { none, fp16, bf16, fp32, fp64 };  // dtype of the weights
enum State : uint8_t { dropped = 0, kept = 1, nonfinite = 2 };

constexpr int kTile = 128;              // a block owns kTile × kTile of C
constexpr int kChunks = kTile / kChunk; // chunks of a row of a tile
constexpr int kFlush = 128;             // products that the tensor cores' accumulators hold at most
constexpr int kBand = 8;                // rows of tiles that the schedule walks together

// A product that the compiler may not fuse with a later sum.
KF_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// ---- rows: which are kept, with which weight ------------------------------------------------------------------------

struct Rows {
  const uint16_t* x;         // (groups, rows, d), columns contiguous
  int64_t x_group, x_row;    // strides, elements
  int64_t groups, rows;
  int d;
  bool aligned;              // every row starts on 16 bytes
  uint16_t exponent;         // bits that are all set in an infinity or a NaN
  const uint8_t* mask;       // (groups, rows) contiguous integers of mask_bytes each, or null
  int mask_bytes;
  const void* scale;         // (groups, rows) contiguous, or null
  Scale scale_kind;
  bool narrow;               // C is fp32: a weight counts as fp32 sees it
  uint8_t* state;            // (groups, rows)
  int32_t* index;            // (groups, rows): the rows kept, in order
  float* weight;             // (groups, rows): their weights, where there is a scale
  int32_t* kept;             // (groups): how many
  double* count;             // (groups, 3), added to
};

KF_DEVICE double weight_of(const Rows& a, int64_t row) {
  double w = 1.0;
  if (a.scale_kind == Scale::fp16) w = fp16_to_float(static_cast<const uint16_t*>(a.scale)[row]);
  if (a.scale_kind == Scale::bf16) w = bf16_to_float(static_cast<const uint16_t*>(a.scale)[row]);
  if (a.scale_kind == Scale::fp32) w = static_cast<const float*>(a.scale)[row];
  if (a.scale_kind == Scale::fp64) w = static_cast<const double*>(a.scale)[row];
  return a.narrow ? double(float(w)) : w;
}

// One warp a row: is it wanted, is it finite.
template <class P>
KF_DEVICE void row_states(P& p, const Rows& a) {
  const int warps = p.threads() / 32, lane = p.thread() % 32;
  const int64_t row = int64_t(p.block_x()) * warps + p.thread() / 32;
  if (row >= a.groups * a.rows) return;  // whole warps
  bool wanted = true;
  for (int b = 0; a.mask != nullptr && b < a.mask_bytes; ++b) {
    if (b == 0) wanted = false;
    wanted |= a.mask[row * a.mask_bytes + b] != 0;
  }
  bool bad = false;
  if (a.scale_kind != Scale::none) {
    const double w = weight_of(a, row);
    wanted &= w != 0.0;
    bad = !(w > 0.0 && w < double(INFINITY));  // also not a number
  }
  if (wanted) {
    const uint16_t* x = a.x + (row / a.rows) * a.x_group + (row % a.rows) * a.x_row;
    const int whole = a.aligned ? a.d / kChunk : 0;
    KF_NO_UNROLL
    for (int first = lane; first < whole; first += 32 * 4) {
      uint32_t words[4][4];
      KF_UNROLL
      for (int i = 0; i < 4; ++i)
        if (first + 32 * i < whole) p.load_global16(x + (first + 32 * i) * kChunk, words[i]);
      KF_UNROLL
      for (int i = 0; i < 4; ++i)
        KF_UNROLL
        for (int w = 0; w < 4; ++w)
          if (first + 32 * i < whole)
            bad |= (words[i][w] & a.exponent) == a.exponent || ((words[i][w] >> 16) & a.exponent) == a.exponent;
    }
    for (int column = whole * kChunk + lane; column < a.d; column += 32)
      bad |= (x[column] & a.exponent) == a.exponent;
  }
  const bool any_bad = p.ballot(bad) != 0;
  if (lane == 0) a.state[row] = !wanted ? dropped : any_bad ? nonfinite : kept;
}

constexpr int row_lists_shared(int threads) { return threads * 8 + (threads / 32) * 8; }

// One block a group: lists the rows kept, in order, and adds to the counts, in an order that depends on nothing.
template <class P>
KF_DEVICE void row_lists(P& p, const Rows& a) {
  const int threads = p.threads(), warps = threads / 32;
  const int t = p.thread(), lane = t % 32, warp = t / 32;
  const int64_t first = int64_t(p.block_x()) * a.rows;
  const uint32_t sums = p.shared(), totals = sums + threads * 8;
  int before = 0, bad = 0;  // the same in every thread
  double weight = 0.0;      // of this thread's rows
  for (int64_t start = 0; start < a.rows; start += threads) {
    const int64_t row = start + t;
    const int state = row < a.rows ? a.state[first + row] : uint8_t(dropped);
    const uint32_t keeps = p.ballot(state == kept), bads = p.ballot(state == nonfinite);
    if (lane == 0) {
      p.store_shared32(totals + warp * 8, p.count_bits(keeps));
      p.store_shared32(totals + warp * 8 + 4, p.count_bits(bads));
    }
    p.sync();
    int position = before + p.count_bits(keeps & ((1u << lane) - 1u));
    for (int w = 0; w < warps; ++w) {
      const int total = p.load_shared32(totals + w * 8);
      if (w < warp) position += total;
      before += total;
      bad += p.load_shared32(totals + w * 8 + 4);
    }
    if (state == kept) {
      a.index[first + position] = int32_t(row);
      const double w = weight_of(a, first + row);
      weight += w;
      if (a.scale_kind != Scale::none) a.weight[first + position] = float(w);
    }
    p.sync();
  }
  p.store_shared_double(sums + t * 8, weight);
  p.sync();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (t < half) p.store_shared_double(sums + t * 8, p.load_shared_double(sums + t * 8) +
                                                          p.load_shared_double(sums + (t + half) * 8));
    p.sync();
  }
  if (t == 0) {
    double* count = a.count + int64_t(p.block_x()) * 3;
    a.kept[p.block_x()] = before;
    count[0] += before;
    count[1] += p.load_shared_double(sums);
    count[2] += bad;
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------

struct Product {
  const uint16_t* x;       // (groups, rows, d), columns contiguous
  int64_t x_group, x_row;  // strides, elements
  int64_t rows;            // of a group: stride of index and weight
  int d;
  const int32_t* index;
  const float* weight;
  const int32_t* kept;
  void* C;                 // (groups, d, d)
  int64_t C_group, C_row;  // strides, elements
  int splits;              // blocks that share a tile's rows, where there are few tiles
  double* partial;         // with more than one: (groups, tiles, splits, kValues, kWorkers), then summed in order
};

constexpr int kWorkers = 256, kValues = 64;  // threads of a block that hold the tile, entries that each holds
constexpr int kPart = 16;                    // entries of a thread that are added to C together

struct Tile {
  int i, j;  // in tiles; i ≥ j
};

KF_HOST_DEVICE int64_t tile_count(int d) {
  const int64_t n = (d + kTile - 1) / kTile;
  return n * (n + 1) / 2;
}

// The row of the triangle 0 | 1 2 | 3 4 5 | … that holds entry id. The square root is only a guess: integers decide.
KF_HOST_DEVICE int64_t triangle_row(int64_t id) {
  int64_t row = int64_t((sqrtf(8.0f * float(id) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > id) --row;
  while ((row + 1) * (row + 2) / 2 <= id) ++row;
  return row;
}

// Tile of a linear id. Bands of kBand rows are walked column by column, so that blocks that run together read few
// panels of x: first the band's rectangle left of the diagonal, then its small triangle.
KF_HOST_DEVICE Tile tile_of(int64_t id, int d) {
  const int64_t n = (d + kTile - 1) / kTile;
  const int64_t top = triangle_row(id) / kBand * kBand;
  const int64_t height = n - top < kBand ? n - top : kBand;
  int64_t rest = id - top * (top + 1) / 2;
  if (rest < top * height) return {int(top + rest % height), int(rest / height)};
  rest -= top * height;
  const int64_t row = triangle_row(rest);
  return {int(top + row), int(top + rest - row * (row + 1) / 2)};
}

// How many blocks share a tile: the fewest waves of blocks times what a block takes. Sharing costs a round trip of the
// tile through memory, put at the time of 1400 rows (arithmetic: 256 KB at 4.3 TB/s over 132 multiprocessors; not
// measured).
KF_HOST_DEVICE int split_count(int64_t tiles, int64_t rows, int processors) {
  constexpr int64_t kRoundTrip = 1400, kFewest = 512;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= 16 && (splits == 1 || rows / splits >= kFewest); ++splits) {
    const int64_t waves = (tiles * splits + processors - 1) / processors;
    const int64_t cost = waves * ((rows + splits - 1) / splits + (splits > 1 ? kRoundTrip : 0));
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// Kept rows of one of a tile's blocks: [begin, end), multiples of BK but for the last.
struct Share {
  int begin, end;
};

KF_HOST_DEVICE Share share_of(int kept, int split, int splits, int step) {
  const int64_t steps = (kept + step - 1) / step;
  const int64_t begin = steps * split / splits * step, end = steps * (split + 1) / splits * step;
  return {int(begin), end < kept ? int(end) : kept};
}

// Products that a step of BK rows takes: one; with weights, w·x (three bf16 parts) times x (fp16 x: two bf16 parts),
// without the terms below 2^-26 of the whole.
template <Format F, Load L>
constexpr int kTerms = L != Load::weighted ? 1 : F == Format::bf16 ? 3 : 5;

// Weighted operands are bf16 whatever x is: w·x need not lie in fp16's range.
template <Format F, Load L>
constexpr Format kOperand = L == Load::weighted ? Format::bf16 : F;

// Part 0, 1 or 2 of value + rest: the bf16 nearest to it, to what is left, to what is left of that.
KF_DEVICE uint16_t part_of(float value, float rest, int part) {
  const uint16_t high = float_to_bf16(value);
  if (part == 0) return high;
  const float left = value - bf16_to_float(high);  // exact
  const uint16_t middle = float_to_bf16(left);
  if (part == 1) return middle;
  return float_to_bf16((left - bf16_to_float(middle)) + rest);
}

template <Format F>
KF_DEVICE uint16_t left_part(uint16_t x, float weight, int part) {
  const float value = to_float<F>(x), p = product(weight, value);
  return part_of(p, fmaf(weight, value, -p), part);
}

template <Format F>
KF_DEVICE uint16_t right_part(uint16_t x, int part) {
  return F == Format::bf16 ? x : part_of(fp16_to_float(x), 0.0f, part);
}

// Brings BK kept rows of the two column panels of a tile into shared memory. Rows past the last and columns past d are
// zeros there; rows that were not kept are never read.
template <class P, Format F, Load L, int BK, int THREADS, class Layout>
struct Loader {
  static constexpr int kPer = BK * kChunks / THREADS;
  static constexpr int kRows = THREADS / kChunks;
  static_assert(kRows % 8 == 0, "rows that a thread loads share a swizzle");

  const uint16_t* x;
  const int32_t* index;
  const float* weight;
  int64_t x_row;
  int d, kept, row, chunk, column_a, column_b;
  bool diagonal;
  int32_t source[kPer];  // rows of x of the next step, asked for one step ahead; -1 past the end

  KF_DEVICE Loader(const Product& a, int group, Tile tile, Share share, int t)
      : x(a.x + group * a.x_group),
        index(a.index + group * a.rows + share.begin),
        weight(L == Load::weighted ? a.weight + group * a.rows + share.begin : nullptr),
        x_row(a.x_row),
        d(a.d),
        kept(share.end - share.begin),
        row(t / kChunks),
        chunk(t % kChunks),
        column_a(tile.i * kTile + t % kChunks * kChunk),
        column_b(tile.j * kTile + t % kChunks * kChunk),
        diagonal(tile.i == tile.j) {
    fetch(0);
  }

  KF_DEVICE void fetch(int step) {
    KF_UNROLL
    for (int i = 0; i < kPer; ++i) {
      const int k = step / kTerms<F, L> * BK + row + i * kRows;
      source[i] = k < kept ? index[k] : -1;
    }
  }

  // Columns of the chunk at this column that exist.
  KF_DEVICE int columns(int column) const { return column >= d ? 0 : d - column < kChunk ? d - column : kChunk; }

  // Steps come in order. On the diagonal the two panels are one, unless weighted.
  KF_DEVICE void load(P& p, int step, uint32_t a, uint32_t b) {
    const bool both = L == Load::weighted || !diagonal;
    if constexpr (L == Load::async) {
      const int bytes_a = columns(column_a) * 2, bytes_b = columns(column_b) * 2;
      KF_UNROLL
      for (int i = 0; i < kPer; ++i) {
        const uint32_t at = Layout::at(row, chunk) + i * (kRows * Layout::kPitch);
        const bool real = source[i] >= 0;
        const uint16_t* from = x + (real ? source[i] : 0) * x_row;
        p.cp_async16(a + at, from + (bytes_a ? column_a : 0), real ? bytes_a : 0);
        if (both) p.cp_async16(b + at, from + (bytes_b ? column_b : 0), real ? bytes_b : 0);
      }
    } else {
      const int term = step % kTerms<F, L>;
      // Pairs (left, right) by falling size: (0,0) (1,0) (2,0), or (0,0) (0,1) (1,0) (1,1) (2,0).
      const int left = F == Format::bf16 ? term : term / 2, right = F == Format::bf16 ? 0 : term % 2;
      KF_NO_UNROLL
      for (int i = 0; i < kPer; ++i) {
        int32_t from_row = -1;
        KF_UNROLL
        for (int q = 0; q < kPer; ++q)  // a register array takes no run-time index
          if (q == i) from_row = source[q];
        const int k = step / kTerms<F, L> * BK + row + i * kRows;
        const uint32_t at = Layout::at(row, chunk) + i * (kRows * Layout::kPitch);
        const float w = L == Load::weighted && from_row >= 0 ? weight[k] : 0.0f;
        put(p, a + at, from_row, column_a, w, left, true);
        if (both) put(p, b + at, from_row, column_b, w, right, false);
      }
    }
    fetch(step + 1);
  }

  KF_DEVICE void put(P& p, uint32_t at, int32_t from_row, int column, float w, int part, bool is_left) {
    uint16_t values[kChunk];
    const int real = from_row < 0 ? 0 : columns(column);
    const uint16_t* from = x + (real ? from_row * x_row + column : 0);
    KF_UNROLL
    for (int e = 0; e < kChunk; ++e) values[e] = e < real ? from[e] : uint16_t(0);
    if constexpr (L == Load::weighted) {
      KF_UNROLL
      for (int e = 0; e < kChunk; ++e)
        if (e < real) values[e] = is_left ? left_part<F>(values[e], w, part) : right_part<F>(values[e], part);
    }
    uint32_t words[4];
    KF_UNROLL
    for (int e = 0; e < 4; ++e) words[e] = uint32_t(values[2 * e]) | uint32_t(values[2 * e + 1]) << 16;
    p.store_shared16(at, words);
  }
};

// Two sums and what rounding cost them so far (Kahan): the true sum is sum - lost. What was lost is at most an ulp of
// the sum, so that bf16's eight bits of it take the sum to 2^-32; two share a register.
struct Lost {
  uint32_t pair;
  KF_DEVICE float operator[](int e) const { return as_float(e == 0 ? pair << 16 : pair & 0xffff0000u); }
};

template <class P>
KF_DEVICE void add_compensated(P& p, float& sum0, float& sum1, Lost& lost, float value0, float value1) {
  const float y0 = value0 - lost[0], y1 = value1 - lost[1];
  const float t0 = sum0 + y0, t1 = sum1 + y1;
  lost.pair = p.pack_bf16((t0 - sum0) - y0, (t1 - sum1) - y1);
  sum0 = t0;
  sum1 = t1;
}

// Adds eight entries of a thread's row to C: columns first, first + 1, first + 8, first + 9, … as all matrix fragments
// have them; on and below the diagonal. All are read before the first is written.
template <class Acc, class Value>
KF_DEVICE void add_to_row(Acc* C, int64_t C_row, int d, int row, int first, Value value) {
  if (row >= d) return;
  Acc* to = C + row * C_row + first;
  Acc old[8];
  KF_UNROLL
  for (int e = 0; e < 8; ++e) old[e] = first + e / 2 * 8 + e % 2 <= row ? to[e / 2 * 8 + e % 2] : Acc(0);
  KF_UNROLL
  for (int e = 0; e < 8; ++e)
    if (first + e / 2 * 8 + e % 2 <= row) to[e / 2 * 8 + e % 2] = Acc(double(old[e]) + value(e));
}

// The two paths. add_to_tile adds to C a part of what thread t of kWorkers holds of a tile: entries kPart · part on.
struct Sm80 {
  static constexpr int kThreads = 256, kRowsOfStep = 32, kStages = 4;
  static constexpr int kOperandBytes = kRowsOfStep * kTile * 2, kStageBytes = 2 * kOperandBytes;
  static constexpr int kShared = kStages * kStageBytes;

  // Entry (m · 4 + n) · 4 + e: fragment (m, n) of a warp's 4 × 4 of m16n8.
  template <class Acc, class Value>
  static KF_DEVICE void add_to_tile(Acc* C, int64_t C_row, int d, Tile tile, int t, int part, Value value) {
    const int lane = t % 32, warp = t / 32;
    const int row = tile.i * kTile + warp / 4 * 64 + lane / 4, column = tile.j * kTile + warp % 4 * 32 + lane % 4 * 2;
    KF_UNROLL
    for (int h = 0; h < 2; ++h)  // rows 8 apart
      add_to_row(C, C_row, d, row + part * 16 + h * 8, column, [&](int e) { return value(e / 2 * 4 + h * 2 + e % 2); });
  }
};

struct Sm90 {
  static constexpr int kThreads = 384, kRowsOfStep = 64, kStages = 6;
  static constexpr int kOperandBytes = kRowsOfStep * kTile * 2, kStageBytes = 2 * kOperandBytes;
  static constexpr int kBarriers = 1024, kShared = kBarriers + kStages * kStageBytes;
  static constexpr int kAhead = 3;  // stages on their way before the oldest is announced
  static constexpr int kConsumerWarps = 8;

  // Entries as in wgmma's m64n128 accumulator; the second 128 threads hold the lower 64 rows.
  template <class Acc, class Value>
  static KF_DEVICE void add_to_tile(Acc* C, int64_t C_row, int d, Tile tile, int t, int part, Value value) {
    const int row = tile.i * kTile + t / 32 * 16 + t % 32 / 4, column = tile.j * kTile + t % 4 * 2;
    KF_UNROLL
    for (int h = 0; h < 2; ++h)
      add_to_row(C, C_row, d, row + h * 8, column + part * 32, [&](int e) { return value(e / 2 * 4 + h * 2 + e % 2); });
  }
};

// Where thread t's entry 0 of a split stands; entry e is e · kWorkers further, so that a warp's are together.
KF_DEVICE double* partial_at(const Product& a, int group, int64_t tile, int split, int t) {
  return a.partial + ((group * tile_count(a.d) + tile) * a.splits + split) * (kValues * kWorkers) + t;
}

template <class S, class Acc, class Value>
KF_DEVICE void store(const Product& a, int group, int64_t id, Tile tile, int split, int t, Value value) {
  if (a.splits > 1) {
    double* to = partial_at(a, group, id, split, t);
    KF_UNROLL
    for (int e = 0; e < kValues; ++e) to[e * kWorkers] = value(e);
  } else {
    KF_UNROLL
    for (int part = 0; part < kValues / kPart; ++part)
      S::add_to_tile(static_cast<Acc*>(a.C) + group * a.C_group, a.C_row, a.d, tile, t, part,
                     [&](int e) { return value(part * kPart + e); });
  }
}

// Adds what a tile's blocks left to C, in their order. kValues / kPart blocks of kWorkers a tile.
template <class P, class S, class Acc>
KF_DEVICE void add_splits(P& p, const Product& a) {
  const int group = p.block_y(), part = p.block_z();
  const int64_t id = p.block_x();
  if (a.kept[group] == 0) return;
  double sum[kPart];
  KF_UNROLL
  for (int e = 0; e < kPart; ++e) sum[e] = 0.0;
  KF_NO_UNROLL
  for (int split = 0; split < a.splits; ++split) {
    const double* from = partial_at(a, group, id, split, p.thread()) + part * (kPart * kWorkers);
    KF_UNROLL
    for (int e = 0; e < kPart; ++e) sum[e] += from[e * kWorkers];
  }
  S::add_to_tile(static_cast<Acc*>(a.C) + group * a.C_group, a.C_row, a.d, tile_of(id, a.d), p.thread(), part,
                 [&](int e) { return sum[e]; });
}

// -- sm_80: mma.sync, every warp loads and multiplies

template <class P, Format F, Load L, class Acc>
KF_DEVICE void product_sm80(P& p, const Product& a) {
  using S = Sm80;
  constexpr int BK = S::kRowsOfStep;
  const int group = p.block_y(), split = p.block_z();
  const Tile tile = tile_of(p.block_x(), a.d);
  const int kept = a.kept[group];
  if (kept == 0) return;
  const Share share = share_of(kept, split, a.splits, BK);
  const int steps = (share.end - share.begin + BK - 1) / BK * kTerms<F, L>;
  const bool shared_panel = L != Load::weighted && tile.i == tile.j;
  const uint32_t base = p.shared(), b_offset = shared_panel ? 0 : S::kOperandBytes;

  const int lane = p.thread() % 32, warp = p.thread() / 32;
  const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;  // a warp's 64 × 32 of the tile
  // Operands lie as x does, a row of memory for each k: ldmatrix turns both. Its lanes name rows of four 8 × 8
  // matrices: for A (m, k), (m+8, k), (m, k+8), (m+8, k+8); for B (k, n), (k+8, n), (k, n+8), (k+8, n+8).
  const int a_row = lane % 8 + lane / 16 * 8, a_chunk = warp_m / kChunk + lane / 8 % 2;
  const int b_row = lane % 8 + lane / 8 % 2 * 8, b_chunk = warp_n / kChunk + lane / 16;

  float acc[4][4][4], sum[4][4][4];
  Lost lost[4][4][2];
  KF_UNROLL
  for (int m = 0; m < 4; ++m)
    KF_UNROLL
    for (int n = 0; n < 4; ++n)
      KF_UNROLL
      for (int e = 0; e < 4; ++e) acc[m][n][e] = sum[m][n][e] = 0.0f, lost[m][n][e / 2].pair = 0;

  Loader<P, F, L, BK, S::kThreads, RowsLayout> loader(a, group, tile, share, p.thread());
  KF_NO_UNROLL
  for (int step = 0; step < S::kStages - 1; ++step) {
    const uint32_t stage = base + step * S::kStageBytes;
    if (step < steps) loader.load(p, step, stage, stage + S::kOperandBytes);
    p.cp_async_commit();
  }
  KF_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    p.template cp_async_wait<S::kStages - 2>();
    p.sync();  // this step's stage is there for all, and the one before it is free
    const int ahead = step + S::kStages - 1;
    if (ahead < steps) {
      const uint32_t stage = base + ahead % S::kStages * S::kStageBytes;
      loader.load(p, ahead, stage, stage + S::kOperandBytes);
    }
    p.cp_async_commit();

    const uint32_t stage_a = base + step % S::kStages * S::kStageBytes, stage_b = stage_a + b_offset;
    KF_UNROLL
    for (int k = 0; k < BK; k += 16) {
      uint32_t b[2][4];
      KF_UNROLL
      for (int n = 0; n < 2; ++n) p.ldmatrix_trans(stage_b + RowsLayout::at(k + b_row, b_chunk + 2 * n), b[n]);
      KF_UNROLL
      for (int m = 0; m < 4; ++m) {
        uint32_t fragment[4];
        p.ldmatrix_trans(stage_a + RowsLayout::at(k + a_row, a_chunk + 2 * m), fragment);
        KF_UNROLL
        for (int n = 0; n < 4; ++n)
          p.template mma<kOperand<F, L>>(acc[m][n], fragment, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    if ((step + 1) % (kFlush / BK) == 0 || step + 1 == steps) {
      KF_UNROLL
      for (int m = 0; m < 4; ++m)
        KF_UNROLL
        for (int n = 0; n < 4; ++n)
          KF_UNROLL
          for (int h = 0; h < 2; ++h) {
            add_compensated(p, sum[m][n][2 * h], sum[m][n][2 * h + 1], lost[m][n][h], acc[m][n][2 * h],
                            acc[m][n][2 * h + 1]);
            acc[m][n][2 * h] = acc[m][n][2 * h + 1] = 0.0f;
          }
    }
  }

  store<S, Acc>(a, group, p.block_x(), tile, split, p.thread(), [&](int e) {
    const int m = e / 16, n = e / 4 % 4;
    return double(sum[m][n][e % 4]) - double(lost[m][n][e / 2 % 2][e % 2]);
  });
}

// -- sm_90a: one warpgroup loads, two multiply with wgmma from shared memory

template <class P, Format F, Load L, class Acc>
KF_DEVICE void product_sm90(P& p, const Product& a) {
  using S = Sm90;
  constexpr int BK = S::kRowsOfStep;
  constexpr int ahead = L == Load::async ? S::kAhead : 0;
  static_assert(S::kAhead <= S::kStages - 2, "a consumer frees a stage only once the next one was announced");
  const int group = p.block_y(), split = p.block_z();
  const int kept = a.kept[group];
  if (kept == 0) return;
  const Share share = share_of(kept, split, a.splits, BK);
  const int steps = (share.end - share.begin + BK - 1) / BK * kTerms<F, L>;
  const uint32_t full = p.shared(), empty = full + S::kStages * 8, base = full + S::kBarriers;
  if (p.thread() == 0)
    for (int stage = 0; stage < S::kStages; ++stage) {
      p.barrier_init(full + stage * 8, 128);
      p.barrier_init(empty + stage * 8, S::kConsumerWarps);
    }
  p.sync();

  if (p.thread() < 128) {
    p.template registers_down<40>();
    const Tile tile = tile_of(p.block_x(), a.d);
    Loader<P, F, L, BK, 128, AtomsLayout<BK>> loader(a, group, tile, share, p.thread());
    KF_NO_UNROLL
    for (int step = 0; step < steps + ahead; ++step) {
      if (step < steps) {
        const int stage = step % S::kStages, round = step / S::kStages;
        if (round > 0) p.barrier_wait(empty + stage * 8, (round - 1) % 2);
        const uint32_t at = base + stage * S::kStageBytes;
        loader.load(p, step, at, at + S::kOperandBytes);
      }
      if constexpr (L == Load::async) p.cp_async_commit();
      if (step >= ahead) {
        if constexpr (L == Load::async) p.template cp_async_wait<ahead>();
        p.fence_async();  // what this thread wrote becomes visible to wgmma
        p.barrier_arrive(full + (step - ahead) % S::kStages * 8);
      }
    }
  } else {
    p.template registers_up<232>();
    const Tile tile = tile_of(p.block_x(), a.d);
    const int half = p.thread() / 128 - 1;  // of the tile's rows
    const int lane = p.thread() % 32;
    const uint32_t b_offset = L != Load::weighted && tile.i == tile.j ? 0 : S::kOperandBytes;
    float acc[64], sum[64];
    Lost lost[32];
    KF_UNROLL
    for (int e = 0; e < 64; ++e) acc[e] = sum[e] = 0.0f, lost[e / 2].pair = 0;
    KF_NO_UNROLL
    for (int begin = 0; begin < steps; begin += kFlush / BK) {
      const int end = begin + kFlush / BK < steps ? begin + kFlush / BK : steps;
      KF_NO_UNROLL
      for (int step = begin; step < end; ++step) {
        const int stage = step % S::kStages;
        p.barrier_wait(full + stage * 8, step / S::kStages % 2);
        const uint32_t at = base + stage * S::kStageBytes;
        p.wgmma_hold(acc);
        p.wgmma_fence();
        KF_UNROLL
        for (int k = 0; k < BK; k += 16)
          p.template wgmma<kOperand<F, L>>(acc, descriptor_mn<BK>(at + half * (BK * 128) + k * 128),
                                           descriptor_mn<BK>(at + b_offset + k * 128), step != begin || k != 0);
        p.wgmma_commit();
        if (step > begin) {
          p.template wgmma_wait<1>();
          if (lane == 0) p.barrier_arrive(empty + (step - 1) % S::kStages * 8);
        }
      }
      p.template wgmma_wait<0>();
      p.wgmma_hold(acc);
      if (lane == 0) p.barrier_arrive(empty + (end - 1) % S::kStages * 8);
      KF_UNROLL
      for (int e = 0; e < 64; e += 2) add_compensated(p, sum[e], sum[e + 1], lost[e / 2], acc[e], acc[e + 1]);
    }

    store<S, Acc>(a, group, p.block_x(), tile, split, p.thread() - 128,
                  [&](int e) { return double(sum[e]) - double(lost[e / 2][e % 2]); });
  }
}

}  // namespace kore_fast::covariance
