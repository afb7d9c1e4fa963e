// One-shot push: every rank sends its rows to every peer, adds what it receives, and normalises.
//
// Per row: load, push to all peers, wait for all peers, add in rank order in fp32, add the
// residual, normalise. A block takes rows worker, worker + workers, ... in rising order, and the
// host launches no more blocks than fit on the device at once. So the smallest row that some rank
// has not finished is being worked on by all ranks, all have pushed it before polling it, and it
// completes: no order among blocks is assumed.
//
// What is fast about it is the order: addresses before the wait for the kernel before; every load of
// a row at once behind it; whatever nobody waits for, such as the cluster's inboxes, while those are
// under way; the pushes as soon as their own data is there; emptied slots and sums stored only when the
// row's number is on its way.
//
// The host fills OneShotParams and passes it by value; `one_shot` is the whole kernel.

#ifndef FUSEWISE_ONE_SHOT_CUH
#define FUSEWISE_ONE_SHOT_CUH

#include "one_shot_row.cuh"

namespace fusewise {

// Sends this thread's part of a row to all peers. The dead send nothing, take nothing and give NaN.
template <class Config, class Skew>
FW_DEVICE void send_row(const OneShotParams& p, const RowPart<Config>& part, int row, bool dead,
                        const unsigned (&epoch)[Config::kVectors], Words (&own)[Config::kVectors],
                        Arrival<Config::kWorld> (&peers)[Config::kVectors]) {
  warp_barrier();  // all lanes have read the epochs that lane 0 raises below
  Skew::before_push(p.group.rank, row);
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    const unsigned long long phase = epoch[i] % 2 * kSourcesBytes<Config::kWorld>;
    own[i] = canonical(own[i]);
    FW_UNROLL
    for (int j = 0; j < Config::kWorld - 1; ++j) {
      if (part.owns(i) && !dead) push_words(part.peers[i][j] + phase, own[i]);
    }
    own[i] = or_nan(own[i], dead);
    peers[i].slot = part.slot[i] + phase;
  }
  Skew::before_take(p.group.rank, row);
}

// Asks for the peers' parts, and raises the epochs.
template <class Config>
FW_DEVICE void ask_row(const OneShotParams& p, const RowPart<Config>& part, bool dead,
                       const unsigned (&epoch)[Config::kVectors],
                       const Words (&own)[Config::kVectors],
                       Arrival<Config::kWorld> (&peers)[Config::kVectors]) {
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (Config::kAskAtOnce && part.used[i]) peers[i].ask(p.group, own[i]);
  }
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (part.used[i] && !dead && thread_index() % kWarp == 0) {
      store_word(part.epoch[i], epoch[i] + 1);
    }
  }
}

// Puts the sentinel back where the peers' parts were, and stores the sums. All lanes of the warp must
// have taken theirs: two may have the same slot.
template <class Config>
FW_DEVICE void store_row(const OneShotParams& p, const RowPart<Config>& part, bool dead,
                         const Floats<typename Config::Type> (&total)[Config::kVectors],
                         const Arrival<Config::kWorld> (&peers)[Config::kVectors]) {
  char* sums = static_cast<char*>(Config::kHasNorm ? p.residual_out : p.output.out);
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    if (!part.used[i]) continue;
    if (!dead) peers[i].empty(p.group);
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
    scale = dynamic_scale<kOutput>(row_max(shared.maxima, turn, largest));
    if (part.column[0] == 0) store_word(p.output.scales + row, bits_of(scale));
  }
  FW_UNROLL
  for (int i = 0; i < Config::kVectors; ++i) {
    const Floats<Type> values = unpack<Type>(norm[i]);
    if (kOutput == Output::kGroupFp8) {
      const float largest = part.used[i] ? largest_of<Type>(values) : 0.0f;
      scale = dynamic_scale<kOutput>(warp_max(largest, kLanes));
      if (part.owns(i) && part.column[i] % kLanes == 0) {
        const int groups = (Config::row_vectors(p) + kLanes - 1) / kLanes;
        const long long at = static_cast<long long>(row) * groups + part.column[i] / kLanes;
        store_word(p.output.scales + at, bits_of(scale));
      }
    }
    if (!part.owns(i)) continue;
    store_e4m3<Type, kOutput>(p.output.quantised, part.place[i] / kVectorBytes, values, scale);
  }
}

