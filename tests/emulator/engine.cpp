// The scheduler, the store buffers and the streams of engine.h.

#include "engine.h"

#include <algorithm>
#include <cstring>

namespace emulator {

Engine* engine = nullptr;

namespace {
constexpr double kSleep = 1e-4;  // chance per step that a rank falls asleep, as behind other work
constexpr int kLongestSleep = 5000;
constexpr double kRevival = 0.02;  // chance per step that a resting thread polls again
}  // namespace

Engine::Engine(int rank_count, int resident_blocks)
    : ranks(rank_count), resident_blocks_(resident_blocks) {}

void Engine::enqueue(int rank, const Kernel* kernel, int blocks, int threads, int cluster,
                     bool dependent, const void* params) {
  auto& stream = ranks[rank].stream;
  auto launch = std::make_unique<Launch>();
  launch->rank = rank;
  launch->kernel = kernel;
  launch->blocks = launch->blocks_left = launch->blocks_untriggered = blocks;
  launch->threads = threads;
  launch->cluster = cluster;
  launch->dependent = dependent;
  launch->before = stream.empty() ? nullptr : stream.back().get();
  const char* bytes = static_cast<const char*>(params);
  launch->params.assign(bytes, bytes + kernel->params_bytes);
  for (int i = 0; i < blocks / cluster; ++i) launch->unstarted.push_back(i);
  stream.push_back(std::move(launch));
}

// --- the scheduler

Fault Engine::run(uint64_t seed, long steps) {
  random.seed(seed);
  const double tempers[] = {0.0, 0.0, 0.8, 0.97};
  const double landings[] = {0.1, 0.5, 1.0};
  for (auto& rank : ranks) {
    rank.lazy = tempers[random.below(4)];
    rank.landing = landings[random.below(3)];
    for (auto& launch : rank.stream) {
      for (size_t i = launch->unstarted.size(); i > 1; --i) {
        std::swap(launch->unstarted[i - 1], launch->unstarted[random.below(i)]);
      }
    }
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) dispatch(static_cast<int>(rank));
  for (const long end = step + steps; fault_ == kNone; ++step) {
    if (step == end) return kStepsUsedUp;
    while (!resting_.empty() && (listed_.empty() || random.chance(kRevival))) revive();
    if (listed_.empty()) break;
    pick_and_run();
  }
  loaded_ = nullptr;
  if (fault_ == kNone && !all_complete()) return kStuck;
  for (auto& rank : ranks) rank.stream.clear();
  return fault_;
}

void Engine::pick_and_run() {
  const int picked = random.below(listed_.size());
  Fiber* fiber = listed_[picked];
  Rank& rank = ranks[fiber->rank];
  rank.dead = rank.dead || (rank.dies_at >= 0 && step >= rank.dies_at);
  if (!rank.dead) {
    if (step >= rank.pauses_at && step < rank.pauses_until) return;
    if (step < rank.asleep_until || (rank.lazy > 0 && random.chance(rank.lazy))) return;
    if (random.chance(kSleep)) rank.asleep_until = step + random.below(kLongestSleep);
    if (!fiber->stores.empty() && random.chance(rank.landing)) {
      for (int count = 1 + random.below(fiber->stores.size()); count > 0; --count) {
        land(fiber, random.below(fiber->stores.size()));
      }
    }
    if (fiber->runnable) resume(fiber);
    if (fiber->runnable || !fiber->stores.empty()) return;
  }
  fiber->listed = false;
  listed_[picked] = listed_.back();
  listed_.pop_back();
  if (fiber->ended) idle_.push_back(fiber);
}

void Engine::resume(Fiber* fiber) {
  load_shared(fiber->block);
  current = fiber;
  if (_setjmp(scheduler_) == 0) {
    if (fiber->begun) _longjmp(fiber->here, 1);
    fiber->begun = true;
    setcontext(&fiber->beginning);
  }
  current = nullptr;
}

void Engine::to_scheduler() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler_, 1);
}

void Engine::revive() {
  const int picked = random.below(resting_.size());
  Fiber* fiber = resting_[picked];
  resting_[picked] = resting_.back();
  resting_.pop_back();
  if (fiber->resting) wake(fiber);
}

void Engine::wake(Fiber* fiber) {
  fiber->runnable = true;
  fiber->resting = false;
  if (fiber->listed) return;
  fiber->listed = true;
  listed_.push_back(fiber);
}

// A fiber outlives its thread and serves the next one on the same stack.
void Engine::begin() {
  for (;;) {
    const Launch& launch = *engine->current->block->launch;
    launch.kernel->body(launch.params.data());
    engine->end_thread();
  }
}

