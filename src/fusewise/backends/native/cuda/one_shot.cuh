// One-shot push: every rank sends its rows to every peer, adds what it receives, and normalises.
//
// Per row: load, push to all peers, wait for all peers, add in rank order in fp32, add the
// residual, normalise. A block takes rows worker, worker + workers, ... in rising order, and the
// host launches no more blocks than fit on the device at once. So the smallest row that some rank
// has not finished is being worked on by all ranks, all have pushed it before polling it, and it
// completes: no order among blocks is assumed.
//
// The host fills OneShotParams and passes it by value; `one_shot` is the whole kernel.

#ifndef FUSEWISE_ONE_SHOT_CUH
#define FUSEWISE_ONE_SHOT_CUH

#include "outputs.cuh"

namespace fusewise {

// Mirrored field by field in params.py. Tensors are contiguous, 16-byte aligned, [num_tokens,
// hidden_size] of one element type; hidden_size is a multiple of 8.
struct OneShotParams {
  GroupParams group;
  OutputParams output;
  const void* x;
  const void* residual;  // null: none
  const void* weight;    // [hidden_size]; unused by Output::kSum
  void* residual_out;    // sum + residual; unused by Output::kSum
  int num_tokens;
  int row_vectors;  // 16-byte vectors of a row
  int row_units;    // ceil(row_vectors / 32)
  float inverse_hidden_size;
  float eps;
  float weight_bias;
};

// Writes the norm of one row. All threads of the row call it; `column[i] < 0` marks an idle vector.
template <class Type, int kVectors, int kBlocks, Output kOutput>
FW_DEVICE void write_norm(const OneShotParams& p, RowShared<kBlocks>& shared, int row, int turn,
                          const int (&column)[kVectors], const Floats<Type> (&total)[kVectors],
                          const Words (&weight)[kVectors]) {
  float squares = 0.0f;
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) squares += sum_of_squares<Type>(total[i]);
  const float sum = row_sum<kBlocks>(shared.sums[turn], squares);
  const float scale = reciprocal_sqrt(sum * p.inverse_hidden_size + p.eps);
  const long long start = static_cast<long long>(row) * p.row_vectors;
  Floats<Type> norm[kVectors];
  float largest[kVectors];
  float row_largest = 0.0f;
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const Words words = pack<Type>(normalise<Type>(total[i], scale, weight[i], p.weight_bias));
    if (column[i] >= 0 && p.output.out != nullptr) {
      store_words(static_cast<char*>(p.output.out) + (start + column[i]) * kVectorBytes, words);
    }
    if (kOutput == Output::kNorm) continue;
    norm[i] = unpack<Type>(words);
    largest[i] = column[i] >= 0 ? largest_of<Type>(norm[i]) : 0.0f;
    row_largest = max_or_nan(row_largest, largest[i]);
  }
  if (kOutput == Output::kNorm) return;
  float fp8_scale = 0.0f;
  if (kOutput == Output::kStaticFp8) fp8_scale = float_of(load_word(p.output.static_scale));
  if (kOutput == Output::kTokenFp8) {
    fp8_scale = dynamic_scale<kOutput>(row_max<kBlocks>(shared.maxima[turn], row_largest));
    if (column[0] == 0) store_word(p.output.scales + row, bits_of(fp8_scale));
  }
  constexpr int kLanes = kGroup / Floats<Type>::kCount;  // of one group; divides a warp
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (kOutput == Output::kGroupFp8) {
      fp8_scale = dynamic_scale<kOutput>(warp_max(largest[i], kLanes));
      if (column[i] >= 0 && column[i] % kLanes == 0) {
        const int groups = (p.row_vectors + kLanes - 1) / kLanes;
        const long long at = static_cast<long long>(row) * groups + column[i] / kLanes;
        store_word(p.output.scales + at, bits_of(fp8_scale));
      }
    }
    if (column[i] >= 0) {
      store_e4m3<Type, kOutput>(p.output.quantised, start + column[i], norm[i], fp8_scale);
    }
  }
}

// Which vectors of a row this thread handles; -1: none.
template <int kVectors, int kBlocks>
FW_DEVICE void columns_of(const OneShotParams& p, int (&column)[kVectors]) {
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int strip = i * kBlocks + block_index() % kBlocks;
    const int at = strip * thread_count() + thread_index();
    column[i] = at < p.row_vectors ? at : -1;
  }
}

FW_DEVICE long long unit_of(const OneShotParams& p, int row, int column) {
  return static_cast<long long>(row) * p.row_units + column / kWarp;
}

FW_DEVICE long long place_of(const OneShotParams& p, int row, int column) {
  return (static_cast<long long>(row) * p.row_vectors + column) * kVectorBytes;
}

template <int kVectors>
FW_DEVICE void load_row(const OneShotParams& p, const void* tensor, int row,
                        const int (&column)[kVectors], Words (&words)[kVectors]) {
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column[i] < 0) continue;
    words[i] = load_words(static_cast<const char*>(tensor) + place_of(p, row, column[i]));
  }
}

// Brings what the worker's next row needs into L2 while it waits for this one.
template <int kVectors>
FW_DEVICE void prefetch_row(const OneShotParams& p, int row, const int (&column)[kVectors],
                            bool has_residual) {
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column[i] < 0) continue;
    const long long at = place_of(p, row, column[i]);
    prefetch(static_cast<const char*>(p.x) + at);
    if (has_residual) prefetch(static_cast<const char*>(p.residual) + at);
    prefetch(p.group.epochs + unit_of(p, row, column[i]));
  }
}

