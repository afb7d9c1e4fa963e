// Virtual ranks: all ranks of a group in one cooperative grid on one GPU, blockIdx.y the rank.
//
// For tests. The device code is the shipped one; every block waits a random while before it sends
// and before it receives, so that ranks and rows drift apart.

#ifndef FUSEWISE_SKEW_CUH
#define FUSEWISE_SKEW_CUH

#include "slots.cuh"

namespace fusewise {

constexpr unsigned kMaxDelayNs = 4000;  // several times a whole row's exchange

template <class Params>
struct VirtualParams {
  const Params* ranks;
};

struct RandomSkew {
  FW_DEVICE static void before_push(int rank, int row) { wait(rank * 7919 + row * 2); }
  FW_DEVICE static void before_take(int rank, int row) { wait(rank * 7919 + row * 2 + 1); }

  // Half of the places wait; where and how long changes from call to call with the clock.
  FW_DEVICE static void wait(int place) {
    unsigned hash = static_cast<unsigned>(place) * 2654435761u;
    hash ^= static_cast<unsigned>(clock_ns() >> 10) * 2246822519u;
    hash ^= hash >> 15;
    if (hash & 1u) pause_ns((hash >> 1) % kMaxDelayNs);
  }
};

}  // namespace fusewise

#endif  // FUSEWISE_SKEW_CUH
