// The kernels' primitives on a host: the threads of a block, or of a cluster of blocks, are fibers of one thread; warp
// and warpgroup instructions exchange registers by the fragment layouts of the PTX ISA (sections "Matrix fragments for
// mma.m16n8k16", "ldmatrix", "Asynchronous warpgroup level matrix instructions", "Tensors", "mbarrier"). Written from
// that document, not from the kernels.
//
// It is unkind on purpose, within what the ISA allows. Shared memory starts as NaNs. One warp runs as far as it can
// before another does, but lets all others run after it arrived at an mbarrier. Either (`late`) copies land as late as
// they may, wgmma sees what threads wrote only after their fence.proxy.async, and reads its operands at once: what was
// not waited for is missing; the copy engine's boxes land once nothing else can go on. Or copies land and are seen at
// once, and wgmma reads as late as it may: what was freed too early is overwritten. Accumulators read before
// wgmma.wait_group are NaNs. A misaligned or wild address, a diverged warp, a missing fence, a block of a cluster that
// ends too early or a deadlock is an error.
// Tensor cores cut what they add, as published measurements say they do, instead of rounding it.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ucontext.h>

namespace kore_fast {

[[noreturn]] inline void emulation_fails(const char* why) {
  std::printf("emulation: %s\n", why);
  std::exit(3);
}

// Faults to inject, to see that the tests notice.
enum class Defect {
  none,
  fragment,     // two registers of mma's A exchanged
  transposed,   // ldmatrix without .trans, or with it where it should be without
  no_fence,     // fence.proxy.async does nothing
  no_barrier,   // __syncthreads does nothing
  no_zeros,     // cp.async of no bytes leaves what was there
  offsets,      // leading and stride offsets of a wgmma descriptor exchanged
  no_swizzle,   // wgmma reads as if unswizzled
  no_wait,      // wgmma.wait_group returns while one group may still be reading
  early_free,   // the loading warpgroup doesn't wait for a free stage
  plain_sum,    // the second sums are not compensated
  early_read,   // the multiplying warpgroups don't wait for a full stage
  own_free,     // a stage is announced as free to its own block twice, and to the cluster's other not at all
  no_edges,     // the copy engine leaves what was there where a tile is outside its matrix
  no_exchange,  // shuffles give each lane its own value
  no_cluster,   // the cluster's barrier does nothing
};

struct Launch {
  int threads = 0;
  int64_t block_x = 0;      // of a cluster's first block
  int block_y = 0, block_z = 0;
  int blocks = 1;           // grid in x
  int cluster = 1;          // blocks that run together, neighbours in x
  int shared = 0;           // bytes
  bool late = true;         // copies happen at their waits and wgmma at once; else the other way round
  bool backwards = false;   // the last warp runs first
  Defect defect = Defect::none;
};

struct Statistics {
  int64_t bank_conflicts = 0;  // extra cycles of ldmatrix
  int64_t mma = 0, wgmma = 0, tiles = 0;
};

// What the copy engine knows of a matrix of 16-bit elements: rows of `columns` elements, `pitch` bytes apart, of which
// it brings boxes. Boxes lie in shared memory in rows of 128 bytes with the 128-byte swizzle.
struct TensorMap {
  const void* from;
  int64_t rows, columns, pitch;
  int box_rows, box_columns;
};

class Block;

// What a kernel's body gets: its thread of a block.
class Emulated {
 public:
  using TensorMap = kore_fast::TensorMap;

  Emulated(Block* block, int rank, int thread, int id) : block_(block), rank_(rank), thread_(thread), id_(id) {}

