// Runs the CUDA covariance kernels' own source on a host (common/cuda_emulation.h) against sums in float64.
//   emulation_test                  every case; exit status 0 if all hold
//   emulation_test --defect NAME    the cases that ought to notice this fault; status 0 only if none does
// Build: g++ -std=c++20 -O2 -U_FORTIFY_SOURCE -ffp-contract=off (fibers jump between stacks; sums have their order).

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../common/cuda_emulation.h"
#include "../common/emulation_data.h"
#include "cuda_kernels.cuh"

using namespace kore_fast;
using namespace kore_fast::covariance;

namespace {

struct Case {
  const char* name;
  int path;  // 80 or 90
  Format format;
  bool narrow;  // C in fp32
  int groups, rows, d;
  int pad = 0;     // elements between rows
  int offset = 0;  // elements before the first: 1 makes rows unaligned
  int mask_bytes = 0;
  Scale scale = Scale::none;
  bool bad_rows = false;
  bool late = true, backwards = false;
  bool positive = false;  // sums that only grow
  int splits = 1;
};

constexpr Format bf = Format::bf16, fp = Format::fp16;

const Case kCases[] = {
    // name, path, format, narrow, groups, rows, d, pad, offset, mask, scale, bad rows, late, backwards
    {"one tile", 80, bf, false, 1, 64, 128},
    {"one tile", 90, bf, false, 1, 128, 128},
    {"ragged", 80, bf, false, 1, 83, 200, 0, 0, 1, Scale::none, true},
    {"ragged", 90, bf, false, 1, 83, 200, 0, 0, 1, Scale::none, true},
    {"three tiles a side", 80, bf, true, 1, 300, 264, 0, 0, 0, Scale::none, true, false, true},
    {"three tiles a side", 90, bf, true, 1, 300, 264, 0, 0, 0, Scale::none, true, false, true},
    {"two flushes and a rest, ring twice around", 80, fp, false, 1, 600, 136, 0, 0, 8},
    {"two flushes and a rest, ring twice around", 90, fp, false, 1, 600, 136, 0, 0, 8},
    {"ring, at once and backwards", 90, bf, false, 1, 460, 72, 0, 0, 1, Scale::none, true, false, true},
    {"ring, at once and forwards", 90, bf, false, 1, 600, 72, 0, 0, 0, Scale::none, false, false, false},
    {"ring, late and backwards", 90, bf, false, 1, 460, 72, 0, 0, 1, Scale::none, true, true, true},
    {"ring, at once and forwards", 80, bf, false, 1, 230, 72, 0, 0, 1, Scale::none, true, false, false},
    {"padded rows, d not a multiple of 8", 80, bf, false, 1, 70, 133, 3, 0, 1, Scale::none, true},
    {"padded rows, d not a multiple of 8", 90, bf, false, 1, 70, 133, 3, 0, 1, Scale::none, true},
    {"unaligned", 80, bf, false, 1, 70, 133, 0, 0, 1, Scale::none, true},
    {"unaligned", 90, fp, true, 1, 150, 133, 0, 1, 1, Scale::none, true},
    {"groups", 80, bf, false, 3, 40, 24, 0, 0, 1, Scale::none, true},
    {"groups", 90, fp, false, 3, 40, 24, 8, 0, 1, Scale::none, true},
    {"weights", 80, bf, false, 1, 90, 140, 4, 0, 1, Scale::fp32, true},
    {"weights", 90, bf, false, 1, 150, 140, 4, 0, 1, Scale::fp64, true},
    {"weights, fp16", 80, fp, false, 2, 50, 60, 0, 0, 0, Scale::fp64, true},
    {"weights, fp16, fp32 sums", 90, fp, true, 1, 90, 61, 0, 0, 1, Scale::fp16, true, false, true},
    {"weights in bf16", 80, bf, true, 1, 33, 16, 0, 0, 0, Scale::bf16},
    {"a tile's rows shared", 80, bf, false, 2, 300, 140, 4, 0, 1, Scale::none, true, true, false, false, 3},
    {"a tile's rows shared", 90, bf, true, 2, 300, 140, 4, 0, 1, Scale::none, true, true, false, false, 2},
    {"more shares than steps", 90, fp, false, 1, 70, 40, 0, 0, 0, Scale::fp32, false, true, false, false, 5},
    {"nothing kept", 80, bf, false, 1, 0, 24, 0, 0, 1},
    {"one value", 80, bf, false, 1, 1, 1},
    {"one value", 90, fp, false, 1, 1, 1},
    // What is cut makes every sum of one sign too small by about the same factor; what else is lost must be less.
    {"many rows of one sign", 80, bf, false, 1, 12000, 8, 0, 0, 0, Scale::none, false, true, false, true},
};

struct Named {
  const char* name;
  Defect defect;
};
const Named kDefects[] = {{"fragment", Defect::fragment},     {"transposed", Defect::transposed},
                          {"no_fence", Defect::no_fence},     {"no_barrier", Defect::no_barrier},
                          {"no_list_barrier", Defect::no_barrier},
                          {"no_zeros", Defect::no_zeros},     {"offsets", Defect::offsets},
                          {"no_swizzle", Defect::no_swizzle}, {"no_wait", Defect::no_wait},
                          {"early_free", Defect::early_free},
                          {"plain_sum", Defect::plain_sum}};

template <Format F, Load L, class Acc>
Statistics multiply(int path, const Product& a, Launch launch, int groups) {
  Statistics all;
  launch.threads = path == 80 ? Sm80::kThreads : Sm90::kThreads;
  launch.shared = path == 80 ? Sm80::kShared : Sm90::kShared;
  const auto run = [&](auto body) {
    const Statistics one = Block::run(launch, body);
    all.bank_conflicts += one.bank_conflicts;
    all.mma += one.mma;
    all.wgmma += one.wgmma;
  };
  for (launch.block_y = 0; launch.block_y < groups; ++launch.block_y)
    for (launch.block_x = 0; launch.block_x < tile_count(a.d); ++launch.block_x)
      for (launch.block_z = 0; launch.block_z < a.splits; ++launch.block_z)
        run([&](Emulated& p) {
          if (path == 80)
            product_sm80<Emulated, F, L, Acc>(p, a);
          else
            product_sm90<Emulated, F, L, Acc>(p, a);
        });
  launch.threads = kWorkers;
  for (launch.block_y = 0; launch.block_y < groups && a.splits > 1; ++launch.block_y)
    for (launch.block_x = 0; launch.block_x < tile_count(a.d); ++launch.block_x)
      for (launch.block_z = 0; launch.block_z < kValues / kPart; ++launch.block_z)
        run([&](Emulated& p) {
          if (path == 80)
            add_splits<Emulated, Sm80, Acc>(p, a);
          else
            add_splits<Emulated, Sm90, Acc>(p, a);
        });
  return all;
}

template <Format F, class Acc>
Statistics multiply(Load load, int path, const Product& a, const Launch& launch, int groups) {
  switch (load) {
    case Load::async: return multiply<F, Load::async, Acc>(path, a, launch, groups);
    case Load::copy: return multiply<F, Load::copy, Acc>(path, a, launch, groups);
    default: return multiply<F, Load::weighted, Acc>(path, a, launch, groups);
  }
}

double scale_at(Scale kind, const std::vector<unsigned char>& bytes, size_t i) {
  uint16_t half;
  float single;
  double value;
  switch (kind) {
    case Scale::fp16: std::memcpy(&half, &bytes[2 * i], 2); return widen(fp, half);
    case Scale::bf16: std::memcpy(&half, &bytes[2 * i], 2); return widen(bf, half);
    case Scale::fp32: std::memcpy(&single, &bytes[4 * i], 4); return single;
    case Scale::fp64: std::memcpy(&value, &bytes[8 * i], 8); return value;
    default: return 1.0;
  }
}

template <class Acc>
bool run(const Case& c, Defect defect, bool of_lists) {
  std::mt19937 random(1234 + c.rows + c.d);
  std::normal_distribution<float> normal;
  const auto uniform = [&] { return double(random()) / 4294967296.0; };
  const size_t G = c.groups, T = c.rows, d = c.d, row_stride = d + c.pad, total = G * T;

  // Columns of very different size, three of them massive; a row's end is never read past.
  Guarded<uint16_t> x(total ? total * row_stride - c.pad : 1, c.offset);
  std::vector<float> size(d);
  for (size_t j = 0; j < d; ++j) size[j] = j % 97 == 5 ? 300.0f : std::pow(10.0f, -3.0f * float(uniform()));
  for (size_t r = 0; r < total; ++r)
    for (size_t j = 0; j < d; ++j) {
      const float value = c.positive ? float(std::exp(3 * uniform())) : normal(random) * size[j];
      x[r * row_stride + j] = narrow_to(c.format, value);
    }
  std::vector<unsigned char> mask(total * c.mask_bytes, 0);
  for (size_t r = 0; r < total && c.mask_bytes; ++r)
    if (uniform() < 0.75) mask[r * c.mask_bytes + random() % c.mask_bytes] = 1 + random() % 255;
  const int scale_bytes = c.scale == Scale::none ? 0 : c.scale == Scale::fp64 ? 8 : c.scale == Scale::fp32 ? 4 : 2;
  std::vector<unsigned char> scale(total * scale_bytes);
  for (size_t r = 0; r < total && scale_bytes; ++r) {
    double w = uniform() < 0.1 ? 0.0 : uniform() * (uniform() < 0.1 ? 700.0 : 1.0);
    if (c.bad_rows && r % 17 == 3) w = r % 3 == 0 ? -w : r % 3 == 1 ? NAN : INFINITY;
    const float single = float(w);
    const uint16_t half = narrow_to(c.scale == Scale::fp16 ? fp : bf, single);
    std::memcpy(&scale[r * scale_bytes], scale_bytes == 8 ? (const void*)&w : scale_bytes == 4 ? (const void*)&single
                                                                            : (const void*)&half, scale_bytes);
  }
  if (c.bad_rows)
    for (size_t r = 3; r < total; r += 11) {
      const float bad = r % 2 ? NAN : r % 3 ? INFINITY : -INFINITY;
      x[r * row_stride + (r * 7) % d] = narrow_to(c.format, bad);
    }

  std::vector<Acc> C(G * d * d);
  for (Acc& value : C) value = Acc(normal(random));
  const std::vector<Acc> before = C;
  std::vector<double> count(G * 3, 0.5);

  Guarded<int32_t> index(total + 1);
  Guarded<float> weight(total + 1);
  std::vector<int32_t> kept(G, -1);
  std::vector<uint8_t> state(total + 1, 77);
  Rows r{};
  r.x = x.get();
  r.x_group = T * row_stride;
  r.x_row = row_stride;
  r.groups = G;
  r.rows = T;
  r.d = c.d;
  r.aligned = reinterpret_cast<uintptr_t>(x.get()) % 16 == 0 && row_stride % 8 == 0;
  r.exponent = c.format == bf ? 0x7f80 : 0x7c00;
  r.mask = c.mask_bytes ? mask.data() : nullptr;
  r.mask_bytes = c.mask_bytes;
  r.scale = scale_bytes ? scale.data() : nullptr;
  r.scale_kind = c.scale;
  r.narrow = c.narrow;
  r.state = state.data();
  r.index = index.get() + 1;
  r.weight = weight.get() + 1;
  r.kept = kept.data();
  r.count = count.data();

  Launch launch;
  launch.late = c.late;
  launch.backwards = c.backwards;
  launch.defect = of_lists ? defect : Defect::none;
  launch.threads = 256;
  for (launch.block_x = 0; launch.block_x < int64_t(total + 7) / 8; ++launch.block_x)
    Block::run(launch, [&](Emulated& p) { row_states(p, r); });
  launch.shared = row_lists_shared(launch.threads);
  for (launch.block_x = 0; launch.block_x < int64_t(G); ++launch.block_x)
    Block::run(launch, [&](Emulated& p) { row_lists(p, r); });

  launch.defect = of_lists ? Defect::none : defect;
  Product a{};
  a.x = x.get();
  a.x_group = r.x_group;
  a.x_row = r.x_row;
  a.rows = r.rows;
  a.d = r.d;
  a.index = r.index;
  a.weight = r.weight;
  a.kept = r.kept;
  a.C = C.data();
  a.C_group = d * d;
  a.C_row = d;
  a.splits = c.splits;
  std::vector<double> partial(c.splits > 1 ? G * tile_count(c.d) * c.splits * kValues * kWorkers : 0, NAN);
  a.partial = partial.data();
  const Load load = scale_bytes ? Load::weighted : r.aligned ? Load::async : Load::copy;
  const Statistics statistics = c.format == bf ? multiply<bf, Acc>(load, c.path, a, launch, c.groups)
                                               : multiply<fp, Acc>(load, c.path, a, launch, c.groups);

  // The same in float64, and the sum of magnitudes that errors are measured by.
  double worst = 0, mean = 0, square = 0;
  constexpr double kSpread = 4e-8;
  bool right = true;
  // Parts of w·x take more instructions, and few rows may weigh most: more is cut. See cuda.cu for the worst.
  const double bound = c.scale == Scale::none ? 0x1p-20 : 0x1p-19;
  for (size_t g = 0; g < G; ++g) {
    std::vector<double> sum(d * d), size_of(d * d);
    double tokens = 0, weights = 0, nonfinite = 0;
    std::vector<double> row(d);
    for (size_t t = 0; t < T; ++t) {
      const size_t at = g * T + t;
      bool wanted = !c.mask_bytes;
      for (int b = 0; b < c.mask_bytes; ++b) wanted |= mask[at * c.mask_bytes + b] != 0;
      double w = scale_at(c.scale, scale, at);
      if (c.narrow) w = float(w);
      wanted &= w != 0;
      if (!wanted) continue;
      bool finite = w > 0 && w < double(INFINITY);
      for (size_t j = 0; j < d; ++j) finite &= std::isfinite(row[j] = widen(c.format, x[at * row_stride + j]));
      if (!finite) {
        ++nonfinite;
        continue;
      }
      ++tokens;
      weights += w;
      for (size_t i = 0; i < d; ++i)
        for (size_t j = 0; j <= i; ++j) {
          sum[i * d + j] += w * row[i] * row[j];
          size_of[i * d + j] += std::abs(w * row[i] * row[j]);
        }
    }
    right &= count[g * 3] == 0.5 + tokens && count[g * 3 + 2] == 0.5 + nonfinite &&
             std::abs(count[g * 3 + 1] - 0.5 - weights) <= 1e-12 * (1 + weights);
    if (!right) std::printf("counts %g %g %g, want %g %g %g; ", count[g * 3], count[g * 3 + 1], count[g * 3 + 2],
                            0.5 + tokens, 0.5 + weights, 0.5 + nonfinite);
    for (size_t i = 0; i < d; ++i)
      for (size_t j = 0; j < d; ++j) {
        const size_t at = g * d * d + i * d + j;
        const double old = before[at], now = C[at];
        if (j > i) {
          right &= now == old;  // nothing above the diagonal is touched
          continue;
        }
        const double slack = sizeof(Acc) == 4 ? 0x1p-24 * std::abs(old + sum[i * d + j]) : 1e-15 * std::abs(old);
        const double error = std::max(0.0, std::abs(now - old - sum[i * d + j]) - slack);
        const double relative = error == 0 ? 0 : size_of[i * d + j] > 0 ? error / size_of[i * d + j] : 1.0;
        const double biased = c.positive ? (now - old - sum[i * d + j]) / sum[i * d + j] : 0;
        mean += biased * 2 / (d * (d + 1));
        square += biased * biased * 2 / (d * (d + 1));
        worst = relative > worst || std::isnan(relative) ? relative : worst;
        right &= relative <= bound;
      }
  }
  right &= statistics.bank_conflicts == 0;
  if (c.positive) {
    const double spread = std::sqrt(square - mean * mean);
    std::printf("relative errors: mean %.1e, spread %.1e (bound %.0e); ", mean, spread, kSpread);
    right &= spread <= kSpread;
  }
  std::printf("%-4s sm_%d %s, %s C, %d × %d × %d, %s: error 2^%.1f of the magnitudes (bound 2^%.0f), %ld mma, "
              "%ld wgmma, %ld bank conflicts\n",
              right ? "ok" : "BAD", c.path, c.format == bf ? "bf16" : "fp16", c.narrow ? "fp32" : "fp64", c.groups,
              c.rows, c.d, c.name, std::log2(worst), std::log2(bound), long(statistics.mma), long(statistics.wgmma),
              long(statistics.bank_conflicts));
  return right;
}

// Every tile on and below the diagonal once, for every size up to beyond the widest layer.
bool schedule_holds() {
  for (int n = 1; n <= 200; ++n) {
    const int d = n * kTile - n % kTile;
    if ((d + kTile - 1) / kTile != n) std::abort();
    std::vector<int> seen(size_t(n) * n, 0);
    for (int64_t id = 0; id < tile_count(d); ++id) {
      const Tile tile = tile_of(id, d);
      if (tile.i < 0 || tile.i >= n || tile.j < 0 || tile.j > tile.i) return false;
      ++seen[size_t(tile.i) * n + tile.j];
    }
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j)
        if (seen[size_t(i) * n + j] != 1) return false;
  }
  return true;
}

