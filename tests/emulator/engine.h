// A small GPU: blocks of threads under a random scheduler, stores that land late and in pieces.
//
// Every CUDA thread is a fiber. At each poll, barrier, shuffle and (now and then) push, the thread
// gives way and the scheduler picks another one at random. Stores to global memory wait in the
// thread's buffer and land word by word, in any order among different addresses. Stores into the
// rank's own memory have landed before its kernel counts as complete; pushes to peers may still be
// under way then. Knows nothing of the kernels it runs, and no time but its own steps.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Kernel {
  void (*body)(const void* params);
  size_t params_bytes;
  char* shared_begin;  // its __shared__ variables; null if it has none
  char* shared_end;
};

struct Store {
  char* at;
  uint64_t value;
  int bytes;  // 4, or 8 for an access that cannot be seen in halves
  bool own;   // into memory of the rank that stores
};

// What the lanes of a warp, the threads of a block or of a cluster meet at.
struct Meeting {
  int arrived = 0;
  int kind = 0;  // what the first came for; the others must come for the same
};

struct Bytes16 {
  uint64_t low, high;
};

struct Launch;
struct Fiber;

struct Block {
  Launch* launch;
  int index;
  int running;  // threads that have not ended
  bool begun = false, triggered = false;
  long asleep_until = 0;
  std::vector<char> shared;  // while another block's variables are in place
  Meeting barrier;
  Meeting* cluster_barrier;
  std::vector<Meeting> warps;
  std::vector<float> lanes[2];  // what shuffles exchange; two sets take turns
  std::vector<Fiber*> fibers;
  std::vector<Fiber*> readers;  // who waits for what other blocks of the cluster send
};

struct Fiber {
  Block* block = nullptr;
  int rank = 0, thread = 0, shuffles = 0;
  bool runnable = false, ended = true, listed = false, begun = false, resting = false;
  long asleep_until = 0;
  std::vector<std::pair<const char*, Bytes16>> polled;  // what it last saw there
  std::vector<Store> stores;
  std::unique_ptr<char[]> stack;
  ucontext_t beginning;
  jmp_buf here;
};

struct Launch {
  int rank;
  const Kernel* kernel;
  int blocks, threads, cluster;
  bool dependent;  // may start when the one before it says so
  Launch* before;
  std::vector<char> params;
  std::vector<int> unstarted;  // numbers of clusters, in random order
  std::vector<std::unique_ptr<Block>> live;
  std::vector<std::unique_ptr<Meeting>> cluster_barriers;
  std::vector<Fiber*> awaiting;  // threads whose dependency_wait() waits for this launch
  int blocks_left, blocks_untriggered, own_stores = 0;
  bool complete = false;
};

struct Rank {
  std::vector<std::unique_ptr<Launch>> stream;
  char* slots_begin = nullptr;  // what peers push into
  char* slots_end = nullptr;
  std::vector<Fiber*> resting;  // who waits for a change, for each 16 bytes of the slots
  int resident = 0;    // blocks
  double lazy = 0;     // chance that a thread of it is passed over
  double landing = 1;  // chance that some stores of a picked thread land
  long asleep_until = 0, pauses_at = -1, pauses_until = -1, dies_at = -1;  // steps
  bool dead = false;
};

enum Fault { kNone = 0, kStuck = 1, kStepsUsedUp = 2, kDiverged = 3, kBadAccess = 4 };

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u + 0x1234567; }
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(size_t n) { return static_cast<int>(next() % n); }
  bool chance(double p) { return static_cast<double>(next() >> 11) * 0x1p-53 < p; }

 private:
  uint64_t state_ = 0;
};

class Engine {
 public:
  Engine(int rank_count, int resident_blocks);
  void enqueue(int rank, const Kernel* kernel, int blocks, int threads, int cluster, bool dependent,
               const void* params);
  Fault run(uint64_t seed, long steps);

  // What the primitives need, called by the running thread.
  void give_way(double chance);
  void poll(const void* at);
  void meet(Meeting& meeting, int kind, Block* const* blocks, int block_count, int first,
            int count);
  float shuffle_xor(float value, int mask);
  bool warp_all(bool each);
  void store(void* at, uint64_t value, int bytes);
  uint64_t load(const void* at, int bytes) const;
  void land_all(bool only_own);
  void* in_cluster(void* at, int block);  // the same shared variable of another block
  void rest_till_woken();
  void wake_readers(int block);  // of the cluster
  void dependency_wait();
  void dependents_launch();

  std::vector<Rank> ranks;
  Fiber* current = nullptr;
  long step = 0;
  Random random;
  int calm = 1;  // how many times shorter sleeps are

 private:
  Block* block_of_cluster(int number);
  static void begin();
  void end_thread();
  void to_scheduler();
  void resume(Fiber* fiber);
  void pick_and_run();
  bool sleeps(Fiber* fiber);
  void wake(Fiber* fiber);
  void revive();
  float* exchanged(float value, int kind);
  void load_shared(Block* block);
  void land(Fiber* fiber, size_t which);
  void dispatch(int rank);
  void start_cluster(Launch& launch, int cluster);
  Fiber* idle_fiber();
  void settle(Launch& launch);
  bool all_complete() const;

  int resident_blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::vector<Fiber*> listed_;   // runnable, or with stores under way
  std::vector<Fiber*> resting_;  // polled in vain; some of them may be awake again
  Block* loaded_ = nullptr;     // whose shared variables are in place
  jmp_buf scheduler_;
  Fault fault_ = kNone;
};

extern Engine* engine;

}  // namespace emulator