  int thread() const { return thread_; }
  int threads() const;
  int blocks() const;
  int64_t block_x() const;
  int block_y() const;
  int block_z() const;
  uint32_t shared() const { return 2048; }  // not 0, as on a device
  void sync();
  uint32_t ballot(bool value);
  uint32_t count_bits(uint32_t bits) { return uint32_t(__builtin_popcount(bits)); }
  uint32_t pack_bf16(float low, float high);
  uint32_t pack_fp16(float low, float high);
  uint32_t shuffle_xor(uint32_t value, int mask);
  void load_global16(const void* from, uint32_t (&words)[4]);
  void load_old16(const void* from, uint32_t (&words)[4]) { load_global16(from, words); }
  void store_global16(void* to, const uint32_t (&words)[4]);
  void store_shared32(uint32_t at, uint32_t value) { store(at, &value, 4); }
  uint32_t load_shared32(uint32_t at) { return load<uint32_t>(at); }
  void store_shared_double(uint32_t at, double value) { store(at, &value, 8); }
  double load_shared_double(uint32_t at) { return load<double>(at); }
  void store_shared16(uint32_t at, const uint32_t (&words)[4]) { store(at, words, 16); }
  void cp_async16(uint32_t to, const void* from, int bytes);
  void cp_async_commit() { copies_.emplace_back(); }
  template <int PENDING>
  void cp_async_wait() {
    while (int(copies_.size()) > PENDING + 1) land();
  }
  void ldmatrix(uint32_t at, uint32_t (&registers)[4]) { ldmatrix_any(at, registers, false); }
  void ldmatrix_trans(uint32_t at, uint32_t (&registers)[4]) { ldmatrix_any(at, registers, true); }
  template <auto FORMAT>
  void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_any(int(FORMAT) == 0, c, a, b0, b1);
  }
  void barrier_init(uint32_t at, int arrivals);
  void barrier_arrive(uint32_t at);
  void barrier_wait(uint32_t at, int parity);
  int cluster_rank() const { return rank_; }
  void cluster_sync();
  void barrier_arrive_at(uint32_t at, int rank);
  void barrier_expect(uint32_t at, int bytes);
  void barrier_wait_cluster(uint32_t at, int parity) { barrier_wait(at, parity); }
  void load_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);
  void load_tile_to_all(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);
  void fence_async();
  template <int COUNT>
  void registers_down() {}
  template <int COUNT>
  void registers_up() {}
  template <int N>
  void wgmma_hold(float (&)[N]) {}
  void wgmma_fence() { fenced_ = true; }
  void wgmma_commit();
  template <int PENDING>
  void wgmma_wait() {
    wgmma_wait_any(PENDING);
  }
  // A is 64 × 16, B 16 × 2 N. Each is either MN-major ("transposed") or K-major.
  template <auto FORMAT, bool A_MN = true, bool B_MN = true, int N>
  void wgmma(float (&c)[N], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N == 64 || N == 128, "wgmma m64n128k16 or m64n256k16");
    wgmma_any(int(FORMAT) == 0, A_MN, B_MN, c, 2 * N, a, b, accumulate);
  }

 private:
  friend class Block;
  struct Copy {
    uint32_t to;
    unsigned char bytes[16];
    const void* from;
    int count;
  };

  template <class T>
  T load(uint32_t at);
  void store(uint32_t at, const void* from, int bytes);
  void land();  // the oldest group of copies
  void mma_any(bool bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
  void ldmatrix_any(uint32_t at, uint32_t (&registers)[4], bool trans);
  void wgmma_any(bool bf16, bool a_mn, bool b_mn, float* c, int n, uint64_t a, uint64_t b, bool accumulate);
  void wgmma_wait_any(int pending);
  void add_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, int first, int last);

  Block* block_;
  int rank_, thread_, id_;  // of its block in the cluster, of the thread in its block, of the thread in the cluster
  std::deque<std::vector<Copy>> copies_{1};
  std::vector<std::pair<uint32_t, int>> unfenced_;  // what this thread wrote since its last fence.proxy.async
  bool fenced_ = false;
};

// A block of threads and its shared memory, or the blocks of a cluster.
class Block {
 public:
  template <class Body>
  static Statistics run(const Launch& launch, Body body) {
    Block block(launch);
    block.body_ = [&](Emulated& p) { body(p); };
    block.run_all();
    return block.statistics_;
  }

 private:
  friend class Emulated;
  static constexpr int kStack = 96 * 1024;

  struct Fiber {
    std::unique_ptr<char[]> stack;
    jmp_buf at;
    bool started = false, done = false;
    std::unique_ptr<Emulated> p;
  };

  // A meeting of the threads of a warp, a warpgroup or the block: the last to come does the work for all.
  struct Meeting {
    int arrived = 0;
    const char* what = nullptr;
    int64_t round = 0;
  };

  struct Barrier {
    int count = 0, left = 0;
    int64_t bytes = 0;  // that copies still have to bring; below 0 where they came before they were announced
    int64_t phase = 0;

    void advance() {
      if (left == 0 && bytes == 0) left = count, ++phase;
    }
  };

