// Two-shot push: every rank reduces its share of the columns and sends the result to everybody.
//
// Per tile of rows: (1) scatter: send each peer its columns; (2) reduce: take one's own columns of
// all ranks, add in rank order in fp32, add the residual, round, send the rounded columns and, per
// unit, the sum of squares of the unrounded ones; (3) gather: take the peers' columns and partial
// sums, add the latter in a fixed order, and normalise. Every rank normalises the same rounded
// columns with the same sum, so all get the same bits. A message crosses each link
// 2 (world - 1) / world times.
//
// Slots. Scatter slots have two phases with an epoch per unit (slots.cuh). Gathered columns and
// partial sums have one: an owner sends either only after it took the scatter of the same call from
// all ranks, each of which sent it after its kernel of the call before had ended, and with it every
// read of a gathered slot. An owner without columns in a unit sends no partial sum of it, and nobody
// expects one.
//
// Progress. As one_shot, with tiles for rows: tiles are equal on all ranks (rows_per_tile follows
// from the shape), taken in rising order, and all blocks are resident. The smallest unfinished tile
// has been scattered by all ranks, so it is reduced by all, so it is gathered by all.

#ifndef FUSEWISE_TWO_SHOT_CUH
#define FUSEWISE_TWO_SHOT_CUH

#include "two_shot_outputs.cuh"

namespace fusewise {

// What a warp keeps of its first unit from reduce() to the end; of further units it reads it back.
struct Kept {
  Words sum;       // this rank's rounded columns
  unsigned epoch;  // as read; raised at the end of the tile, when nobody reads it any more
};

template <class Config>
FW_DEVICE void scatter(const Tile<Config>& tile) {
  const TwoShotParams& p = tile.p;
  const int lane = thread_index() % kWarp;
  const int warps = thread_count() / kWarp;
  for (int i = thread_index() / kWarp; i < tile.pieces(); i += warps * Config::kAhead) {
    Words v[Config::kAhead];
    unsigned epoch[Config::kAhead];
    Piece piece[Config::kAhead];
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      piece[j] = tile.peers_piece(i + j * warps);
      if (piece[j].column < 0) continue;
      v[j] = load_words(static_cast<const char*>(p.x) + tile.place(piece[j]));
      epoch[j] = tile.epoch(piece[j].unit);
    }
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (piece[j].column < 0 || tile.dead) continue;
      const long long unit = tile.global_unit(piece[j].unit);
      const long long offset = slot_offset<Config::kWorld>(p.group, epoch[j] % 2, unit, lane);
      push_words(p.group.peers[piece[j].peer] + offset, canonical(v[j]));
    }
  }
}

// Sends the sum of squares of this rank's columns in a unit to every peer: a lane each.
template <class Config>
FW_DEVICE void send_squares(const Tile<Config>& tile, TwoShotShared& shared, int unit, float sum) {
  constexpr int kWorld = Config::kWorld;
  const GroupParams& group = tile.p.group;
  const int lane = thread_index() % kWarp;
  const unsigned word = canonical_word(bits_of(sum));
  if (lane == 0) shared.squares[unit * kWorld + group.rank] = float_of(word);
  if (lane >= Config::kPeers || tile.dead || !tile.has_columns(unit, group.rank)) return;
  // peers[] begins at this rank's vectors there; its words are as far apart as words are long.
  const int source = dense(group.rank, (group.rank + 1 + lane) % kWorld);
  const long long words = partial_offset<kWorld>(group, tile.global_unit(unit));
  push_word(group.peers[lane] + words - source * (kUnitBytes - 4), word);
}

