// One-shot push: every rank sends its rows to every peer, adds what it receives, and normalises.
//
// Per row: load, push to all peers, wait for all peers, add in rank order in fp32, add the
// residual, normalise. A block takes rows worker, worker + workers, ... in rising order, and the
// host launches no more blocks than fit on the device at once. So the smallest row that some rank
// has not finished is being worked on by all ranks, all have pushed it before polling it, and it
// completes: no order among blocks is assumed.
//
// What is fast about it is the order: addresses before the wait for the kernel before; every load of
// a row at once behind it; the pushes as soon as their own data is there; emptied slots and sums
// stored only when the row's number is on its way.
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

// What is compiled: the fields of an Instance (variants.py). kRowVectors 0: known at run time only.
template <class Type_, int kWorld_, int kVectors_, int kBlocks_, Output kOutput_,
          bool kEarlyTrigger_, bool kOneRow_ = false, int kRowVectors_ = 0>
struct OneShotConfig {
  using Type = Type_;
  static constexpr int kWorld = kWorld_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr Output kOutput = kOutput_;
  static constexpr bool kEarlyTrigger = kEarlyTrigger_;
  static constexpr bool kOneRow = kOneRow_;  // every worker has one row
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
template <class Config>
struct RowPart {
  static constexpr int kVectors = Config::kVectors;
  static constexpr int kPeers = Config::kWorld - 1;
  bool used[kVectors];
  int column[kVectors];
  long long place[kVectors];  // bytes into a tensor of the message's shape
  const char* x[kVectors];
  unsigned* epoch[kVectors];
  char* slot[kVectors];           // of phase 0, as are the peers'
  char* peers[kVectors][kPeers];  // where this rank's vector goes

  FW_DEVICE RowPart(const OneShotParams& p, int row) {
    const int row_vectors = Config::row_vectors(p);
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int strip = i * Config::kBlocks + block_index() % Config::kBlocks;
      column[i] = strip * thread_count() + thread_index();
      used[i] = row_vectors == kVectors * Config::kBlocks * thread_count() ||
                column[i] < row_vectors;
      const long long unit =
          static_cast<long long>(row) * Config::row_units(p) + column[i] / kWarp;
      const long long offset =
          slot_offset<Config::kWorld>(p.group, 0, unit, thread_index() % kWarp);
      place[i] = (static_cast<long long>(row) * row_vectors + column[i]) * kVectorBytes;
      x[i] = static_cast<const char*>(p.x) + place[i];
      epoch[i] = p.group.epochs + unit;
      slot[i] = p.group.slots + offset;
      FW_UNROLL
      for (int j = 0; j < kPeers; ++j) peers[i][j] = p.group.peers[j] + offset;
    }
  }

  FW_DEVICE void compute_now() {
    FW_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      fusewise::compute_now(x[i]);
      fusewise::compute_now(epoch[i]);
      fusewise::compute_now(slot[i]);
      FW_UNROLL
      for (int j = 0; j < kPeers; ++j) fusewise::compute_now(peers[i][j]);
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

// Sends this thread's part of a row to all peers, asks for theirs, and raises the epochs. The dead
// send nothing, take nothing and give NaN.
template <class Config, class Skew>
FW_DEVICE void exchange_row(const OneShotParams& p, const RowPart<Config>& part, int row, bool dead,
                            const unsigned (&epoch)[Config::kVectors],
                            Words (&own)[Config::kVectors],
                            Arrival<Config::kWorld> (&peers)[Config::kVectors]) {
  const long long phase_bytes = slot_offset<Config::kWorld>(p.group, 1, 0, 0);
  warp_barrier();  // all lanes have read the epochs that lane 0 raises below
  Skew::before_push(p.group.rank, row);
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    const long long phase = epoch[i] % 2 != 0 ? phase_bytes : 0;
    own[i] = canonical(own[i]);
    FW_UNROLL
    for (int j = 0; j < Config::kWorld - 1; ++j) {
      if (part.used[i] && !dead) push_words(part.peers[i][j] + phase, own[i]);
    }
    own[i] = or_nan(own[i], dead);
    peers[i].slot = part.slot[i] + phase;
  }
  Skew::before_take(p.group.rank, row);
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (Config::kAskAtOnce && part.used[i]) peers[i].ask();
  }
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (part.used[i] && !dead && thread_index() % kWarp == 0) {
      store_word(part.epoch[i], epoch[i] + 1);
    }
  }
}

