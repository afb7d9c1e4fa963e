// The streams of engine.h: which kernels may run, where their blocks begin, when they are complete.

#include <algorithm>

#include "engine.h"

namespace emulator {

namespace {
constexpr double kLateStart = 0.1;  // chance that a block begins late
constexpr int kLongestStart = 10000;  // steps
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
    if (random.chance(kLateStart)) block->asleep_until = step + random.below(kLongestStart);
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
      fiber->asleep_until = 0;
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
    fiber->stack.reset(new char[kStackBytes]);  // not zeroed: most of it is never touched
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

}  // namespace emulator