// Everything behind the sum of a row: the row's number, the stores, the norm.
template <class Config>
FW_DEVICE void finish_row(const OneShotParams& p, RowShared<Config::kBlocks>& shared, int row,
                          int turn, ClusterPlace place, const RowPart<Config>& part, bool dead,
                          const Floats<typename Config::Type> (&total)[Config::kVectors],
                          const Arrival<Config::kWorld> (&peers)[Config::kVectors],
                          Words (&weight)[Config::kVectors]) {
  using Type = typename Config::Type;
  warp_barrier();  // or the compiler, which cannot know it, asks at each shuffle whether all are here
  float squares = part.owns(0) ? sum_of_squares<Type>(total[0]) : 0.0f;
  FW_UNROLL
  for (int i = 1; i < Config::kVectors; ++i) {
    const float mine = sum_of_squares<Type>(total[i]);
    squares += part.owns(i) ? mine : 0.0f;
  }
  share_over_row(shared.sums, turn, place, warp_sum(squares));
  store_row<Config>(p, part, dead, total, peers);  // the row's number is on its way
  meet_over_row(shared.sums, turn);
  const float sum = total_over_row(shared.sums, turn);
  if (!Config::kEarlyLoads) part.load_weight(p, weight);
  const float scale = scale_of_sum(sum, p.inverse_hidden_size, p.eps);
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
                       RowPart<Config> part, bool dead) {
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
  Computed slots;
  part.compute_slots(slots);
  if (Config::kHasNorm && turn == 0) open_row(shared);
  if (Config::kEarlyLoads && has_residual) part.load(p.residual, residual);
  if (Config::kEarlyLoads && Config::kHasNorm) part.load_weight(p, weight);
  Arrival<Config::kWorld> peers[kVectors];
  send_row<Config, Skew>(p, part, row, dead, epoch, own, peers);
  // What the row's end needs of the cluster's other blocks, while the vectors are under way: no block
  // sends to another before that one has opened its inboxes.
  ClusterPlace place = {};
  if (Config::kHasNorm && Config::kBlocks > 1 && turn == 0) cluster_wait();
  if (Config::kHasNorm) place = expect_over_row(shared.sums, turn);
  ask_row<Config>(p, part, dead, epoch, own, peers);
  if (!Config::kEarlyLoads && has_residual) part.load(p.residual, residual);
  Floats<Type> total[kVectors];
  FW_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (!Config::kAskAtOnce && part.used[i]) peers[i].ask(p.group, own[i]);
    if (part.used[i]) peers[i].await(p.group, row, epoch[0] % 2, !dead);
    total[i] = peers[i].template sum<Type>();
    if (Config::kHasNorm) add<Type>(total[i], residual[i]);
  }
  if (Config::kHasNorm) {
    finish_row<Config>(p, shared, row, turn, place, part, dead, total, peers, weight);
  } else {
    warp_barrier();  // all lanes have what lies in the slots that are emptied now
    store_row<Config>(p, part, dead, total, peers);
  }
}

template <class Config, class Skew = NoSkew>
FW_DEVICE void one_shot(const OneShotParams& p, RowShared<Config::kBlocks>& shared) {
  const int worker = block_index() / Config::kBlocks;
  const int workers = block_count() / Config::kBlocks;
  RowPart<Config> part(p, worker);
  Computed addresses;
  part.compute_loads(addresses);
  if (Config::kEarlyAddresses) part.compute_slots(addresses);
  const unsigned* dead_copy = copy_of_dead(p.group);
  addresses.add(dead_copy);
  // By every thread: what runs after this grid may then rely on its end alone.
  dependency_wait(addresses);
  if (Config::kEarlyTrigger) dependents_launch();

  const bool dead = is_dead(dead_copy);
  if (Config::kOnePass) {
    run_row<Config, Skew>(p, shared, worker, 0, part, dead);
  } else {
    int turn = 0;
    for (int row = worker; row < p.num_tokens; row += workers, ++turn) {
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