  // A warp's part of a wgmma: its 16 of the 64 rows.
  struct Matrix {
    bool bf16, accumulate, a_mn, b_mn;
    int n;
    uint64_t a, b;
    float* c[32];
    bool done;
  };

  // A box on its way to the shared memory of blocks first … last.
  struct Box {
    TensorMap map;
    int column, row, first, last;
    uint32_t to, barrier;
  };

  explicit Block(const Launch& launch)
      : launch_(launch), all_threads_(launch.threads * launch.cluster),
        memory_(launch.cluster, std::vector<unsigned char>(2048 + launch.shared, 0xff)), seen_(memory_),
        fibers_(all_threads_), warps_(all_threads_ / 32), groups_((all_threads_ + 127) / 128), blocks_(launch.cluster),
        ended_(launch.cluster), pending_(all_threads_ / 32), barriers_(launch.cluster), arguments_(all_threads_) {
    if (launch.threads % 32) emulation_fails("threads of a block are not whole warps");
    if (launch.cluster > 1 && launch.threads % 128) emulation_fails("blocks of a cluster are not whole warpgroups");
  }

  void run_all() {
    for (int t = 0; t < all_threads_; ++t) {
      fibers_[t].stack.reset(new char[kStack]);
      fibers_[t].p = std::make_unique<Emulated>(this, t / launch_.threads, t % launch_.threads, t);
    }
    const int warps = all_threads_ / 32;
    for (int left = all_threads_; left > 0; ++round_) {
      const int64_t before = progress_;
      for (int w = 0; w < warps; ++w) {
        const int warp = launch_.backwards ? warps - 1 - w : w;
        for (int64_t seen = -1; seen != progress_;) {  // as far as this warp gets by itself
          seen = progress_;
          for (int lane = 0; lane < 32; ++lane) {
            Fiber& fiber = fibers_[warp * 32 + lane];
            if (fiber.done) continue;
            resume(fiber);
            if (fiber.done) --left, ++progress_, ++ended_[(warp * 32 + lane) / launch_.threads];
          }
        }
      }
      if (progress_ != before || left == 0) continue;
      if (boxes_.empty()) emulation_fails("deadlock, or threads of a warp went different ways");
      land();
    }
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    entering_ = this;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Block* block = entering_;
    Fiber* fiber = block->running_;
    block->body_(*fiber->p);
    fiber->done = true;
    _longjmp(block->scheduler_, 1);
  }

  void yield() {
    Fiber* fiber = running_;
    if (_setjmp(fiber->at) == 0) _longjmp(scheduler_, 1);
  }