void Engine::end_thread() {
  Block& block = *current->block;
  Launch& launch = *block.launch;
  current->runnable = false;
  current->ended = true;
  if (--block.running == 0) {
    --ranks[launch.rank].resident;
    --launch.blocks_left;
    if (!block.triggered) --launch.blocks_untriggered;
    block.triggered = true;
    settle(launch);
    dispatch(launch.rank);
  }
  to_scheduler();
}

// --- streams

void Engine::dispatch(int rank) {
  for (auto& launch : ranks[rank].stream) {
    if (launch->complete) continue;
    const Launch* before = launch->before;
    const bool triggered = launch->dependent && before && before->blocks_untriggered == 0;
    if (before && !before->complete && !triggered) return;
    while (!launch->unstarted.empty()) {
      if (ranks[rank].resident + launch->cluster > resident_blocks_) return;
      const int cluster = launch->unstarted.back();
      launch->unstarted.pop_back();
      start_cluster(*launch, cluster);
    }
  }
}

void Engine::start_cluster(Launch& launch, int cluster) {
  launch.cluster_barriers.push_back(std::make_unique<Meeting>());
  const Kernel& kernel = *launch.kernel;
  for (int i = 0; i < launch.cluster; ++i) {
    auto block = std::make_unique<Block>();
    block->launch = &launch;
    block->index = cluster * launch.cluster + i;
    block->running = launch.threads;
    block->shared.assign(kernel.shared_end - kernel.shared_begin, '\x7f');  // garbage, NaN-free
    block->cluster_barrier = launch.cluster_barriers.back().get();
    block->warps.resize((launch.threads + kWarpLanes - 1) / kWarpLanes);
    for (auto& lanes : block->lanes) lanes.resize(block->warps.size() * kWarpLanes);
    for (int thread = 0; thread < launch.threads; ++thread) {
      Fiber* fiber = idle_fiber();
      fiber->block = block.get();
      fiber->rank = launch.rank;
      fiber->thread = thread;
      fiber->shuffles = 0;
      fiber->polled.clear();
      fiber->ended = false;
      block->fibers.push_back(fiber);
      wake(fiber);
    }
    ++ranks[launch.rank].resident;
    launch.live.push_back(std::move(block));
  }
}

Fiber* Engine::idle_fiber() {
  if (idle_.empty()) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber->beginning);
    fiber->beginning.uc_stack.ss_sp = fiber->stack.get();
    fiber->beginning.uc_stack.ss_size = kStackBytes;
    fiber->beginning.uc_link = nullptr;
    makecontext(&fiber->beginning, &Engine::begin, 0);
    idle_.push_back(fiber.get());
    fibers_.push_back(std::move(fiber));
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void Engine::settle(Launch& launch) {
  if (launch.complete || launch.blocks_left > 0 || launch.own_stores > 0) return;
  launch.complete = true;
  for (Fiber* fiber : launch.awaiting) wake(fiber);
  dispatch(launch.rank);
}

bool Engine::all_complete() const {
  for (const auto& rank : ranks) {
    if (rank.dead) continue;
    for (const auto& launch : rank.stream) {
      if (!launch->complete) return false;
    }
  }
  return true;
}

void Engine::dependency_wait() {
  Launch* before = current->block->launch->before;
  if (before == nullptr || before->complete) return;
  before->awaiting.push_back(current);
  current->runnable = false;
  to_scheduler();
}

void Engine::dependents_launch() {
  Block& block = *current->block;
  if (block.triggered) return;
  block.triggered = true;
  if (--block.launch->blocks_untriggered == 0) dispatch(block.launch->rank);
}

// --- threads that meet

void Engine::give_way(double chance) {
  if (random.chance(chance)) to_scheduler();
}

// Gives way before a look at 16 bytes between ranks. Who has seen them as they are rests until they
// change, or until chance wakes it: polling in vain a thousand times shows nothing new.
void Engine::poll(const void* at) {
  const char* address = static_cast<const char*>(at);
  Rank& rank = ranks[current->rank];
  if (rank.slots_begin <= address && address < rank.slots_end) {
    Bytes16 seen;
    std::memcpy(&seen, address, sizeof seen);
    auto& polled = current->polled;
    auto found = polled.begin();
    while (found != polled.end() && found->first != address) ++found;
    if (found == polled.end()) {
      polled.emplace_back(address, seen);
    } else if (found->second.low == seen.low && found->second.high == seen.high) {
      rank.resting[(address - rank.slots_begin) / 16] = current;
      current->resting = true;
      current->runnable = false;
      resting_.push_back(current);
    } else {
      found->second = seen;
    }
  }
  to_scheduler();
}

