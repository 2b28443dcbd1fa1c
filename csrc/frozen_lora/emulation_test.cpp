// Runs the frozen-A layer's CUDA kernels' own source on a host (common/cuda_emulation.h) against sums in float64.
//   emulation_test                  every case but the long ones; exit status 0 if all hold
//   emulation_test --long           the long ones
//   emulation_test --defect NAME    the cases that ought to notice this fault; status 0 only if none does
// Build: g++ -std=c++17 -O2 -U_FORTIFY_SOURCE -ffp-contract=off (fibers jump between stacks; sums have their order).

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../common/cuda_emulation.h"
#include "../common/emulation_data.h"
#include "cuda_kernels.cuh"

using namespace kore_fast;
using namespace kore_fast::frozen_lora;

namespace {

struct Case {
  const char* name;
  int path;  // 80; 128 or 256, the tile's columns of sm_90
  Format format;
  Major major;
  int M, N, K1, K2;
  int pad = 0;     // elements between rows
  int offset = 0;  // elements before the first: 1 makes rows unaligned
  bool bias = false, add = false;
  float scale = 0.5f;
  bool late = true, backwards = false;
  int clusters = 1;    // of sm_90: fewer than pairs of tiles make them take several
  bool quick = false;  // one of those that look for defects
  bool lengthy = false;
};

constexpr Format bf = Format::bf16, fp = Format::fp16;
constexpr Major k = Major::k, n = Major::n;

const Case kCases[] = {
    // name, path, format, major, M, N, K1, K2, pad, offset, bias, add, scale, late, backwards, clusters, quick, lengthy
    {"one tile", 80, bf, k, 128, 128, 64, 32, 0, 0, false, false, 0.5f, true, false, 1, true},
    {"one tile", 80, fp, n, 128, 128, 64, 32, 0, 0, false, false, 0.5f, false, true, 1, true},
    {"ragged", 80, bf, k, 83, 200, 168, 40, 0, 0, true, false, 2.0f, true, true, 1, true},
    {"ragged", 80, fp, n, 83, 200, 168, 40, 8, 0, false, true, 1.0f, false, false, 1, true},
    {"four tiles, ring around", 80, bf, k, 130, 136, 328, 8, 8, 0, true, true, 0.25f, false, true},
    {"four tiles, ring around", 80, bf, n, 130, 136, 328, 8, 0, 0, false, true},
    {"unaligned", 80, bf, k, 70, 133, 101, 35, 0, 1, true, true},
    {"unaligned", 80, fp, n, 70, 133, 101, 35, 3, 1, true, true},
    {"unaligned, at once", 80, bf, n, 33, 40, 61, 3, 1, 0, false, false, -1.0f, false},
    {"factors aligned, C not", 80, bf, k, 20, 43, 72, 16, 0, 0, true, false, 3.0f},
    {"one value", 80, bf, k, 1, 1, 1, 1},
    {"one value", 80, fp, n, 1, 1, 1, 1, 0, 0, true, true},
    {"a pair of tiles", 128, bf, k, 256, 128, 64, 64, 0, 0, false, false, 0.5f, true, false, 1, true},
    {"a pair of tiles", 128, fp, n, 256, 128, 64, 64, 0, 0, false, false, 0.5f, false, true, 1, true},
    {"ragged, ring around", 128, bf, k, 150, 72, 488, 40, 8, 0, true, false, 2.0f, false, false, 1, true},
    {"ragged, ring around", 128, fp, n, 150, 72, 488, 40, 0, 0, true, true, 1.0f, true, true, 1, true},
    {"ring, at once and backwards", 128, bf, n, 129, 136, 456, 72, 0, 0, false, true, 0.5f, false, true},
    {"half a pair, several a cluster", 128, bf, k, 40, 296, 136, 8, 0, 0, true, false, 0.5f, true, false},
    {"two clusters", 128, bf, n, 300, 160, 72, 16, 8, 0, false, false, 1.5f, false, false, 2},
    {"one value", 128, bf, k, 1, 8, 8, 8},
    {"wide tiles", 256, bf, k, 140, 264, 136, 40, 0, 0, true, true, 2.0f, true, false, 1, false},
    {"wide tiles", 256, fp, n, 140, 232, 136, 40, 8, 0, true, true, 2.0f, false, true, 1, false},
    {"wide tiles, ring around", 256, bf, n, 257, 264, 712, 200, 0, 0, false, true, 0.5f, false, false, 1, false, true},
    {"wide tiles, ring around", 256, bf, k, 257, 520, 712, 200, 8, 0, true, false, 0.5f, true, true, 2, false, true},
    {"wide tiles, ring around", 256, fp, n, 257, 520, 712, 200, 8, 0, true, false, 0.5f, true, false, 2, false, true},
    {"a long sum", 80, fp, k, 64, 64, 8192, 256, 0, 0, false, false, 1.0f, true, false, 1, false, true},
    {"a long sum", 128, fp, n, 64, 64, 8192, 256, 0, 0, false, false, 1.0f, true, false, 1, false, true},
};

struct Named {
  const char* name;
  Defect defect;
};
const Named kDefects[] = {{"fragment", Defect::fragment},     {"transposed", Defect::transposed},
                          {"no_barrier", Defect::no_barrier}, {"no_zeros", Defect::no_zeros},
                          {"no_edges", Defect::no_edges},     {"offsets", Defect::offsets},
                          {"no_swizzle", Defect::no_swizzle}, {"no_wait", Defect::no_wait},
                          {"early_free", Defect::early_free}, {"early_read", Defect::early_read},
                          {"own_free", Defect::own_free},     {"no_exchange", Defect::no_exchange},
                          {"no_cluster", Defect::no_cluster}};

// A factor's rows in memory, guarded at their end.
struct Rows {
  Rows(const Case& c, int rows, int columns, std::mt19937& random)
      : format(c.format), rows(rows), columns(columns), pitch(columns + c.pad),
        data(size_t(rows - 1) * pitch + columns, c.offset) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) data[size_t(i) * pitch + j] = narrow_to(format, normal(random));
  }
  Factor factor() { return {data.get(), pitch}; }
  bool aligned() { return reinterpret_cast<uintptr_t>(data.get()) % 16 == 0 && pitch % 8 == 0; }
  double at(int i, int j) { return widen(format, data[size_t(i) * pitch + j]); }
  TensorMap map(int box_rows) { return {data.get(), rows, columns, pitch * 2, box_rows, kBoxColumns}; }

  Format format;
  int rows, columns;
  int64_t pitch;
  Guarded<uint16_t> data;
};

