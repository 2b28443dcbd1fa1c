// The kernels' primitives on a host: a block's threads are fibers of one thread, warp and warpgroup instructions
// exchange registers by the fragment layouts of the PTX ISA (sections "Matrix fragments for mma.m16n8k16",
// "ldmatrix", "Asynchronous warpgroup level matrix instructions"). Written from that document, not from the kernels.
//
// It is unkind on purpose, within what the ISA allows. Shared memory starts as NaNs. One warp runs as far as it can
// before another does, but lets all others run after it arrived at an mbarrier. Either (`late`) copies land as late as
// they may, wgmma sees what threads wrote only after their fence.proxy.async, and reads its operands at once: what was
// not waited for is missing. Or copies land and are seen at once, and wgmma reads as late as it may: what was freed too
// early is overwritten. Accumulators read before wgmma.wait_group are NaNs. A misaligned or wild address, a diverged
// warp, a missing fence or a deadlock is an error.
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
  transposed,   // ldmatrix without .trans
  no_fence,     // fence.proxy.async does nothing
  no_barrier,   // __syncthreads does nothing
  no_zeros,     // cp.async of no bytes leaves what was there
  offsets,      // leading and stride offsets of a wgmma descriptor exchanged
  no_swizzle,   // wgmma reads as if unswizzled
  no_wait,      // wgmma.wait_group returns while one group may still be reading
  early_free,   // the loading warpgroup doesn't wait for a free stage
  plain_sum,    // the second sums are not compensated
};

struct Launch {
  int threads = 0;
  int64_t block_x = 0;
  int block_y = 0, block_z = 0;
  int shared = 0;           // bytes
  bool late = true;         // copies happen at their waits and wgmma at once; else the other way round
  bool backwards = false;   // the last warp runs first
  Defect defect = Defect::none;
};

struct Statistics {
  int64_t bank_conflicts = 0;  // extra cycles of ldmatrix
  int64_t mma = 0, wgmma = 0;
};

class Block;

// What a kernel's body gets: its thread of a block.
class Emulated {
 public:
  Emulated(Block* block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const;
  int64_t block_x() const;
  int block_y() const;
  int block_z() const;
  uint32_t shared() const { return 2048; }  // not 0, as on a device
  void sync();
  uint32_t ballot(bool value);
  uint32_t count_bits(uint32_t bits) { return uint32_t(__builtin_popcount(bits)); }
  uint32_t pack_bf16(float low, float high);
  void load_global16(const void* from, uint32_t (&words)[4]);
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
  void ldmatrix_trans(uint32_t at, uint32_t (&registers)[4]);
  template <auto FORMAT>
  void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_any(int(FORMAT) == 0, c, a, b0, b1);
  }
  void barrier_init(uint32_t at, int arrivals);
  void barrier_arrive(uint32_t at);
  void barrier_wait(uint32_t at, int parity);
  void fence_async();
  template <int COUNT>
  void registers_down() {}
  template <int COUNT>
  void registers_up() {}
  void wgmma_hold(float (&)[64]) {}
  void wgmma_fence() { fenced_ = true; }
  void wgmma_commit();
  template <int PENDING>
  void wgmma_wait() {
    wgmma_wait_any(PENDING);
  }
  template <auto FORMAT>
  void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
    wgmma_any(int(FORMAT) == 0, c, a, b, accumulate);
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
  void wgmma_any(bool bf16, float (&c)[64], uint64_t a, uint64_t b, bool accumulate);
  void wgmma_wait_any(int pending);

  Block* block_;
  int thread_;
  std::deque<std::vector<Copy>> copies_{1};
  std::vector<std::pair<uint32_t, int>> unfenced_;  // what this thread wrote since its last fence.proxy.async
  bool fenced_ = false;
};