  void meet(Meeting& meeting, int threads, const char* what, const std::function<void()>& work) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) emulation_fails("threads that have to act together do different things");
    if (++meeting.arrived == threads) {
      meeting.arrived = 0;
      ++meeting.round;
      ++progress_;
      work();
      return;
    }
    for (const int64_t round = meeting.round; meeting.round == round;) yield();
  }

  unsigned char* at(int rank, uint32_t address, int bytes) {
    if (address < 2048 || address % bytes || address + bytes > memory_[rank].size())
      emulation_fails("shared memory: a wild or misaligned address");
    return memory_[rank].data() + address;
  }

  Barrier& barrier(int rank, uint32_t at) {
    if (ended_[rank] == launch_.threads) emulation_fails("shared memory of a block of the cluster that has ended");
    const auto found = barriers_[rank].find(at);
    if (found == barriers_[rank].end()) emulation_fails("mbarrier: not initialised");
    return found->second;
  }

  // One box arrives: the order among them is nobody's promise.
  void land() {
    const size_t which = launch_.backwards ? boxes_.size() - 1 : 0;
    const Box box = boxes_[which];
    boxes_.erase(boxes_.begin() + which);
    ++progress_;
    ++statistics_.tiles;
    for (int rank = box.first; rank <= box.last; ++rank) {
      for (int r = 0; r < box.map.box_rows; ++r)
        for (int c = 0; c < box.map.box_columns; ++c) {
          const int64_t row = int64_t(box.row) + r, column = int64_t(box.column) + c;
          const bool inside = row >= 0 && row < box.map.rows && column >= 0 && column < box.map.columns;
          if (!inside && launch_.defect == Defect::no_edges) continue;
          uint16_t bits = 0;
          if (inside)
            std::memcpy(&bits, static_cast<const char*>(box.map.from) + row * box.map.pitch + column * 2, 2);
          uint32_t address = box.to + r * box.map.box_columns * 2 + c * 2;
          address ^= (address >> 7 & 7) << 4;
          std::memcpy(at(rank, address, 2), &bits, 2);
          std::memcpy(&seen_[rank][address], &bits, 2);
        }
      Barrier& reached = barrier(rank, box.barrier);
      reached.bytes -= box.map.box_rows * box.map.box_columns * 2;
      reached.advance();
    }
  }

  static float widen(bool bf16, uint16_t bits) {
    const int exponent_bits = bf16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
    const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    float value;
    if (exponent == (1 << exponent_bits) - 1)
      value = mantissa ? std::nanf("") : INFINITY;
    else if (exponent == 0)
      value = std::ldexp(float(mantissa), 1 - bias - mantissa_bits);
    else
      value = std::ldexp(float(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
    return bits >> 15 ? -value : value;
  }

  // c + Σ a b as a tensor core may add: every term cut (towards zero) one bit below the last bit that an fp32 as large
  // as the largest of them has, then the sum cut to fp32.
  template <class A, class B>
  static float dot(float c, A a, B b) {
    double terms[17], largest = std::abs(double(c));
    terms[16] = c;
    for (int k = 0; k < 16; ++k) {
      terms[k] = double(a(k)) * double(b(k));
      largest = std::max(largest, std::abs(terms[k]));
    }
    if (!(largest <= 3e38)) return std::nanf("");  // what the kernels exclude, or poison
    if (largest == 0) return 0;
    int exponent;
    std::frexp(largest, &exponent);
    const double last = std::ldexp(1.0, exponent - 25), scale = std::ldexp(1.0, 25 - exponent);
    int64_t sum = 0;
    for (const double term : terms) sum += int64_t(term * scale);
    const double exact = double(sum) * last;
    float result = float(exact);
    if (std::abs(double(result)) > std::abs(exact)) result = std::nextafter(result, 0.0f);
    return result;
  }

  // Element (mn, k) of a wgmma operand with 128-byte swizzle. MN-major: rows of 64 of mn, one a k; the next 64 are
  // `leading` away, the next 8 of k `stride`. K-major: rows of 64 of k, one of each mn; the next 8 of mn are `stride`
  // away, and the start may be within a row.
  float element(int rank, bool bf16, bool mn_major, uint64_t descriptor, int mn, int k) {
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) emulation_fails("wgmma: only the 128-byte swizzle is emulated");
    if (descriptor >> 49 & 7 || start % 1024 > (mn_major ? 0 : 96)) emulation_fails("wgmma: operand not on an atom");
    if (launch_.defect == Defect::offsets) std::swap(leading, stride);
    uint32_t address = mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
    if (launch_.defect != Defect::no_swizzle) address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    if (address + 2 > seen_[rank].size()) emulation_fails("wgmma: operand outside shared memory");
    std::memcpy(&bits, seen_[rank].data() + address, 2);
    return widen(bf16, bits);
  }

  // D fragment of m64nNk16: lane / 4 + 8 · (i / 2 % 2) of a warp's 16 rows, column 8 · (i / 4) + lane % 4 · 2 + i % 2.
  void multiply(int warp, const Matrix& m) {
    ++statistics_.wgmma;
    const int rank = warp * 32 / launch_.threads;
    float a[16][16];
    std::vector<float> b(m.n * 16);
    for (int k = 0; k < 16; ++k) {
      for (int r = 0; r < 16; ++r) a[r][k] = element(rank, m.bf16, m.a_mn, m.a, warp % 4 * 16 + r, k);
      for (int n = 0; n < m.n; ++n) b[n * 16 + k] = element(rank, m.bf16, m.b_mn, m.b, n, k);
    }
    for (int lane = 0; lane < 32; ++lane) {
      std::vector<float>& accumulators = results_[warp][m.c[lane]];
      for (int i = 0; i < m.n / 2; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        accumulators[i] = dot(m.accumulate ? accumulators[i] : 0.0f, [&](int k) { return a[row][k]; },
                              [&](int k) { return b[column * 16 + k]; });
      }
    }
  }

  static thread_local Block* entering_;

  Launch launch_;
  int all_threads_;
  std::vector<std::vector<unsigned char>> memory_, seen_;  // a block's, as threads see it and as wgmma does
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, groups_, blocks_;
  Meeting cluster_;
  std::vector<int> ended_;  // threads of a block
  std::deque<Box> boxes_;
  std::vector<std::deque<std::vector<Matrix>>> pending_;         // a warp's groups of wgmma, the last one open
  std::map<int, std::map<float*, std::vector<float>>> results_;  // of pending ones; registers hold NaNs meanwhile
  std::vector<std::map<uint32_t, Barrier>> barriers_;
  struct Argument {
    uint32_t at;
    const uint32_t* in;
    uint32_t* out;
    uint32_t b[2];
    float* c;
    bool flag;
    uint64_t descriptors[2];
  };
  std::vector<Argument> arguments_;
  std::function<void(Emulated&)> body_;
  jmp_buf scheduler_;
  Fiber* running_ = nullptr;
  int64_t progress_ = 0, round_ = 0;
  uint32_t ballot_ = 0;
  Statistics statistics_;
};