template <Format F, Load L, Major O>
Statistics multiply80(const Product& a, Launch launch) {
  Statistics all;
  launch.threads = Sm80::kThreads;
  launch.shared = Sm80::kShared;
  for (; launch.block_x < over(a.M, Sm80::kTile) * over(a.N, Sm80::kTile); ++launch.block_x) {
    const Statistics one = Block::run(launch, [&](Emulated& p) { product_sm80<Emulated, F, L, O>(p, a); });
    all.mma += one.mma;
    all.bank_conflicts += one.bank_conflicts;
  }
  return all;
}

template <Format F, Major O, int TN>
Statistics multiply90(const Product& a, Rows& P, Rows& Q, Rows& R, Rows& S, int clusters, Launch launch) {
  constexpr int box_rows = kRightBoxRows<TN, O>;
  const Maps<TensorMap> maps{P.map(kLeftBoxRows), Q.map(box_rows), R.map(kLeftBoxRows), S.map(box_rows)};
  Statistics all;
  launch.threads = Sm90<TN>::kThreads;
  launch.shared = Sm90<TN>::kShared;
  launch.cluster = Sm90<TN>::kCluster;
  launch.blocks = clusters * launch.cluster;
  for (; launch.block_x < launch.blocks; launch.block_x += launch.cluster) {
    const Statistics one = Block::run(launch, [&](Emulated& p) { product_sm90<Emulated, F, O, TN>(p, a, maps); });
    all.wgmma += one.wgmma;
    all.tiles += one.tiles;
  }
  return all;
}