template <class Config>
FW_DEVICE Kept reduce(const Tile<Config>& tile, TwoShotShared& shared) {
  using Type = typename Config::Type;
  constexpr int kWorld = Config::kWorld;
  const TwoShotParams& p = tile.p;
  const int lane = thread_index() % kWarp;
  const bool has_residual = Config::kHasNorm && p.residual != nullptr;
  void* sums = Config::kHasNorm ? p.residual_out : p.output.out;
  Kept kept = {};
  for (int i = thread_index() / kWarp; i < tile.units(); i += thread_count() / kWarp) {
    const Piece piece = tile.own_piece(i);
    const unsigned epoch = tile.epoch(i);
    const bool first = i < thread_count() / kWarp;
    if (first) kept.epoch = epoch;
    float squares = 0.0f;
    if (piece.column >= 0) {
      Words own = load_words(static_cast<const char*>(p.x) + tile.place(piece));
      Words residual = {};
      if (has_residual) {
        residual = load_words(static_cast<const char*>(p.residual) + tile.place(piece));
      }
      const unsigned phase = epoch % 2;
      const long long unit = tile.global_unit(i);
      Arrival<kWorld> peers;
      peers.slot = p.group.slots + slot_offset<kWorld>(p.group, phase, unit, lane);
      peers.ask();
      own = or_nan(canonical(own), tile.dead);
      if (!tile.dead) peers.await(p.group, piece.row, phase);
      Floats<Type> total = sum_over_ranks<Type, kWorld>(p.group.rank, peers.got, own);
      if (has_residual) add<Type>(total, residual);
      const Words rounded = canonical(pack<Type>(total));
      if (!tile.dead) {
        push_to_peers<kWorld>(p.group, slot_offset<kWorld>(p.group, kGatherPhase, unit, lane),
                              rounded);
        peers.empty();
      }
      store_words(static_cast<char*>(sums) + tile.place(piece), rounded);
      if (first) kept.sum = rounded;
      squares = sum_of_squares<Type>(total);
    }
    if (Config::kHasNorm) send_squares(tile, shared, i, warp_sum(squares));
  }
  return kept;
}

FW_DEVICE unsigned await_word(const GroupParams& group, const char* slot, int row, int source) {
  Patience patience;
  do {
    FW_KEEP_LOOP
    for (int polls = 0; polls < kPollsPerCheck; ++polls) {
      const unsigned word = peek_word(slot);
      if (word != kSentinel) return word;
    }
  } while (!patience.is_over(group));
  give_up(group, row, kPartialPhase, source);
  return kSentinel;
}

// Waits for the peers' partial sums, a thread each; afterwards they are in shared memory, where every
// thread adds those of its row: every rank the same words in the same order.
template <class Config>
FW_DEVICE void await_squares(const Tile<Config>& tile, TwoShotShared& shared) {
  constexpr int kWorld = Config::kWorld;
  const TwoShotParams& p = tile.p;
  const int shard_units = Config::shard_units(p);
  const int rank = p.group.rank;
  for (int i = thread_index(); i < tile.units() * kWorld; i += thread_count()) {
    const int unit = i / kWorld;
    const int source = i % kWorld;
    if (source == rank) continue;
    unsigned word = tile.dead ? kSentinel : 0;
    if (!tile.dead && tile.has_columns(unit, source)) {
      const long long words = partial_offset<kWorld>(p.group, tile.global_unit(unit));
      char* slot = p.group.slots + words + dense(source, rank) * 4;
      word = await_word(p.group, slot, tile.first_row + unit / shard_units, source);
      push_word(slot, kSentinel);
    }
    shared.squares[i] = float_of(word);
  }
  block_barrier();  // all of shared.squares is written
}

// Up to Config::kAhead gathered vectors that a thread has asked for.
template <class Config>
struct Gathered {
  Piece piece[Config::kAhead];
  char* slot[Config::kAhead];
  Words v[Config::kAhead];
  Words weight[Config::kAhead];

