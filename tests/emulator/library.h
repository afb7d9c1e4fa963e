// The emulator's C interface, and a kernel that copies: what stands before and after ours in a
// stream. The table of kernels is appended by emulator.py.

#pragma once

#include "device.h"

struct CopyParams {
  const unsigned* from;
  unsigned* to;
  long long count;  // words
  int hasty;        // does not wait for its predecessor, as some engines' kernels do not
};

// Lets its successor start at once, as an eager neighbour does; waits for its predecessor, mostly.
inline void copy_words(const void* params) {
  const auto& p = *static_cast<const CopyParams*>(params);
  fusewise::dependents_launch();
  if (p.hasty == 0) fusewise::dependency_wait();
  const int threads = fusewise::thread_count() * fusewise::block_count();
  for (long long i = fusewise::block_index() * fusewise::thread_count() + fusewise::thread_index();
       i < p.count; i += threads) {
    fusewise::store_word(p.to + i, fusewise::load_word(p.from + i));
    emulator::engine->give_way(0.02);
  }
}

extern const emulator::Kernel* const kKernels[];

extern "C" {
void emulator_open(int ranks, int resident_blocks) {
  emulator::engine = new emulator::Engine(ranks, resident_blocks);
}
void emulator_close() {
  delete emulator::engine;
  emulator::engine = nullptr;
}
// Sleeps are that many times shorter.
void emulator_calm(int factor) { emulator::engine->calm = factor; }
void emulator_slots(int rank, char* begin, long long bytes) {
  emulator::Rank& owner = emulator::engine->ranks[rank];
  owner.slots_begin = begin;
  owner.slots_end = begin + bytes;
  owner.resting.assign(bytes / 16, nullptr);
}
void emulator_kill(int rank, long steps) {
  emulator::engine->ranks[rank].dies_at = emulator::engine->step + steps;
}
void emulator_pause(int rank, long after, long steps) {
  emulator::engine->ranks[rank].pauses_at = emulator::engine->step + after;
  emulator::engine->ranks[rank].pauses_until = emulator::engine->step + after + steps;
}
// The size the kernel's parameters must have; -1 if there is no such kernel.
long emulator_params_bytes(int kernel) {
  return static_cast<long>(kKernels[kernel]->params_bytes);
}
void emulator_launch(int rank, int kernel, int blocks, int threads, int cluster, int dependent,
                     const void* params) {
  emulator::engine->enqueue(rank, kKernels[kernel], blocks, threads, cluster, dependent != 0,
                            params);
}
int emulator_run(unsigned long long seed, long steps) {
  return emulator::engine->run(seed, steps);
}
long emulator_steps() { return emulator::engine->step; }
unsigned emulator_round(float value, int format) {  // 0: bf16, 1: fp16, 2: e4m3
  return format == 0 ? fusewise::to_bfloat(value)
                     : format == 1 ? fusewise::to_half(value) : fusewise::to_e4m3(value);
}
}