template <Format F, Major O>
Statistics multiply(const Case& c, const Product& a, bool aligned, Rows& P, Rows& Q, Rows& R, Rows& S,
                    const Launch& launch) {
  if (c.path == 256) return multiply90<F, O, 256>(a, P, Q, R, S, c.clusters, launch);
  if (c.path == 128) return multiply90<F, O, 128>(a, P, Q, R, S, c.clusters, launch);
  return aligned ? multiply80<F, Load::async, O>(a, launch) : multiply80<F, Load::copy, O>(a, launch);
}

// Whether it holds; what it found, where that is wanted.
bool run(const Case& c, Defect defect, std::vector<uint16_t>* found = nullptr) {
  std::mt19937 random(77 + c.M + c.N + c.K1 + c.K2);
  std::normal_distribution<float> normal;
  const auto right = [&](int K) { return c.major == k ? Rows(c, c.N, K, random) : Rows(c, K, c.N, random); };
  Rows P(c, c.M, c.K1, random), Q = right(c.K1), R(c, c.M, c.K2, random), S = right(c.K2);
  Guarded<uint16_t> bias(c.N, 1);
  for (int j = 0; j < c.N; ++j) bias[j] = narrow_to(c.format, 10 * normal(random));
  // Rows of C have a gap that has to stay as it is.
  const int C_row = c.N + c.pad;
  const size_t size = size_t(c.M - 1) * C_row + c.N;
  Guarded<uint16_t> C(size, c.offset);
  std::vector<uint16_t> before(size);
  for (size_t i = 0; i < size; ++i) before[i] = C[i] = c.add ? narrow_to(c.format, 10 * normal(random)) : 0x7fff;

  Product a{};
  a.P = P.factor(), a.Q = Q.factor(), a.R = R.factor(), a.S = S.factor();
  a.C = C.get();
  a.C_row = C_row;
  a.bias = c.bias ? bias.get() : nullptr;
  a.scale = c.scale;
  a.add = c.add;
  a.whole = reinterpret_cast<uintptr_t>(C.get()) % 16 == 0 && C_row % 8 == 0 && c.N % 8 == 0;
  a.M = c.M, a.N = c.N, a.K1 = c.K1, a.K2 = c.K2;
  const bool aligned = P.aligned() && Q.aligned() && R.aligned() && S.aligned();

  Launch launch;
  launch.late = c.late;
  launch.backwards = c.backwards;
  launch.defect = defect;
  const auto multiply_as = c.format == bf ? (c.major == k ? multiply<bf, k> : multiply<bf, n>)
                                          : (c.major == k ? multiply<fp, k> : multiply<fp, n>);
  const Statistics statistics = multiply_as(c, a, aligned, P, Q, R, S, launch);

  for (size_t i = 0; i < size && found != nullptr; ++i) found->push_back(C[i]);

  // Beside one rounding of the sum, to half a unit of its last place. See cuda.cu for what sums of one sign may err by.
  const double half_unit = c.format == bf ? 0x1p-8 : 0x1p-11, bound = 0x1p-22;
  double worst = 0;
  bool holds = statistics.bank_conflicts == 0;
  for (int i = 0; i < c.M; ++i) {
    for (int j = 0; j < c.N; ++j) {
      double sum = 0, sizes = 0;
      const auto add = [&](double term) { sum += term, sizes += std::abs(term); };
      const auto product = [&](Rows& left, Rows& right, int K, double scale) {
        for (int at = 0; at < K; ++at)
          add(scale * left.at(i, at) * (c.major == k ? right.at(j, at) : right.at(at, j)));
      };
      product(P, Q, c.K1, 1);
      product(R, S, c.K2, c.scale);
      if (c.bias) add(widen(c.format, bias[j]));
      if (c.add) add(widen(c.format, before[size_t(i) * C_row + j]));
      const double error = std::abs(widen(c.format, C[size_t(i) * C_row + j]) - sum);
      const double cut = std::max(0.0, error - half_unit * 1.001 * std::abs(sum)) / sizes;
      worst = cut > worst || std::isnan(error) ? (std::isnan(error) ? INFINITY : cut) : worst;
      holds &= cut <= bound && !std::isnan(error);
    }
    for (int j = c.N; j < C_row && i + 1 < c.M; ++j)
      holds &= C[size_t(i) * C_row + j] == before[size_t(i) * C_row + j];
  }
  std::printf("%-4s sm_%s %s, %s-major, (%d × %d + %d) × %d%s%s, %s: 2^%.1f of the magnitudes beside one rounding "
              "(bound 2^%.1f), %ld mma, %ld wgmma, %ld boxes, %ld bank conflicts\n",
              holds ? "ok" : "BAD", c.path == 80 ? "80" : c.path == 128 ? "90, 128" : "90, 256",
              c.format == bf ? "bf16" : "fp16", c.major == k ? "K" : "N", c.M, c.K1, c.K2, c.N, c.bias ? " + bias" : "",
              c.add ? " + C" : "", c.name, std::log2(worst), std::log2(bound), long(statistics.mma),
              long(statistics.wgmma), long(statistics.tiles), long(statistics.bank_conflicts));
  return holds;
}