  FW_DEVICE void ask(const Tile<Config>& tile, int first, bool with_weight) {
    const TwoShotParams& p = tile.p;
    const int rank = p.group.rank;
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      piece[j] = tile.peers_piece(first + j * (thread_count() / kWarp));
      const long long unit = tile.global_unit(piece[j].unit);
      slot[j] = p.group.slots + dense(piece[j].owner, rank) * kUnitBytes +
                slot_offset<Config::kWorld>(p.group, kGatherPhase, unit, thread_index() % kWarp);
      if (piece[j].column < 0 || tile.dead) slot[j] = nullptr;
      v[j] = slot[j] != nullptr ? peek_words(slot[j]) : empty_slot();
      weight[j] = Words{};
      if (with_weight && piece[j].column >= 0) weight[j] = weight_at(p, piece[j].column);
    }
  }

  // Waits until every piece that has a slot is full; after a time-out the missing words are NaN.
  FW_DEVICE void await(const GroupParams& group) {
    Patience patience;
    int row;
    int owner;
    do {
      FW_KEEP_LOOP
      for (int polls = 0; polls < kPollsPerCheck; ++polls) {
        row = -1;
        FW_UNROLL
        for (int j = 0; j < Config::kAhead; ++j) {
          if (slot[j] != nullptr && !complete(v[j])) {
            row = piece[j].row;
            owner = piece[j].owner;
            v[j] = peek_words(slot[j]);
          }
        }
        if (row < 0) return;
      }
    } while (!patience.is_over(group));
    give_up(group, row, kGatherPhase, owner);
  }

  FW_DEVICE void write(const Tile<Config>& tile, const TwoShotShared& shared) {
    const TwoShotParams& p = tile.p;
    void* sums = Config::kHasNorm ? p.residual_out : p.output.out;
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (piece[j].column < 0) continue;
      if (slot[j] != nullptr) push_words(slot[j], empty_slot());
      store_words(static_cast<char*>(sums) + tile.place(piece[j]), v[j]);
      if (Config::kOutput == Output::kNorm) {
        store_words(static_cast<char*>(p.output.out) + tile.place(piece[j]),
                    norm_of(tile, scale_of(tile, shared, piece[j].row), v[j], weight[j]));
      }
    }
  }
};

// One tile from the first load to the last store of its sums and norms.
template <class Config, class Skew>
FW_DEVICE void run_tile(const Tile<Config>& tile, TwoShotShared& shared) {
  constexpr bool kPlainNorm = Config::kOutput == Output::kNorm;
  const int warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  const int rank = tile.p.group.rank;
  Skew::before_push(rank, tile.first_row);
  scatter(tile);
  Skew::before_take(rank, tile.first_row);
  const Kept kept = reduce(tile, shared);
  // The first vectors are asked for before the partial sums are awaited: one trip, not two.
  Gathered<Config> gathered;
  gathered.ask(tile, warp, kPlainNorm);
  if (Config::kHasNorm) await_squares(tile, shared);
  for (int i = warp; i < tile.pieces(); i += warps * Config::kAhead) {
    if (i != warp) gathered.ask(tile, i, kPlainNorm);
    gathered.await(tile.p.group);
    gathered.write(tile, shared);
  }
  if (kPlainNorm) {
    write_own(tile, shared, kept.sum);
  } else if (Config::kHasNorm) {
    write_fp8(tile, shared);
  }
  block_barrier();  // nobody reads this tile's epochs or shared memory any more, and all have stored
  for (int unit = warp; unit < tile.units(); unit += warps) {
    if (thread_index() % kWarp != 0) continue;
    const unsigned epoch = unit == warp ? kept.epoch : tile.epoch(unit);
    store_word(tile.p.group.epochs + tile.global_unit(unit), epoch + 1);
  }
}

template <class Config, class Skew = NoSkew>
FW_DEVICE void two_shot(const TwoShotParams& p, TwoShotShared& shared) {
  dependency_wait();  // by every thread, as in one_shot
  if (Config::kEarlyTrigger) dependents_launch();
  const bool dead = is_dead(p.group);
  const int tiles = (p.num_tokens + p.rows_per_tile - 1) / p.rows_per_tile;
  for (int number = block_index(); number < tiles; number += block_count()) {
    const int first_row = number * p.rows_per_tile;
    const int left = p.num_tokens - first_row;
    const Tile<Config> tile{p, first_row, left < p.rows_per_tile ? left : p.rows_per_tile, dead};
    run_tile<Config, Skew>(tile, shared);
  }
  if (!Config::kEarlyTrigger) dependents_launch();
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_CUH
