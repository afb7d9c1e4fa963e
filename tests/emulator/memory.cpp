// The memory of engine.h: store buffers that land late, and shared variables that change places.

#include <cstring>

#include "engine.h"

namespace emulator {

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

// A block that has not begun, or has ended, has no shared memory.
Block* Engine::block_of_cluster(int number) {
  Block* here = current->block;
  const int first = here->index - here->index % here->launch->cluster;
  for (auto& there : here->launch->live) {
    if (there->index == first + number && there->begun && there->running > 0) return there.get();
  }
  fault_ = kBadAccess;
  return here;
}

void* Engine::in_cluster(void* at, int block) {
  Block* here = current->block;
  Block* there = block_of_cluster(block);
  const ptrdiff_t offset = static_cast<char*>(at) - here->launch->kernel->shared_begin;
  return there == here ? at : there->shared.data() + offset;
}

void Engine::rest_till_woken() {
  current->block->readers.push_back(current);
  current->runnable = false;
  to_scheduler();
}

void Engine::wake_readers(int block) {
  auto& readers = block_of_cluster(block)->readers;
  for (Fiber* fiber : readers) wake(fiber);
  readers.clear();
}

}  // namespace emulator
