// The names of primitives.cuh and cluster.cuh, on the emulator's engine.
//
// Same names, same meaning; where the hardware leaves an order open, this leaves it to chance.

#pragma once

#define FUSEWISE_PRIMITIVES_CUH
#define FUSEWISE_CLUSTER_CUH
#define FW_DEVICE inline
#define FW_UNROLL
#define FW_KEEP_LOOP
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section(FW_SHARED_SECTION)))

#include <cmath>
#include <cstring>

#include "engine.h"

namespace fusewise {

using emulator::engine;

struct alignas(16) Words {
  unsigned word[4];
};

enum Kind { kWarpBarrier = 100, kBlockBarrier, kClusterBarrier };
constexpr double kAtPush = 0.1;  // chance to give way

// --- where this thread is

inline int thread_index() { return engine->current->thread; }
inline int thread_count() { return engine->current->block->launch->threads; }
inline int block_index() { return engine->current->block->index; }
inline int block_count() { return engine->current->block->launch->blocks; }
inline int cluster_rank() { return block_index() % engine->current->block->launch->cluster; }

struct Computed {
  template <class T>
  void add(T*&) {}
  void add(unsigned long long&) {}
};

// --- this rank's memory

inline unsigned load_word(const void* at) {
  return static_cast<unsigned>(engine->load(at, 4));
}

inline Words load_words(const void* at) {
  Words v;
  for (int i = 0; i < 4; ++i) v.word[i] = load_word(static_cast<const char*>(at) + 4 * i);
  return v;
}

inline void store_word(void* at, unsigned word) { engine->store(at, word, 4); }

inline void store_two_words(void* at, unsigned low, unsigned high) {
  store_word(at, low);
  store_word(static_cast<char*>(at) + 4, high);
}

inline void store_words(void* at, Words v) {
  for (int i = 0; i < 4; ++i) store_word(static_cast<char*>(at) + 4 * i, v.word[i]);
}

// --- memory shared between ranks

inline unsigned peek_word(const void* at) {
  engine->poll(at);
  return load_word(at);
}

inline Words peek_words(const void* at) {
  engine->poll(at);
  return load_words(at);
}

inline void push_word(void* at, unsigned word) {
  engine->give_way(kAtPush);
  store_word(at, word);
}

inline void push_words(void* at, Words v) {
  engine->give_way(kAtPush);
  store_words(at, v);
}

inline void fence_system() { engine->land_all(false); }

inline bool claim(unsigned* word) {
  if (*word != 0) return false;
  *word = 1;
  return true;
}

// --- threads that meet

inline float shuffle_xor(float value, int mask) { return engine->shuffle_xor(value, mask); }

inline bool warp_all(bool each) { return engine->warp_all(each); }

inline void warp_barrier() {
  using emulator::kWarpLanes;
  engine->land_all(true);
  auto* block = engine->current->block;
  const int warp = engine->current->thread / kWarpLanes;
  engine->meet(block->warps[warp], kWarpBarrier, &block, 1, warp * kWarpLanes, kWarpLanes);
}

inline void block_barrier() {
  engine->land_all(true);
  auto* block = engine->current->block;
  engine->meet(block->barrier, kBlockBarrier, &block, 1, 0, thread_count());
}

inline Words load_shared(const void* at) {
  Words v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

inline void cluster_arrive() {}  // whoever waits meets the others there

inline void cluster_wait() {
  engine->land_all(true);
  auto& launch = *engine->current->block->launch;
  const int first = block_index() - cluster_rank();
  std::vector<emulator::Block*> blocks;
  for (auto& block : launch.live) {
    if (block->index / launch.cluster == first / launch.cluster) blocks.push_back(block.get());
  }
  engine->meet(*engine->current->block->cluster_barrier, kClusterBarrier, blocks.data(),
               static_cast<int>(blocks.size()), 0, thread_count());
}

// A round ends when what is expected in it has come, in whichever order.
struct Inbox {
  int missing, rounds;
  bool expects;

  void settle(int block) {
    if (!expects || missing != 0) return;
    ++rounds;
    expects = false;
    engine->wake_readers(block);
  }
};

inline void inbox_open(Inbox& inbox) { inbox = Inbox{0, 0, false}; }
inline void inboxes_opened() {}

inline void inbox_expect(Inbox& inbox, unsigned bytes) {
  engine->give_way(kAtPush);
  inbox.missing += static_cast<int>(bytes);
  inbox.expects = true;
  inbox.settle(cluster_rank());
}

inline void inbox_await(Inbox& inbox, unsigned parity) {
  engine->give_way(kAtPush);
  while (inbox.rounds % 2 == static_cast<int>(parity)) engine->rest_till_woken();
}

struct ClusterPlace {
  float* word;
  Inbox* inbox;
  int block;
};

inline ClusterPlace place_in_cluster(float* at, Inbox& inbox, int block) {
  return {static_cast<float*>(engine->in_cluster(at, block)),
          static_cast<Inbox*>(engine->in_cluster(&inbox, block)), block};
}

inline void send_in_cluster(ClusterPlace place, float value) {
  engine->give_way(kAtPush);
  *place.word = value;
  place.inbox->missing -= static_cast<int>(sizeof value);
  place.inbox->settle(place.block);
}

// --- streams and time

inline void dependency_wait(const Computed& = {}) { engine->dependency_wait(); }
inline void dependents_launch() { engine->dependents_launch(); }
inline unsigned long long clock_ns() { return static_cast<unsigned long long>(engine->step); }
inline void pause_ns(unsigned) { engine->give_way(1.0); }

// --- numbers

inline unsigned bits_of(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float reciprocal_sqrt(float value) { return 1.0f / std::sqrt(value); }
inline float reciprocal_sqrt_of_normal(float value) { return reciprocal_sqrt(value); }
inline float absolute(float value) { return std::fabs(value); }
inline unsigned smaller(unsigned a, unsigned b) { return std::min(a, b); }
inline unsigned larger(unsigned a, unsigned b) { return std::max(a, b); }
inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? float_of(0x7fffffffu) : std::fmax(a, b);
}

inline float half_to_float(unsigned half) {
  const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, rest = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | rest << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | rest << 13);
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// `value` to a format of `exponent_bits` and `fraction_bits`, to nearest even; larger than the
// largest finite number becomes `overflow`.
inline unsigned rounded(float value, int exponent_bits, int fraction_bits, float largest,
                        unsigned overflow, unsigned nan) {
  const unsigned sign = (bits_of(value) >> 31) << (exponent_bits + fraction_bits);
  const float size = std::fabs(value);
  if (std::isnan(size)) return nan;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = size > 0 ? std::max(std::ilogb(size), 1 - bias) : 1 - bias;
  const double steps = std::nearbyint(std::ldexp(static_cast<double>(size),
                                                 fraction_bits - exponent));
  if (std::ldexp(steps, exponent - fraction_bits) > largest) return sign | overflow;
  // A carry out of the fraction moves into the exponent by itself.
  const unsigned normal = steps >= (1 << fraction_bits) ? exponent + bias - 1 : 0;
  return sign | ((normal << fraction_bits) + static_cast<unsigned>(steps));
}

inline unsigned to_half(float value) { return rounded(value, 5, 10, 65504.0f, 0x7c00u, 0x7fffu); }
inline unsigned to_half_pair(float low, float high) { return to_half(low) | to_half(high) << 16; }

inline unsigned to_bfloat(float value) {
  if (std::isnan(value)) return 0x7fffu;
  const unsigned bits = bits_of(value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned to_bfloat_pair(float low, float high) {
  return to_bfloat(low) | to_bfloat(high) << 16;
}

inline unsigned to_e4m3(float value) { return rounded(value, 4, 3, 448.0f, 0x7eu, 0x7fu); }
inline unsigned to_e4m3_pair(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }

}  // namespace fusewise