// Every kept row in one share; few tiles are shared, many or short ones are not.
bool shares_hold() {
  for (int kept : {1, 31, 32, 33, 64, 1000, 8191})
    for (int splits = 1; splits <= 16; ++splits)
      for (int step : {32, 64}) {
        int next = 0;
        for (int split = 0; split < splits; ++split) {
          const Share share = share_of(kept, split, splits, step);
          if (share.end < share.begin || (share.end > share.begin && share.begin != next)) return false;
          if (share.end > share.begin) next = share.end;
        }
        if (next != kept) return false;
      }
  return split_count(tile_count(1024), 8192, 132) > 1 && split_count(tile_count(4096), 8192, 132) == 1 &&
         split_count(tile_count(1024), 512, 132) == 1 && split_count(tile_count(18944), 65536, 132) == 1;
}

}  // namespace

int main(int argc, char** argv) {
  Defect defect = Defect::none;
  bool of_lists = false;
  if (argc == 3 && std::string(argv[1]) == "--defect") {
    for (const Named& named : kDefects)
      if (named.name == std::string(argv[2])) defect = named.defect;
    of_lists = argv[2] == std::string("no_list_barrier");
    if (defect == Defect::none) return 2;
  } else if (argc != 1) {
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  bool right = schedule_holds() && shares_hold();
  if (!right) std::printf("BAD  the schedule\n");
  for (const Case& c : kCases) {
    if (defect != Defect::none && c.positive != (defect == Defect::plain_sum)) continue;
    right &= c.narrow ? run<float>(c, defect, of_lists) : run<double>(c, defect, of_lists);
    if (!right && defect != Defect::none) break;
  }
  return right ? 0 : 1;
}