inline thread_local Block* Block::entering_ = nullptr;

inline int Emulated::threads() const { return block_->launch_.threads; }
inline int Emulated::blocks() const { return block_->launch_.blocks; }
inline int64_t Emulated::block_x() const { return block_->launch_.block_x + rank_; }
inline int Emulated::block_y() const { return block_->launch_.block_y; }
inline int Emulated::block_z() const { return block_->launch_.block_z; }

inline void Emulated::sync() {
  if (block_->launch_.defect == Defect::no_barrier) return;
  block_->meet(block_->blocks_[rank_], threads(), "barrier", [] {});
}

inline void Emulated::cluster_sync() {
  if (block_->launch_.defect == Defect::no_cluster) return;
  block_->meet(block_->cluster_, block_->all_threads_, "cluster barrier", [] {});
}

inline uint32_t Emulated::ballot(bool value) {
  Block& b = *block_;
  b.arguments_[id_].flag = value;
  uint32_t* out = &b.arguments_[id_].b[0];
  b.meet(b.warps_[id_ / 32], 32, "ballot", [&] {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(b.arguments_[id_ / 32 * 32 + lane].flag) << lane;
    for (int lane = 0; lane < 32; ++lane) b.arguments_[id_ / 32 * 32 + lane].b[0] = bits;
  });
  return *out;
}

inline uint32_t Emulated::pack_bf16(float low, float high) {
  if (block_->launch_.defect == Defect::plain_sum) return 0;
  const auto nearest = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return nearest(low) | nearest(high) << 16;
}

// Nearest, ties to even; an overflow is an infinity.
inline uint32_t Emulated::pack_fp16(float low, float high) {
  const auto nearest = [](float value) -> uint32_t {
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::abs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | uint32_t(std::nearbyint(std::ldexp(size, 24)));
    int exponent;
    const float fraction = std::frexp(size, &exponent);
    return sign | (uint32_t((exponent + 13) << 10) + uint32_t(std::nearbyint(std::ldexp(fraction, 11))));
  };
  return nearest(low) | nearest(high) << 16;
}

inline uint32_t Emulated::shuffle_xor(uint32_t value, int mask) {
  Block& b = *block_;
  b.arguments_[id_].b[1] = value;
  b.meet(b.warps_[id_ / 32], 32, "shuffle", [&] {
    const int first = id_ / 32 * 32, other = b.launch_.defect == Defect::no_exchange ? 0 : mask;
    for (int lane = 0; lane < 32; ++lane)
      b.arguments_[first + lane].b[0] = b.arguments_[first + (lane ^ other)].b[1];
  });
  return b.arguments_[id_].b[0];
}

inline void Emulated::load_global16(const void* from, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation_fails("global memory: a misaligned 16-byte load");
  std::memcpy(words, from, 16);
}

inline void Emulated::store_global16(void* to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation_fails("global memory: a misaligned 16-byte store");
  std::memcpy(to, words, 16);
}

template <class T>
T Emulated::load(uint32_t at) {
  T value;
  std::memcpy(&value, block_->at(rank_, at, sizeof(T)), sizeof(T));
  return value;
}

inline void Emulated::store(uint32_t at, const void* from, int bytes) {
  std::memcpy(block_->at(rank_, at, bytes), from, bytes);
  if (block_->launch_.late)
    unfenced_.emplace_back(at, bytes);
  else
    std::memcpy(&block_->seen_[rank_][at], from, bytes);
}