// Puts the sentinel back where the peers' parts were, and stores the sums.
template <class Config>
FW_DEVICE void store_row(const OneShotParams& p, const RowPart<Config>& part, bool dead,
                         const Floats<typename Config::Type> (&total)[Config::kVectors],
                         const Arrival<Config::kWorld> (&peers)[Config::kVectors]) {
  char* sums = static_cast<char*>(Config::kHasNorm ? p.residual_out : p.output.out);
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (!part.used[i]) continue;
    if (!dead) peers[i].empty();
    store_words(sums + part.place[i], pack<typename Config::Type>(total[i]));
  }
}

// Quantises the norm that a thread has in registers as rounded to the element type.
template <class Config>
FW_DEVICE void write_fp8(const OneShotParams& p, RowShared<Config::kBlocks>& shared, int row,
                         int turn, const RowPart<Config>& part,
                         const Words (&norm)[Config::kVectors]) {
  using Type = typename Config::Type;
  constexpr Output kOutput = Config::kOutput;
  constexpr int kLanes = kGroup / Floats<Type>::kCount;  // of one group; divides a warp
  float scale = 0.0f;
  if (kOutput == Output::kStaticFp8) scale = float_of(load_word(p.output.static_scale));
  if (kOutput == Output::kTokenFp8) {
    float largest = 0.0f;
    FW_UNROLL
    for (int i = 0; i < Config::kVectors; ++i) {
      if (part.used[i]) largest = max_or_nan(largest, largest_of<Type>(unpack<Type>(norm[i])));
    }
    scale = dynamic_scale<kOutput>(row_max<Config::kBlocks>(shared.maxima[turn], largest));
    if (part.column[0] == 0) store_word(p.output.scales + row, bits_of(scale));
  }
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    const Floats<Type> values = unpack<Type>(norm[i]);
    if (kOutput == Output::kGroupFp8) {
      const float largest = part.used[i] ? largest_of<Type>(values) : 0.0f;
      scale = dynamic_scale<kOutput>(warp_max(largest, kLanes));
      if (part.used[i] && part.column[i] % kLanes == 0) {
        const int groups = (Config::row_vectors(p) + kLanes - 1) / kLanes;
        const long long at = static_cast<long long>(row) * groups + part.column[i] / kLanes;
        store_word(p.output.scales + at, bits_of(scale));
      }
    }
    if (!part.used[i]) continue;
    store_e4m3<Type, kOutput>(p.output.quantised, part.place[i] / kVectorBytes, values, scale);
  }
}

// Everything behind the sum of a row: the row's number, the stores, the norm.
template <class Config>
FW_DEVICE void finish_row(const OneShotParams& p, RowShared<Config::kBlocks>& shared, int row,
                          int turn, const RowPart<Config>& part, bool dead,
                          const Floats<typename Config::Type> (&total)[Config::kVectors],
                          const Arrival<Config::kWorld> (&peers)[Config::kVectors],
                          Words (&weight)[Config::kVectors]) {
  using Type = typename Config::Type;
  constexpr int kBlocks = Config::kBlocks;
  float squares = 0.0f;
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (part.used[i]) squares += sum_of_squares<Type>(total[i]);
  }
  share_over_row<kBlocks>(shared.sums[turn], warp_sum(squares));
  // A block's barrier waits for no store; a cluster's does, so there they come behind it.
  if (kBlocks == 1) store_row<Config>(p, part, dead, total, peers);
  meet_over_row<kBlocks>();
  const float sum = total_over_row<kBlocks>(shared.sums[turn]);
  if (kBlocks > 1) store_row<Config>(p, part, dead, total, peers);
  if (!Config::kEarlyLoads) part.load_weight(p, weight);
  const float scale = reciprocal_sqrt(sum * p.inverse_hidden_size + p.eps);
  Words words[Config::kVectors] = {};
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    words[i] = pack<Type>(normalise<Type>(total[i], scale, weight[i], p.weight_bias));
    if (part.used[i] && (Config::kOutput == Output::kNorm || p.output.out != nullptr)) {
      store_words(static_cast<char*>(p.output.out) + part.place[i], words[i]);
    }
  }
  if (Config::kOutput != Output::kNorm) write_fp8<Config>(p, shared, row, turn, part, words);
}