// Every tile once, for every shape.
bool schedule_holds() {
  for (int rows = 1; rows < 40; ++rows)
    for (int columns = 1; columns < 20; ++columns) {
      std::vector<int> seen(rows * columns, 0);
      for (int id = 0; id < rows * columns; ++id) {
        const Tile tile = tile_of(id, rows, columns);
        if (tile.i < 0 || tile.i >= rows || tile.j < 0 || tile.j >= columns || seen[tile.i * columns + tile.j]++)
          return false;
      }
    }
  return true;
}

// Many tiles are wide; where wide ones would leave processors without work, they are not.
bool widths_hold() {
  const auto width = [](int M, int N) {
    Product a{};
    a.M = M, a.N = N;
    return tile_columns(a, 132);
  };
  return width(8192, 4096) == 256 && width(8192, 11008) == 256 && width(512, 4096) == 128 && width(2048, 4096) == 256 &&
         width(1, 8) == 128;
}

// Wide tiles and narrow ones, of any number of clusters, give the same bits.
bool tiles_agree() {
  const Case wide{"in wide tiles", 256, bf, k, 140, 264, 200, 40, 0, 0, true, true};
  Case narrow = wide;
  narrow.name = "in narrow tiles";
  narrow.path = 128;
  narrow.clusters = 3;
  std::vector<uint16_t> one, two;
  return run(wide, Defect::none, &one) && run(narrow, Defect::none, &two) && one == two;
}

}  // namespace

int main(int argc, char** argv) {
  Defect defect = Defect::none;
  const bool lengthy = argc == 2 && std::string(argv[1]) == "--long";
  if (argc == 3 && std::string(argv[1]) == "--defect") {
    for (const Named& named : kDefects)
      if (named.name == std::string(argv[2])) defect = named.defect;
    if (defect == Defect::none) return 2;
  } else if (argc != 1 && !lengthy) {
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  bool right = true;
  if (!schedule_holds()) right = false, std::printf("BAD  the schedule\n");
  if (!widths_hold()) right = false, std::printf("BAD  the widths of tiles\n");
  if (defect == Defect::none && !lengthy && !tiles_agree()) right = false, std::printf("BAD  the bits of wide tiles\n");
  for (const Case& c : kCases) {
    if (defect != Defect::none ? !c.quick : c.lengthy != lengthy) continue;
    right &= run(c, defect);
    if (!right && defect != Defect::none) break;
  }
  return right ? 0 : 1;
}