inline void Emulated::cp_async16(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulation_fails("cp.async: more bytes than 16");
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation_fails("cp.async: a misaligned source");
  if (block_->launch_.defect == Defect::no_zeros && bytes == 0) return;
  Copy copy{to, {}, from, bytes};
  block_->at(rank_, to, 16);
  if (!block_->launch_.late) {
    std::memcpy(copy.bytes, from, bytes);
    store(to, copy.bytes, 16);
  } else {
    copies_.back().push_back(copy);
  }
}

inline void Emulated::land() {
  for (Copy& copy : copies_.front()) {
    std::memcpy(copy.bytes, copy.from, copy.count);
    store(copy.to, copy.bytes, 16);
  }
  copies_.pop_front();
}

// Lanes 8 i … 8 i + 7 name the rows of matrix i. Lane t gets columns 2 (t % 4) and + 1 of row t / 4; with .trans, rows
// 2 (t % 4) and + 1 of column t / 4.
inline void Emulated::ldmatrix_any(uint32_t at, uint32_t (&registers)[4], bool trans) {
  Block& b = *block_;
  b.arguments_[id_].at = at;
  b.arguments_[id_].out = registers;
  b.meet(b.warps_[id_ / 32], 32, trans ? "ldmatrix.trans" : "ldmatrix", [&] {
    const int first = id_ / 32 * 32;
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      int banks[8] = {};
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = b.arguments_[first + 8 * i + row].at;
        std::memcpy(matrix[row], b.at(rank_, address, 16), 16);
        b.statistics_.bank_conflicts += banks[address / 16 % 8]++ > 0;
      }
      for (int t = 0; t < 32; ++t) {
        const int r = t % 4 * 2, c = t / 4;
        b.arguments_[first + t].out[i] = trans == (b.launch_.defect == Defect::transposed)
                                             ? matrix[c][r] | uint32_t(matrix[c][r + 1]) << 16
                                             : matrix[r][c] | uint32_t(matrix[r + 1][c]) << 16;
      }
    }
  });
}

inline void Emulated::mma_any(bool bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block& b = *block_;
  Block::Argument& mine = b.arguments_[id_];
  mine.in = a;
  mine.b[0] = b0;
  mine.b[1] = b1;
  mine.c = c;
  b.meet(b.warps_[id_ / 32], 32, "mma", [&] {
    ++b.statistics_.mma;
    const int first = id_ / 32 * 32;
    float left[16][16], right[16][8];
    for (int t = 0; t < 32; ++t) {
      const Block::Argument& lane = b.arguments_[first + t];
      const int group = t >> 2, in_group = t % 4;
      for (int i = 0; i < 8; ++i) {
        int source = i / 2;
        if (b.launch_.defect == Defect::fragment && (source == 1 || source == 2)) source = 3 - source;
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        left[row][column] = Block::widen(bf16, uint16_t(lane.in[source] >> i % 2 * 16));
      }
      for (int i = 0; i < 4; ++i)
        right[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] =
            Block::widen(bf16, uint16_t(lane.b[i / 2] >> i % 2 * 16));
    }
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 4; ++i) {
        const int row = (t >> 2) + (i < 2 ? 0 : 8), column = t % 4 * 2 + (i & 1);
        float& c = b.arguments_[first + t].c[i];
        c = Block::dot(c, [&](int k) { return left[row][k]; }, [&](int k) { return right[k][column]; });
      }
  });
}

inline void Emulated::barrier_init(uint32_t at, int arrivals) {
  block_->at(rank_, at, 8);
  block_->barriers_[rank_][at] = {arrivals, arrivals, 0, 0};
}

inline void Emulated::barrier_arrive(uint32_t at) { barrier_arrive_at(at, rank_); }

inline void Emulated::barrier_arrive_at(uint32_t at, int rank) {
  Block::Barrier& barrier = block_->barrier(block_->launch_.defect == Defect::own_free ? rank_ : rank, at);
  ++block_->progress_;
  if (barrier.left == 0) emulation_fails("mbarrier: more arrivals than it waits for");
  --barrier.left;
  barrier.advance();
  for (const int64_t round = block_->round_; block_->round_ == round;) block_->yield();
}

// Arrives, once the barrier knows of so many bytes more.
inline void Emulated::barrier_expect(uint32_t at, int bytes) {
  block_->barrier(rank_, at).bytes += bytes;
  barrier_arrive(at);
}