// Sends this thread's part of a row to all peers and raises the epochs. `slot` receives where the
// peers' parts arrive here; null: nothing to take. Returns the phase, for messages.
template <int kWorld, int kVectors, class Skew>
FW_DEVICE unsigned push_row(const OneShotParams& p, int row, const int (&column)[kVectors],
                            bool dead, Words (&own)[kVectors], char* (&slot)[kVectors]) {
  const int lane = thread_index() % kWarp;
  unsigned epoch[kVectors] = {};
  load_row(p, p.x, row, column, own);
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (column[i] >= 0) epoch[i] = load_word(p.group.epochs + unit_of(p, row, column[i]));
  }
  warp_barrier();  // all lanes have read the epochs that lane 0 now raises
  Skew::before_push(p.group.rank, row);
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    slot[i] = nullptr;
    if (column[i] < 0) continue;
    if (dead) {  // sends nothing, takes nothing, gives NaN
      own[i] = empty_slot();
      continue;
    }
    const long long unit = unit_of(p, row, column[i]);
    const long long offset = slot_offset<kWorld>(p.group, epoch[i] & 1u, unit, lane);
    slot[i] = p.group.slots[p.group.rank] + offset;
    own[i] = canonical(own[i]);
    push_to_peers<kWorld>(p.group, offset, own[i]);
    if (lane == 0) store_word(p.group.epochs + unit, epoch[i] + 1);
  }
  return epoch[0] & 1u;
}

// Takes the peers' parts and adds all ranks' in rank order.
template <class Type, int kWorld, int kVectors>
FW_DEVICE void sum_row(const OneShotParams& p, int row, unsigned phase,
                       char* const (&slot)[kVectors], const Words (&own)[kVectors],
                       Floats<Type> (&total)[kVectors]) {
  // How many vectors of all ranks are held in registers while waiting: 16 are 64 registers.
  constexpr int kBatch = kVectors * kWorld <= 16 ? kVectors : 1;
  FW_UNROLL
  for (int first = 0; first < kVectors; first += kBatch) {
    Words got[kBatch][kWorld - 1] = {};
    take_from_peers<kWorld, kBatch>(p.group, slot + first, row, phase, got);
    FW_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const Words mine = own[first + i];
      total[first + i] = unpack<Type>(of_rank<kWorld>(0, p.group.rank, got[i], mine));
      FW_UNROLL
      for (int source = 1; source < kWorld; ++source) {
        add<Type>(total[first + i], of_rank<kWorld>(source, p.group.rank, got[i], mine));
      }
    }
  }
}

template <class Type, int kWorld, int kVectors, int kBlocks, Output kOutput, bool kEarlyTrigger,
          class Skew = NoSkew>
FW_DEVICE void one_shot(const OneShotParams& p, RowShared<kBlocks>& shared) {
  // Four vectors per thread leave no registers for operands that are needed only after the wait.
  constexpr bool kEarlyLoads = kVectors < 4;
  constexpr bool kHasNorm = kOutput != Output::kSum;
  const int worker = block_index() / kBlocks;
  const int workers = block_count() / kBlocks;
  const bool has_residual = kHasNorm && p.residual != nullptr;
  int column[kVectors];
  columns_of<kVectors, kBlocks>(p, column);
  if (kBlocks > 1) cluster_barrier();  // no block writes into another before that one has started
  dependency_wait();  // by every thread: what runs after this grid may then rely on its end alone

  const bool dead = is_dead(p.group);
  int turn = 0;
  for (int row = worker; row < p.num_tokens; row += workers, turn ^= 1) {
    Words own[kVectors] = {};
    char* slot[kVectors];
    const unsigned phase = push_row<kWorld, kVectors, Skew>(p, row, column, dead, own, slot);
    if (kEarlyTrigger) dependents_launch();
    // What only the norm needs is loaded while the peers' rows are under way, and after the wait for
    // the kernel before, which may have written it.
    Words residual[kVectors] = {};
    Words weight[kVectors] = {};
    if (kEarlyLoads && kHasNorm) load_row(p, p.weight, 0, column, weight);
    if (kEarlyLoads && has_residual) load_row(p, p.residual, row, column, residual);
    if (row < p.num_tokens - workers) prefetch_row(p, row + workers, column, has_residual);
    Skew::before_take(p.group.rank, row);
    Floats<Type> total[kVectors];
    sum_row<Type, kWorld>(p, row, phase, slot, own, total);
    if (!kEarlyLoads && has_residual) load_row(p, p.residual, row, column, residual);
    char* sums = static_cast<char*>(kHasNorm ? p.residual_out : p.output.out);
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (has_residual) add<Type>(total[i], residual[i]);
      if (column[i] >= 0) store_words(sums + place_of(p, row, column[i]), pack<Type>(total[i]));
    }
    if (kHasNorm) {
      if (!kEarlyLoads) load_row(p, p.weight, 0, column, weight);
      write_norm<Type, kVectors, kBlocks, kOutput>(p, shared, row, turn, column, total, weight);
    }
  }
  if (!kEarlyTrigger) {
    block_barrier();  // the first thread to signal speaks for its block: all have stored by now
    dependents_launch();
  }
}

}  // namespace fusewise

#endif  // FUSEWISE_ONE_SHOT_CUH