// A block of threads and its shared memory.
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
    int64_t phase = 0;
  };

  // A warp's part of a wgmma: its 16 of the 64 rows.
  struct Matrix {
    bool bf16, accumulate;
    uint64_t a, b;
    float* c[32];
  };

  explicit Block(const Launch& launch)
      : launch_(launch), memory_(2048 + launch.shared, 0xff), seen_(memory_), fibers_(launch.threads),
        warps_(launch.threads / 32), groups_((launch.threads + 127) / 128), pending_(launch.threads / 32),
        arguments_(launch.threads) {
    if (launch.threads % 32) emulation_fails("threads of a block are not whole warps");
  }

  void run_all() {
    for (int t = 0; t < launch_.threads; ++t) {
      fibers_[t].stack.reset(new char[kStack]);
      fibers_[t].p = std::make_unique<Emulated>(this, t);
    }
    const int warps = launch_.threads / 32;
    for (int left = launch_.threads; left > 0; ++round_) {
      const int64_t before = progress_;
      for (int w = 0; w < warps; ++w) {
        const int warp = launch_.backwards ? warps - 1 - w : w;
        for (int64_t seen = -1; seen != progress_;) {  // as far as this warp gets by itself
          seen = progress_;
          for (int lane = 0; lane < 32; ++lane) {
            Fiber& fiber = fibers_[warp * 32 + lane];
            if (fiber.done) continue;
            resume(fiber);
            if (fiber.done) --left, ++progress_;
          }
        }
      }
      if (progress_ == before && left > 0) emulation_fails("deadlock, or threads of a warp went different ways");
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

  unsigned char* at(uint32_t address, int bytes) {
    if (address < 2048 || address % bytes || address + bytes > memory_.size())
      emulation_fails("shared memory: a wild or misaligned address");
    return memory_.data() + address;
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

  // Element (mn, k) of a wgmma operand, MN-major with 128-byte swizzle.
  float element(bool bf16, uint64_t descriptor, int mn, int k) {
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) emulation_fails("wgmma: only the 128-byte swizzle is emulated");
    if (descriptor >> 49 & 7 || start % 1024) emulation_fails("wgmma: operand not on a swizzle atom");
    if (launch_.defect == Defect::offsets) std::swap(leading, stride);
    uint32_t address = start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
    if (launch_.defect != Defect::no_swizzle) address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    if (address + 2 > seen_.size()) emulation_fails("wgmma: operand outside shared memory");
    std::memcpy(&bits, seen_.data() + address, 2);
    return widen(bf16, bits);
  }

  // D fragment of m64n128: lane / 4 + 8 · (i / 2 % 2) of a warp's 16 rows, column 8 · (i / 4) + lane % 4 · 2 + i % 2.
  void multiply(int warp, const Matrix& m) {
    ++statistics_.wgmma;
    float a[16][16], b[128][16];
    for (int k = 0; k < 16; ++k) {
      for (int r = 0; r < 16; ++r) a[r][k] = element(m.bf16, m.a, warp % 4 * 16 + r, k);
      for (int n = 0; n < 128; ++n) b[n][k] = element(m.bf16, m.b, n, k);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 64; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float& accumulator = results_[warp][m.c[lane]][i];
        accumulator = dot(m.accumulate ? accumulator : 0.0f, [&](int k) { return a[row][k]; },
                          [&](int k) { return b[column][k]; });
      }
  }

  static thread_local Block* entering_;

  Launch launch_;
  std::vector<unsigned char> memory_, seen_;  // as threads see it, as wgmma does
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, groups_;
  Meeting all_;
  std::vector<std::deque<std::vector<Matrix>>> pending_;         // a warp's groups of wgmma, the last one open
  std::map<int, std::map<float*, std::vector<float>>> results_;  // of pending ones; registers hold NaNs meanwhile
  std::map<uint32_t, Barrier> barriers_;
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
inline int64_t Emulated::block_x() const { return block_->launch_.block_x; }
inline int Emulated::block_y() const { return block_->launch_.block_y; }
inline int Emulated::block_z() const { return block_->launch_.block_z; }

inline void Emulated::sync() {
  if (block_->launch_.defect == Defect::no_barrier) return;
  block_->meet(block_->all_, threads(), "barrier", [] {});
}

inline uint32_t Emulated::ballot(bool value) {
  Block& b = *block_;
  b.arguments_[thread_].flag = value;
  uint32_t* out = &b.arguments_[thread_].b[0];
  b.meet(b.warps_[thread_ / 32], 32, "ballot", [&] {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(b.arguments_[thread_ / 32 * 32 + lane].flag) << lane;
    for (int lane = 0; lane < 32; ++lane) b.arguments_[thread_ / 32 * 32 + lane].b[0] = bits;
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

inline void Emulated::load_global16(const void* from, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation_fails("global memory: a misaligned 16-byte load");
  std::memcpy(words, from, 16);
}

template <class T>
T Emulated::load(uint32_t at) {
  T value;
  std::memcpy(&value, block_->at(at, sizeof(T)), sizeof(T));
  return value;
}

inline void Emulated::store(uint32_t at, const void* from, int bytes) {
  std::memcpy(block_->at(at, bytes), from, bytes);
  if (block_->launch_.late)
    unfenced_.emplace_back(at, bytes);
  else
    std::memcpy(&block_->seen_[at], from, bytes);
}

inline void Emulated::cp_async16(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulation_fails("cp.async: more bytes than 16");
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation_fails("cp.async: a misaligned source");
  if (block_->launch_.defect == Defect::no_zeros && bytes == 0) return;
  Copy copy{to, {}, from, bytes};
  block_->at(to, 16);
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

// Lanes 8 i … 8 i + 7 name the rows of matrix i. With .trans, lane t gets rows 2 (t % 4) and + 1 of column t / 4.
inline void Emulated::ldmatrix_trans(uint32_t at, uint32_t (&registers)[4]) {
  Block& b = *block_;
  b.arguments_[thread_].at = at;
  b.arguments_[thread_].out = registers;
  b.meet(b.warps_[thread_ / 32], 32, "ldmatrix", [&] {
    const int first = thread_ / 32 * 32;
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      int banks[8] = {};
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = b.arguments_[first + 8 * i + row].at;
        std::memcpy(matrix[row], b.at(address, 16), 16);
        b.statistics_.bank_conflicts += banks[address / 16 % 8]++ > 0;
      }
      for (int t = 0; t < 32; ++t) {
        const int r = t % 4 * 2, c = t / 4;
        b.arguments_[first + t].out[i] = b.launch_.defect == Defect::transposed
                                             ? matrix[c][r] | uint32_t(matrix[c][r + 1]) << 16
                                             : matrix[r][c] | uint32_t(matrix[r + 1][c]) << 16;
      }
    }
  });
}

inline void Emulated::mma_any(bool bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block& b = *block_;
  Block::Argument& mine = b.arguments_[thread_];
  mine.in = a;
  mine.b[0] = b0;
  mine.b[1] = b1;
  mine.c = c;
  b.meet(b.warps_[thread_ / 32], 32, "mma", [&] {
    ++b.statistics_.mma;
    const int first = thread_ / 32 * 32;
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
  block_->at(at, 8);
  block_->barriers_[at] = {arrivals, arrivals, 0};
}

inline void Emulated::barrier_arrive(uint32_t at) {
  const auto found = block_->barriers_.find(at);
  if (found == block_->barriers_.end()) emulation_fails("mbarrier: not initialised");
  Block::Barrier& barrier = found->second;
  ++block_->progress_;
  if (--barrier.left == 0) barrier.left = barrier.count, ++barrier.phase;
  for (const int64_t round = block_->round_; block_->round_ == round;) block_->yield();
}

// Until the phase of this parity is complete: the phase under way has the other parity.
inline void Emulated::barrier_wait(uint32_t at, int parity) {
  const auto found = block_->barriers_.find(at);
  if (found == block_->barriers_.end()) emulation_fails("mbarrier: not initialised");
  if (block_->launch_.defect == Defect::early_free && thread_ < 128) return;
  while (found->second.phase % 2 == parity) block_->yield();
}

inline void Emulated::fence_async() {
  if (block_->launch_.defect == Defect::no_fence) return;
  for (const auto& [at, bytes] : unfenced_) std::memcpy(&block_->seen_[at], &block_->memory_[at], bytes);
  unfenced_.clear();
}

inline void Emulated::wgmma_any(bool bf16, float (&c)[64], uint64_t a, uint64_t b_, bool accumulate) {
  Block& b = *block_;
  if (!fenced_) emulation_fails("wgmma without wgmma.fence");
  Block::Argument& mine = b.arguments_[thread_];
  mine.c = c;
  mine.descriptors[0] = a;
  mine.descriptors[1] = b_;
  mine.flag = accumulate;
  b.meet(b.groups_[thread_ / 128], 128, "wgmma", [&] {
    const int first = thread_ / 128 * 128;
    for (int w = 0; w < 4; ++w) {
      const int warp = first / 32 + w;
      Block::Matrix matrix{bf16, accumulate, a, b_, {}};
      for (int lane = 0; lane < 32; ++lane) {
        const Block::Argument& other = b.arguments_[warp * 32 + lane];
        if (other.descriptors[0] != a || other.descriptors[1] != b_ || other.flag != accumulate)
          emulation_fails("wgmma: threads of a warpgroup disagree");
        matrix.c[lane] = other.c;
        auto& result = b.results_[warp][other.c];
        if (result.empty()) {
          result.assign(other.c, other.c + 64);
          std::memset(other.c, 0xff, 64 * sizeof(float));
        }
      }
      if (b.pending_[warp].empty()) b.pending_[warp].emplace_back();
      b.pending_[warp].back().push_back(matrix);
      if (b.launch_.late) {
        b.multiply(warp, matrix);
        b.pending_[warp].back().back().a = ~uint64_t(0);  // done
      }
    }
  });
}

inline void Emulated::wgmma_commit() {
  Block& b = *block_;
  b.meet(b.warps_[thread_ / 32], 32, "wgmma.commit", [&] { b.pending_[thread_ / 32].emplace_back(); });
}

inline void Emulated::wgmma_wait_any(int pending) {
  Block& b = *block_;
  if (b.launch_.defect == Defect::no_wait && pending > 0) return;
  b.meet(b.warps_[thread_ / 32], 32, "wgmma.wait", [&] {
    const int warp = thread_ / 32;
    auto& groups = b.pending_[warp];
    while (int(groups.size()) > pending + 1) {  // the last is open
      for (const Block::Matrix& matrix : groups.front())
        if (matrix.a != ~uint64_t(0)) b.multiply(warp, matrix);
      groups.pop_front();
    }
    if (pending == 0) {
      for (auto& [registers, result] : b.results_[warp])
        std::memcpy(registers, result.data(), 64 * sizeof(float));
      b.results_[warp].clear();
    }
  });
  if (pending == 0) fenced_ = false;
}

}  // namespace kore_fast