// Waits for `count` threads from `first` on of each block; all must come for the same `kind`.
void Engine::meet(Meeting& meeting, int kind, Block* const* blocks, int block_count, int first,
                  int count) {
  if (meeting.arrived > 0 && meeting.kind != kind) fault_ = kDiverged;
  meeting.kind = kind;
  if (++meeting.arrived < block_count * count) {
    current->runnable = false;
    to_scheduler();
    return;
  }
  meeting.arrived = 0;
  for (int i = 0; i < block_count; ++i) {
    for (int j = first; j < first + count; ++j) wake(blocks[i]->fibers[j]);
  }
  give_way(0.5);
}

float Engine::shuffle_xor(float value, int mask) {
  Block* block = current->block;
  const int warp = current->thread / kWarpLanes;
  float* lanes = block->lanes[current->shuffles++ % 2].data() + warp * kWarpLanes;
  lanes[current->thread % kWarpLanes] = value;
  meet(block->warps[warp], mask, &block, 1, warp * kWarpLanes, kWarpLanes);
  return lanes[current->thread % kWarpLanes ^ mask];
}

void Engine::load_shared(Block* block) {
  if (block == loaded_) return;
  for (Block* one : {loaded_, block}) {
    if (one == nullptr || one->shared.empty()) continue;
    char* place = one->launch->kernel->shared_begin;
    if (one == block) {
      std::memcpy(place, one->shared.data(), one->shared.size());
    } else {
      std::memcpy(one->shared.data(), place, one->shared.size());
    }
  }
  loaded_ = block;
}

void Engine::store_in_cluster(float* at, int block, float value) {
  Block* here = current->block;
  const int first = here->index - here->index % here->launch->cluster;
  const ptrdiff_t offset = reinterpret_cast<char*>(at) - here->launch->kernel->shared_begin;
  for (auto& there : here->launch->live) {
    if (there->index != first + block) continue;
    if (there->running == 0) fault_ = kBadAccess;  // a block that ended has no shared memory
    char* target = there.get() == here ? reinterpret_cast<char*>(at)
                                       : there->shared.data() + offset;
    std::memcpy(target, &value, sizeof value);
    return;
  }
  fault_ = kBadAccess;
}

// --- memory

void Engine::store(void* at, uint64_t value, int bytes) {
  char* address = static_cast<char*>(at);
  bool own = true;
  for (size_t r = 0; r < ranks.size(); ++r) {
    const Rank& rank = ranks[r];
    if (static_cast<int>(r) != current->rank && rank.slots_begin <= address &&
        address < rank.slots_end) {
      own = false;
    }
  }
  current->stores.push_back({address, value, bytes, own});
  if (own) ++current->block->launch->own_stores;
}

uint64_t Engine::load(const void* at, int bytes) const {
  const char* address = static_cast<const char*>(at);
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  for (const Store& store : current->stores) {  // a thread sees its own stores, the last one last
    const ptrdiff_t offset = address - store.at;
    if (offset < 0 || offset + bytes > store.bytes) continue;
    value = store.value >> 8 * offset;
    if (bytes == 4) value &= 0xffffffffu;
  }
  return value;
}

// Stores of one thread to one address land in their order; so the oldest of that address goes.
void Engine::land(Fiber* fiber, size_t which) {
  auto& stores = fiber->stores;
  size_t oldest = 0;
  while (stores[oldest].at != stores[which].at) ++oldest;
  const Store store = stores[oldest];
  stores.erase(stores.begin() + static_cast<ptrdiff_t>(oldest));
  std::memcpy(store.at, &store.value, store.bytes);
  for (Rank& rank : ranks) {
    if (store.at < rank.slots_begin || store.at >= rank.slots_end) continue;
    Fiber*& waiting = rank.resting[(store.at - rank.slots_begin) / 16];
    if (waiting != nullptr && waiting->resting) wake(waiting);
    waiting = nullptr;
  }
  if (!store.own) return;
  Launch& launch = *fiber->block->launch;
  --launch.own_stores;
  settle(launch);
}

void Engine::land_all(bool only_own) {
  for (size_t i = 0; i < current->stores.size();) {
    if (only_own && !current->stores[i].own) {
      ++i;
    } else {
      land(current, i);
    }
  }
}

}  // namespace emulator