// Until the phase of this parity is complete: the phase under way has the other parity.
inline void Emulated::barrier_wait(uint32_t at, int parity) {
  const Block::Barrier& barrier = block_->barrier(rank_, at);
  if (block_->launch_.defect == Defect::early_free && thread_ < 128) return;
  if (block_->launch_.defect == Defect::early_read && thread_ >= 128) return;
  while (barrier.phase % 2 == parity) block_->yield();
}

inline void Emulated::load_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  add_tile(to, map, column, row, barrier, rank_, rank_);
}

inline void Emulated::load_tile_to_all(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  add_tile(to, map, column, row, barrier, 0, block_->launch_.cluster - 1);
}

inline void Emulated::add_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, int first,
                               int last) {
  if (reinterpret_cast<uintptr_t>(map.from) % 16 || map.pitch % 16 || map.rows < 1 || map.columns < 1)
    emulation_fails("tensor map: a start or a pitch that is not on 16 bytes, or an empty matrix");
  if (map.box_columns != 64 || map.box_rows < 1 || map.box_rows > 256)
    emulation_fails("tensor map: a box is 1 to 256 rows of the swizzle's 128 bytes");
  if (to % 1024) emulation_fails("copy engine: a box that does not start on a swizzle atom");
  block_->boxes_.push_back({map, column, row, first, last, to, barrier});
  if (!block_->launch_.late) block_->land();
}

inline void Emulated::fence_async() {
  if (block_->launch_.defect == Defect::no_fence) return;
  for (const auto& [at, bytes] : unfenced_)
    std::memcpy(&block_->seen_[rank_][at], &block_->memory_[rank_][at], bytes);
  unfenced_.clear();
}

inline void Emulated::wgmma_any(bool bf16, bool a_mn, bool b_mn, float* c, int n, uint64_t a, uint64_t b_,
                                bool accumulate) {
  Block& b = *block_;
  if (!fenced_) emulation_fails("wgmma without wgmma.fence");
  Block::Argument& mine = b.arguments_[id_];
  mine.c = c;
  mine.descriptors[0] = a;
  mine.descriptors[1] = b_;
  mine.flag = accumulate;
  b.meet(b.groups_[id_ / 128], 128, "wgmma", [&] {
    const int first = id_ / 128 * 128;
    for (int w = 0; w < 4; ++w) {
      const int warp = first / 32 + w;
      Block::Matrix matrix{bf16, accumulate, a_mn, b_mn, n, a, b_, {}, false};
      for (int lane = 0; lane < 32; ++lane) {
        const Block::Argument& other = b.arguments_[warp * 32 + lane];
        if (other.descriptors[0] != a || other.descriptors[1] != b_ || other.flag != accumulate)
          emulation_fails("wgmma: threads of a warpgroup disagree");
        matrix.c[lane] = other.c;
        auto& result = b.results_[warp][other.c];
        if (result.empty()) {
          result.assign(other.c, other.c + n / 2);
          std::memset(other.c, 0xff, n / 2 * sizeof(float));
        }
      }
      if (b.pending_[warp].empty()) b.pending_[warp].emplace_back();
      if (b.launch_.late) {
        b.multiply(warp, matrix);
        matrix.done = true;
      }
      b.pending_[warp].back().push_back(matrix);
    }
  });
}

inline void Emulated::wgmma_commit() {
  Block& b = *block_;
  b.meet(b.warps_[id_ / 32], 32, "wgmma.commit", [&] { b.pending_[id_ / 32].emplace_back(); });
}

inline void Emulated::wgmma_wait_any(int pending) {
  Block& b = *block_;
  if (b.launch_.defect == Defect::no_wait && pending > 0) return;
  b.meet(b.warps_[id_ / 32], 32, "wgmma.wait", [&] {
    const int warp = id_ / 32;
    auto& groups = b.pending_[warp];
    while (int(groups.size()) > pending + 1) {  // the last is open
      for (const Block::Matrix& matrix : groups.front())
        if (!matrix.done) b.multiply(warp, matrix);
      groups.pop_front();
    }
    if (pending == 0) {
      for (auto& [registers, result] : b.results_[warp])
        std::memcpy(registers, result.data(), result.size() * sizeof(float));
      b.results_[warp].clear();
    }
  });
  if (pending == 0) fenced_ = false;
}

}  // namespace kore_fast
