// One number per row out of one number per thread, in a fixed order: the same bits on every rank.
//
// In three steps, so that a kernel can put its stores where they delay nobody: share() a warp's
// number, meet(), total(). A row is handled by one block, or by the kBlocks blocks of one cluster. Two
// buffers take turns from row to row: a thread writes a buffer again only after the barrier of the
// row between, which all readers of the older row have passed. So one barrier per number is enough.

#ifndef FUSEWISE_ROW_REDUCE_CUH
#define FUSEWISE_ROW_REDUCE_CUH

#include "slots.cuh"

namespace fusewise {

constexpr int kMaxWarps = 32;

template <int kBlocks>
struct RowShared {
  alignas(16) float sums[2][kBlocks * kMaxWarps];
  alignas(16) float maxima[2][kBlocks * kMaxWarps];
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

// Puts this warp's number where every block of the row finds it.
template <int kBlocks>
FW_DEVICE void share_over_row(float* buffer, float warp_value) {
  const int warp = thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  if (kBlocks == 1) {
    if (lane == 0) buffer[warp] = warp_value;
  } else if (lane < kBlocks) {
    const int warps = thread_count() / kWarp;
    store_in_cluster(buffer + cluster_rank() * warps + warp, lane, warp_value);
  }
}

// All threads of the row call it, between sharing and reading.
template <int kBlocks>
FW_DEVICE void meet_over_row() {
  if (kBlocks == 1) {
    block_barrier();
  } else {
    cluster_barrier();
  }
}

// The sum over the row, in every thread: four partial sums of the warps' numbers, which are broadcast
// loads and no shuffles.
template <int kBlocks>
FW_DEVICE float total_over_row(const float* buffer) {
  const int count = kBlocks * (thread_count() / kWarp);
  float part[4] = {};
  FW_UNROLL
  for (int i = 0; i < count; ++i) part[i % 4] += buffer[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The largest over the row, NaN if there is one. All threads of the row call it.
template <int kBlocks>
FW_DEVICE float row_max(float* buffer, float value) {
  share_over_row<kBlocks>(buffer, warp_max(value, kWarp));
  meet_over_row<kBlocks>();
  const int count = kBlocks * (thread_count() / kWarp);
  float largest = buffer[0];
  FW_UNROLL
  for (int i = 1; i < count; ++i) largest = max_or_nan(largest, buffer[i]);
  return largest;
}

}  // namespace fusewise

#endif  // FUSEWISE_ROW_REDUCE_CUH
