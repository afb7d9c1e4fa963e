// A row in the one-shot kernel: its parameters, what is compiled, and where a thread's vectors are.
//
// Pure addressing. The protocol is in one_shot.cuh.

#ifndef FUSEWISE_ONE_SHOT_ROW_CUH
#define FUSEWISE_ONE_SHOT_ROW_CUH

#include "outputs.cuh"

namespace fusewise {

// Mirrored field by field in params.py. Tensors are contiguous, 16-byte aligned, [num_tokens,
// hidden_size] of one element type; hidden_size is a multiple of 8.
struct OneShotParams {
  const void* x;
  GroupParams group;
  const void* residual;  // null: none
  const void* weight;    // [hidden_size]; unused by Output::kSum
  void* residual_out;    // sum + residual; unused by Output::kSum
  float inverse_hidden_size;
  float eps;
  float weight_bias;
  int num_tokens;
  OutputParams output;
  int row_vectors;  // 16-byte vectors of a row
  int row_units;    // ceil(row_vectors / 32)
};

// What is compiled: the fields of an Instance (variants.py). kRowVectors 0: known at run time only.
template <class Type_, int kWorld_, int kVectors_, int kBlocks_, Output kOutput_,
          bool kEarlyTrigger_, bool kOnePass_ = false, int kRowVectors_ = 0>
struct OneShotConfig {
  using Type = Type_;
  static constexpr int kWorld = kWorld_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr Output kOutput = kOutput_;
  static constexpr bool kEarlyTrigger = kEarlyTrigger_;
  static constexpr bool kOnePass = kOnePass_;  // every worker has one row
  static constexpr bool kHasNorm = kOutput != Output::kSum;
  static constexpr int kRowVectors = kRowVectors_;
  // Four vectors per thread leave no registers for operands that are needed only after the wait.
  static constexpr bool kEarlyLoads = kVectors < 4;
  // Whether all vectors of all ranks are held in registers while waiting: 16 are 64 registers.
  static constexpr bool kAskAtOnce = kVectors * kWorld <= 16;

  // Whether there are registers for every peer's address before the wait for the kernel before.
  static constexpr bool kEarlyAddresses = kVectors * kWorld <= 8;

  FW_DEVICE static int row_vectors(const OneShotParams& p) {
    return kRowVectors > 0 ? kRowVectors : p.row_vectors;
  }
  FW_DEVICE static int row_units(const OneShotParams& p) {
    return kRowVectors > 0 ? (kRowVectors + kWarp - 1) / kWarp : p.row_units;
  }
};

// A thread's vectors of one row: where they are in the tensors, in the slots and in the epochs.
//
// Where a row ends within a warp, the lanes behind its end repeat its last vector: they load and await
// it, empty its slot and store its sum and its norm, as the lane before them does. So no load and no
// wait stands in a branch, which cost half a microsecond. They never send: a second copy could arrive
// when the peer has emptied the slot. And they count for nothing in a row's number.
template <class Config>
struct RowPart {
  static constexpr int kVectors = Config::kVectors;
  static constexpr int kPeers = Config::kWorld - 1;
  bool used[kVectors];     // of all lanes of a warp, or of none
  bool is_copy[kVectors];  // lanes past the end of the row repeat its last vector
  int column[kVectors];
  unsigned long long place[kVectors];  // bytes into a tensor of the message's shape
  const char* x[kVectors];
  unsigned* epoch[kVectors];
  char* slot[kVectors];           // of phase 0, as are the peers'
  char* peers[kVectors][kPeers];  // where this rank's vector goes

  FW_DEVICE RowPart(const OneShotParams& p, unsigned row) {
    const int row_vectors = Config::row_vectors(p);
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int strip = i * Config::kBlocks + block_index() % Config::kBlocks;
      const int lane = thread_index() % kWarp;
      const int column_here = strip * thread_count() + thread_index();
      const int columns = kVectors * Config::kBlocks * thread_count();  // known with row_vectors
      used[i] = columns - row_vectors < kWarp || column_here - lane < row_vectors;
      is_copy[i] = columns != row_vectors && column_here >= row_vectors;
      column[i] = is_copy[i] ? row_vectors - 1 : column_here;
      const unsigned unit = row * Config::row_units(p) + column[i] / kWarp;
      const unsigned long long offset = slot_offset<Config::kWorld>(unit, column[i] % kWarp);
      const unsigned vector = row * row_vectors + column[i];
      place[i] = static_cast<unsigned long long>(vector) * kVectorBytes;
      x[i] = static_cast<const char*>(p.x) + place[i];
      epoch[i] = p.group.epochs + unit;
      slot[i] = p.group.slots + offset;
      FW_UNROLL
      for (int j = 0; j < kPeers; ++j) peers[i][j] = p.group.peers[j] + offset;
    }
  }

  // Whether vector `i` is this thread's, and no repetition of another lane's.
  FW_DEVICE bool owns(int i) const { return used[i] && !is_copy[i]; }

  // What is loaded first.
  FW_DEVICE void compute_loads(Computed& addresses) {
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      addresses.add(x[i]);
      addresses.add(epoch[i]);
    }
  }

  // The rest: before the wait where there are registers for it, else while those loads are under
  // way.
  FW_DEVICE void compute_slots(Computed& addresses) {
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      addresses.add(slot[i]);
      FW_UNROLL
      for (int j = 0; j < kPeers; ++j) addresses.add(peers[i][j]);
    }
  }

  FW_DEVICE void load(const void* tensor, Words (&words)[kVectors]) const {
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (used[i]) words[i] = load_words(static_cast<const char*>(tensor) + place[i]);
    }
  }

  FW_DEVICE void load_weight(const OneShotParams& p, Words (&words)[kVectors]) const {
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const char* weight = static_cast<const char*>(p.weight);
      if (used[i]) words[i] = load_words(weight + column[i] * kVectorBytes);
    }
  }
};

}  // namespace fusewise

#endif  // FUSEWISE_ONE_SHOT_ROW_CUH