// One row from the first load to the last store.
template <class Config, class Skew>
FW_DEVICE void run_row(const OneShotParams& p, RowShared<Config::kBlocks>& shared, int row, int turn,
                       const RowPart<Config>& part, bool dead) {
  using Type = typename Config::Type;
  constexpr int kVectors = Config::kVectors;
  const bool has_residual = Config::kHasNorm && p.residual != nullptr;
  Words own[kVectors] = {};
  Words residual[kVectors];
  Words weight[kVectors] = {};
  unsigned epoch[kVectors] = {};
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (part.used[i]) own[i] = load_words(part.x[i]);
    if (part.used[i]) epoch[i] = load_word(part.epoch[i]);
    residual[i] = nothing_to_add<Type>();
  }
  if (Config::kEarlyLoads && has_residual) part.load(p.residual, residual);
  if (Config::kEarlyLoads && Config::kHasNorm) part.load_weight(p, weight);
  Arrival<Config::kWorld> peers[kVectors];
  exchange_row<Config, Skew>(p, part, row, dead, epoch, own, peers);
  if (!Config::kEarlyLoads && has_residual) part.load(p.residual, residual);
  Floats<Type> total[kVectors];
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (!Config::kAskAtOnce && part.used[i]) peers[i].ask();
    if (part.used[i] && !dead) peers[i].await(p.group, row, epoch[0] % 2);
    total[i] = sum_over_ranks<Type, Config::kWorld>(p.group.rank, peers[i].got, own[i]);
    if (Config::kHasNorm) add<Type>(total[i], residual[i]);
  }
  if (Config::kHasNorm) {
    // No block writes into another before that one has started.
    if (Config::kBlocks > 1 && row == block_index() / Config::kBlocks) cluster_wait();
    finish_row<Config>(p, shared, row, turn, part, dead, total, peers, weight);
  } else {
    store_row<Config>(p, part, dead, total, peers);
  }
}

template <class Config, class Skew = NoSkew>
FW_DEVICE void one_shot(const OneShotParams& p, RowShared<Config::kBlocks>& shared) {
  const int worker = block_index() / Config::kBlocks;
  const int workers = block_count() / Config::kBlocks;
  if (Config::kBlocks > 1 && Config::kHasNorm) cluster_arrive();
  RowPart<Config> part(p, worker);
  if (Config::kEarlyAddresses) part.compute_now();
  dependency_wait();  // by every thread: what runs after this grid may then rely on its end alone
  if (Config::kEarlyTrigger) dependents_launch();

  const bool dead = is_dead(p.group);
  if (Config::kOneRow) {
    run_row<Config, Skew>(p, shared, worker, 0, part, dead);
  } else {
    int turn = 0;
    for (int row = worker; row < p.num_tokens; row += workers, turn ^= 1) {
      run_row<Config, Skew>(p, shared, row, turn, RowPart<Config>(p, row), dead);
    }
  }
  if (!Config::kEarlyTrigger) {
    block_barrier();  // the first thread to signal speaks for its block: all have stored by now
    dependents_launch();
  }
}

}  // namespace fusewise

#endif  // FUSEWISE_ONE_SHOT_CUH
