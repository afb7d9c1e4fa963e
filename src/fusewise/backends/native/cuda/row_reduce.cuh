// One number per row out of one number per thread, in a fixed order: the same bits on every rank.
//
// A row is handled by one block, or by the kBlocks blocks of one cluster. Two buffers take turns
// from row to row: a thread writes a buffer again only after the barrier of the row between, which
// all readers of the older row have passed. So one barrier per number is enough.

#ifndef FUSEWISE_ROW_REDUCE_CUH
#define FUSEWISE_ROW_REDUCE_CUH

#include "slots.cuh"

namespace fusewise {

constexpr int kMaxWarps = 32;

template <int kBlocks>
struct RowShared {
  float sums[2][kBlocks * kMaxWarps];
  float maxima[2][kBlocks * kMaxWarps];
};

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

// Puts this warp's number where every block of the row finds it. All threads of the row call it.
template <int kBlocks>
FW_DEVICE void share_over_row(float* buffer, float warp_value) {
  const int warps = thread_count() / kWarp;
  const int warp = thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  if (kBlocks == 1) {
    if (lane == 0) buffer[warp] = warp_value;
    block_barrier();
  } else {
    if (lane < kBlocks) store_in_cluster(buffer + cluster_rank() * warps + warp, lane, warp_value);
    cluster_barrier();
  }
}

// The sum over the row, in every thread. Every warp adds the warps' numbers in the same order.
template <int kBlocks>
FW_DEVICE float row_sum(float* buffer, float value) {
  share_over_row<kBlocks>(buffer, warp_sum(value));
  const int count = kBlocks * (thread_count() / kWarp);
  float sum = 0.0f;
  FW_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    const int at = i * kWarp + thread_index() % kWarp;
    if (at < count) sum += buffer[at];
  }
  return warp_sum(sum);
}

// The largest over the row, NaN if there is one.
template <int kBlocks>
FW_DEVICE float row_max(float* buffer, float value) {
  share_over_row<kBlocks>(buffer, warp_max(value, kWarp));
  const int count = kBlocks * (thread_count() / kWarp);
  float largest = buffer[0];
  FW_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    const int at = i * kWarp + thread_index() % kWarp;
    if (at < count) largest = max_or_nan(largest, buffer[at]);
  }
  return warp_max(largest, kWarp);
}

}  // namespace fusewise

#endif  // FUSEWISE_ROW_REDUCE_CUH
