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

template <int kWorld>
FW_DEVICE void scatter(const Tile<kWorld>& tile) {
  const TwoShotParams& p = tile.p;
  const int rank = p.group.rank;
  const int lane = thread_index() % kWarp;
  const int warps = thread_count() / kWarp;
  const int count = tile.units() * (kWorld - 1);
  for (int i = thread_index() / kWarp; i < count; i += warps * kAhead) {
    Words v[kAhead];
    unsigned epoch[kAhead];
    Piece piece[kAhead];
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int number = i + j * warps;
      piece[j] = tile.piece(number, kWorld - 1, rank + 1);
      if (number >= count) piece[j].column = -1;
      if (piece[j].column < 0) continue;
      v[j] = load_words(static_cast<const char*>(p.x) + tile.place(piece[j]));
      epoch[j] = tile.epoch(piece[j].unit);
    }
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (piece[j].column < 0 || tile.dead) continue;
      const long long unit = tile.global_unit(piece[j].unit);
      const long long offset = slot_offset<kWorld>(p.group, epoch[j] & 1u, unit, lane);
      char* slot = p.group.slots[piece[j].owner] + offset;
      push_words(slot + dense(rank, piece[j].owner) * kUnitBytes, canonical(v[j]));
    }
  }
}

// Sends the sum of squares of this rank's columns in a unit to every peer: a lane each.
template <int kWorld>
FW_DEVICE void send_squares(const Tile<kWorld>& tile, TwoShotShared& shared, int unit, float sum) {
  const int rank = tile.p.group.rank;
  const int lane = thread_index() % kWarp;
  const unsigned word = canonical_word(bits_of(sum));
  if (lane == 0) shared.squares[unit * kWorld + rank] = float_of(word);
  if (lane >= kWorld - 1 || tile.dead || !tile.has_columns(unit, rank)) return;
  const int peer = (rank + 1 + lane) % kWorld;
  push_word(partial_slot<kWorld>(tile.p.group, peer, rank, tile.global_unit(unit)), word);
}

template <class Type, int kWorld, Output kOutput>
FW_DEVICE Kept reduce(const Tile<kWorld>& tile, TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int lane = thread_index() % kWarp;
  const bool has_residual = kOutput != Output::kSum && p.residual != nullptr;
  void* sums = kOutput == Output::kSum ? p.output.out : p.residual_out;
  Kept kept = {};
  for (int i = thread_index() / kWarp; i < tile.units(); i += thread_count() / kWarp) {
    const Piece piece = tile.piece(i, 1, p.group.rank);
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
      const unsigned phase = epoch & 1u;
      const long long unit = tile.global_unit(i);
      char* slot = tile.dead ? nullptr
                             : p.group.slots[p.group.rank] +
                                   slot_offset<kWorld>(p.group, phase, unit, lane);
      Words got[1][kWorld - 1] = {};
      take_from_peers<kWorld, 1>(p.group, &slot, piece.row, phase, got);
      own = tile.dead ? empty_slot() : canonical(own);
      Floats<Type> total = unpack<Type>(of_rank<kWorld>(0, p.group.rank, got[0], own));
      FW_UNROLL
      for (int source = 1; source < kWorld; ++source) {
        add<Type>(total, of_rank<kWorld>(source, p.group.rank, got[0], own));
      }
      if (has_residual) add<Type>(total, residual);
      const Words rounded = canonical(pack<Type>(total));
      if (!tile.dead) {
        push_to_peers<kWorld>(p.group, slot_offset<kWorld>(p.group, kGatherPhase, unit, lane),
                              rounded);
      }
      store_words(static_cast<char*>(sums) + tile.place(piece), rounded);
      if (first) kept.sum = rounded;
      squares = sum_of_squares<Type>(total);
    }
    if (kOutput != Output::kSum) send_squares(tile, shared, i, warp_sum(squares));
  }
  return kept;
}

// Waits for the peers' partial sums, a thread each; afterwards every thread finds its rows' scales
// in shared memory. Every rank adds the same words in the same order.
template <int kWorld>
FW_DEVICE void await_scales(const Tile<kWorld>& tile, TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int rank = p.group.rank;
  for (int i = thread_index(); i < tile.units() * kWorld; i += thread_count()) {
    const int unit = i / kWorld;
    const int source = i % kWorld;
    if (source == rank) continue;
    unsigned word = tile.dead ? kSentinel : 0;
    if (!tile.dead && tile.has_columns(unit, source)) {
      char* slot = partial_slot<kWorld>(p.group, rank, source, tile.global_unit(unit));
      Patience patience;
      do {
        word = peek_word(slot);
      } while (word == kSentinel && patience.more(p.group, tile.first_row + unit / p.shard_units,
                                                  kPartialPhase, source));
      push_word(slot, kSentinel);
    }
    shared.squares[i] = float_of(word);
  }
  block_barrier();  // all of shared.squares is written
  for (int row = thread_index() / kWarp; row < tile.rows; row += thread_count() / kWarp) {
    const int count = p.shard_units * kWorld;
    float sum = 0.0f;
    for (int i = thread_index() % kWarp; i < count; i += kWarp) {
      sum += shared.squares[row * count + i];
    }
    sum = warp_sum(sum);
    if (thread_index() % kWarp != 0) continue;
    shared.scale[row] = reciprocal_sqrt(sum * p.inverse_hidden_size + p.eps);
  }
  block_barrier();  // all of shared.scale is written
}

