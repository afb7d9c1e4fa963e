// The scheduler of engine.h: who runs next, who sleeps, who waits for whom.

#include "engine.h"

#include <algorithm>
#include <cstring>

namespace emulator {

Engine* engine = nullptr;

namespace {
constexpr double kSleep = 3e-4;  // chance per step that a thread, a block or a rank falls asleep
constexpr int kLongestSleep[] = {100, 2000, 30000};  // steps
constexpr double kStraggler = 0.003;  // chance that a thread dawdles after a barrier or shuffle
constexpr int kLongestDawdle = 10000;
constexpr int kVote = -1;  // a kind of meeting that no shuffle's mask is
constexpr double kRevival = 0.02;  // chance per step that a resting thread polls again
}  // namespace

Fault Engine::run(uint64_t seed, long steps) {
  random.seed(seed);
  const double tempers[] = {0.0, 0.0, 0.5, 0.9};
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
    if (sleeps(fiber) || (rank.lazy > 0 && random.chance(rank.lazy))) return;
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

bool Engine::sleeps(Fiber* fiber) {
  Rank& rank = ranks[fiber->rank];
  if (step >= rank.pauses_at && step < rank.pauses_until) return true;
  const bool ended = fiber->ended;  // its block may be gone; its stores still land
  const long until = std::max(rank.asleep_until, ended ? 0 : fiber->block->asleep_until);
  if (step < std::max(until, fiber->asleep_until)) return true;
  if (!random.chance(kSleep)) return false;
  const long end = step + random.below(kLongestSleep[random.below(3)] / calm);
  switch (random.below(3)) {
    case 0: rank.asleep_until = end; break;
    case 1: (ended ? fiber->asleep_until : fiber->block->asleep_until) = end; break;
    default: fiber->asleep_until = end;
  }
  return true;
}

void Engine::resume(Fiber* fiber) {
  load_shared(fiber->block);
  fiber->block->begun = true;
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
    for (int j = first; j < first + count; ++j) {
      Fiber* fiber = blocks[i]->fibers[j];
      if (random.chance(kStraggler)) fiber->asleep_until = step + random.below(kLongestDawdle / calm);
      wake(fiber);
    }
  }
  give_way(0.5);
}

// What the lanes of this warp bring, when all of them have come for the same kind of exchange.
float* Engine::exchanged(float value, int kind) {
  Block* block = current->block;
  const int warp = current->thread / kWarpLanes;
  float* lanes = block->lanes[current->shuffles++ % 2].data() + warp * kWarpLanes;
  lanes[current->thread % kWarpLanes] = value;
  meet(block->warps[warp], kind, &block, 1, warp * kWarpLanes, kWarpLanes);
  return lanes;
}

float Engine::shuffle_xor(float value, int mask) {
  return exchanged(value, mask)[current->thread % kWarpLanes ^ mask];
}

bool Engine::warp_all(bool each) {
  const float* lanes = exchanged(each, kVote);
  return std::all_of(lanes, lanes + kWarpLanes, [](float said) { return said != 0; });
}

}  // namespace emulator
