// One number per row out of one number per thread, in a fixed order: the same bits on every rank.
//
// In three steps, so that a kernel can put its stores where they delay nobody: share() a warp's
// number, meet(), total(). A row is handled by one block, which meets at its barrier, or by the
// kBlocks blocks of one cluster. Those send each other their warps' numbers, and each waits until all
// of them have arrived: a cluster's barrier would wait for every store to global memory as well. What
// a block waits for is all that is ever sent to it, so it may end afterwards.
//
// Two buffers take turns from row to row. A warp sends its number of a row after it has read those
// of the row before, and nobody passes a row without everybody's number. So a buffer is written again
// only when all have read it.

#ifndef FUSEWISE_ROW_REDUCE_CUH
#define FUSEWISE_ROW_REDUCE_CUH

#include "cluster.cuh"
#include "slots.cuh"

namespace fusewise {

constexpr int kMaxWarps = 32;

// What the warps of a row know of each other: a number each. `turn` counts this worker's rows.
template <int kBlocks>
struct RowNumbers {
  alignas(16) float buffers[2][kBlocks * kMaxWarps];
  Inbox inboxes[2];

  FW_DEVICE float* buffer(int turn) { return buffers[turn % 2]; }

  // By one thread, before any block of the row shares.
  FW_DEVICE void open() {
    inbox_open(inboxes[0]);
    inbox_open(inboxes[1]);
  }
};

template <int kBlocks>
struct RowShared {
  RowNumbers<kBlocks> sums;
  RowNumbers<kBlocks> maxima;
};

// Says that the blocks of a row may send each other numbers, once all have met: cluster_wait().
template <int kBlocks>
FW_DEVICE void open_row(RowShared<kBlocks>& shared) {
  if (kBlocks == 1) return;
  if (thread_index() == 0) {
    shared.sums.open();
    shared.maxima.open();
    inboxes_opened();
  }
  cluster_arrive();
}

FW_DEVICE float warp_sum(float value) {
  FW_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

FW_DEVICE float warp_max(float value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) {
    value = max_or_nan(value, shuffle_xor(value, mask));
  }
  return value;
}

// What sharing needs besides the number: by all threads, once a turn, before. Where this lane sends.
template <int kBlocks>
FW_DEVICE ClusterPlace expect_over_row(RowNumbers<kBlocks>& numbers, int turn) {
  if (kBlocks == 1) return {};
  const int warps = thread_count() / kWarp;
  Inbox& inbox = numbers.inboxes[turn % 2];
  if (thread_index() == 0) inbox_expect(inbox, kBlocks * warps * sizeof(float));
  float* mine = numbers.buffer(turn) + cluster_rank() * warps + thread_index() / kWarp;
  return place_in_cluster(mine, inbox, thread_index() % kBlocks);
}

// Puts this warp's number where every block of the row finds it.
template <int kBlocks>
FW_DEVICE void share_over_row(RowNumbers<kBlocks>& numbers, int turn, ClusterPlace place,
                              float warp_value) {
  const int lane = thread_index() % kWarp;
  if (kBlocks > 1) {
    if (lane < kBlocks) send_in_cluster(place, warp_value);
  } else if (lane == 0) {
    numbers.buffer(turn)[thread_index() / kWarp] = warp_value;
  }
}

// All threads of the row call it, between sharing and reading.
template <int kBlocks>
FW_DEVICE void meet_over_row(RowNumbers<kBlocks>& numbers, int turn) {
  if (kBlocks == 1) {
    block_barrier();
  } else {
    inbox_await(numbers.inboxes[turn % 2], turn / 2 % 2);
  }
}

// The sum over the row, in every thread: four partial sums of the warps' numbers, which are broadcast
// loads and no shuffles.
template <int kBlocks>
FW_DEVICE float total_over_row(RowNumbers<kBlocks>& numbers, int turn) {
  const int count = kBlocks * (thread_count() / kWarp);
  const float* buffer = numbers.buffer(turn);
  float part[4] = {};
  FW_UNROLL
  for (int i = 0; i < count; i += 4) {
    const Words four = load_shared(buffer + i);
    FW_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float value = i + j < count ? float_of(four.word[j]) : 0.0f;
      part[j] = i == 0 ? value : part[j] + value;
    }
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The largest over the row, NaN if there is one. All threads of the row call it.
template <int kBlocks>
FW_DEVICE float row_max(RowNumbers<kBlocks>& numbers, int turn, float value) {
  const ClusterPlace place = expect_over_row(numbers, turn);
  share_over_row(numbers, turn, place, warp_max(value, kWarp));
  meet_over_row(numbers, turn);
  const int count = kBlocks * (thread_count() / kWarp);
  const float* buffer = numbers.buffer(turn);
  float largest = buffer[0];
  FW_UNROLL
  for (int i = 1; i < count; ++i) largest = max_or_nan(largest, buffer[i]);
  return largest;
}

}  // namespace fusewise

#endif  // FUSEWISE_ROW_REDUCE_CUH