// Up to kAhead gathered vectors that a thread has asked for.
template <int kWorld>
struct Gathered {
  Piece piece[kAhead];
  char* slot[kAhead];
  Words v[kAhead];
  Words weight[kAhead];

  FW_DEVICE void ask(const Tile<kWorld>& tile, int first, bool with_weight) {
    const TwoShotParams& p = tile.p;
    const int rank = p.group.rank;
    const int count = tile.units() * (kWorld - 1);
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int number = first + j * (thread_count() / kWarp);
      piece[j] = tile.piece(number, kWorld - 1, rank + 1);
      if (number >= count) piece[j].column = -1;
      const long long unit = tile.global_unit(piece[j].unit);
      slot[j] = p.group.slots[rank] + dense(piece[j].owner, rank) * kUnitBytes +
                slot_offset<kWorld>(p.group, kGatherPhase, unit, thread_index() % kWarp);
      if (piece[j].column < 0 || tile.dead) slot[j] = nullptr;
      v[j] = slot[j] != nullptr ? peek_words(slot[j]) : empty_slot();
      weight[j] = Words{};
      if (with_weight && piece[j].column >= 0) weight[j] = weight_at(p, piece[j].column);
    }
  }

  // Waits until every piece that has a slot is full; after a time-out the missing words are NaN.
  FW_DEVICE void await(const GroupParams& group) {
    Patience patience;
    for (;;) {
      int row = -1;
      int owner = 0;
      FW_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        if (slot[j] != nullptr && !complete(v[j])) {
          row = piece[j].row;
          owner = piece[j].owner;
          v[j] = peek_words(slot[j]);
        }
      }
      if (row < 0 || !patience.more(group, row, kGatherPhase, owner)) return;
    }
  }

  template <class Type, Output kOutput>
  FW_DEVICE void write(const Tile<kWorld>& tile, const TwoShotShared& shared) {
    const TwoShotParams& p = tile.p;
    void* sums = kOutput == Output::kSum ? p.output.out : p.residual_out;
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (piece[j].column < 0) continue;
      if (slot[j] != nullptr) push_words(slot[j], empty_slot());
      store_words(static_cast<char*>(sums) + tile.place(piece[j]), v[j]);
      if (kOutput == Output::kNorm) {
        store_words(static_cast<char*>(p.output.out) + tile.place(piece[j]),
                    norm_of<Type>(tile, shared, piece[j].row, v[j], weight[j]));
      }
    }
  }
};

// One tile from the first load to the last store of its sums and norms.
template <class Type, int kWorld, Output kOutput, bool kEarlyTrigger, class Skew>
FW_DEVICE void run_tile(const Tile<kWorld>& tile, TwoShotShared& shared) {
  const int warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  const int rank = tile.p.group.rank;
  Skew::before_push(rank, tile.first_row);
  scatter(tile);
  if (kEarlyTrigger) dependents_launch();
  Skew::before_take(rank, tile.first_row);
  const Kept kept = reduce<Type, kWorld, kOutput>(tile, shared);
  // The first vectors are asked for before the partial sums are awaited: one trip, not two.
  Gathered<kWorld> gathered;
  gathered.ask(tile, warp, kOutput == Output::kNorm);
  if (kOutput != Output::kSum) await_scales(tile, shared);
  for (int i = warp; i < tile.units() * (kWorld - 1); i += warps * kAhead) {
    if (i != warp) gathered.ask(tile, i, kOutput == Output::kNorm);
    gathered.await(tile.p.group);
    gathered.template write<Type, kOutput>(tile, shared);
  }
  if (kOutput == Output::kNorm) {
    write_own<Type>(tile, shared, kept.sum);
  } else if (kOutput != Output::kSum) {
    write_fp8<Type, kWorld, kOutput>(tile, shared);
  }
  block_barrier();  // nobody reads this tile's epochs or shared memory any more, and all have stored
  for (int unit = warp; unit < tile.units(); unit += warps) {
    if (thread_index() % kWarp != 0) continue;
    const unsigned epoch = unit == warp ? kept.epoch : tile.epoch(unit);
    store_word(tile.p.group.epochs + tile.global_unit(unit), epoch + 1);
  }
}

template <class Type, int kWorld, Output kOutput, bool kEarlyTrigger, class Skew = NoSkew>
FW_DEVICE void two_shot(const TwoShotParams& p, TwoShotShared& shared) {
  dependency_wait();  // by every thread, as in one_shot
  const bool dead = is_dead(p.group);
  const int tiles = (p.num_tokens + p.rows_per_tile - 1) / p.rows_per_tile;
  for (int number = block_index(); number < tiles; number += block_count()) {
    const int first_row = number * p.rows_per_tile;
    const int left = p.num_tokens - first_row;
    const Tile<kWorld> tile{p, first_row, left < p.rows_per_tile ? left : p.rows_per_tile, dead};
    run_tile<Type, kWorld, kOutput, kEarlyTrigger, Skew>(tile, shared);
  }
  if (!kEarlyTrigger) dependents_launch();
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_CUH
