// Two-shot push: every rank reduces its share of the columns and sends the result to everybody.
//
// Per tile of rows: (1) scatter: send each peer its columns; (2) reduce: take one's own columns of
// all ranks, add in rank order in fp32, add the residual, round, send the rounded columns and the
// partial sum of squares of the unrounded ones; (3) add the partial sums in rank order; (4) gather:
// take the peers' columns and normalise. Every rank normalises the same rounded columns with the
// same sum, so all get the same bits. A message crosses each link 2 (world - 1) / world times.
//
// Slots. Scatter slots have two phases with an epoch per unit (slots.cuh). Gathered columns and
// partial sums have one: an owner sends either only after it took the scatter of the same call from
// all ranks, each of which sent it after its kernel of the call before had ended, and with it every
// read of a gathered slot. An owner without columns sends no partial sum and nobody expects one.
//
// Progress. As one_shot, with tiles for rows: tiles are equal on all ranks (rows_per_tile follows
// from the shape), taken in rising order, and all blocks are resident. The smallest unfinished tile
// has been scattered by all ranks, so it is reduced by all, so it is gathered by all.

#ifndef FUSEWISE_TWO_SHOT_CUH
#define FUSEWISE_TWO_SHOT_CUH

#include "two_shot_outputs.cuh"

namespace fusewise {

template <int kWorld>
FW_DEVICE void scatter(const Tile<kWorld>& tile, const TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int rank = p.group.rank;
  const int lane = thread_index() % kWarp;
  const int warps = thread_count() / kWarp;
  const int count = tile.units() * (kWorld - 1);
  for (int i = thread_index() / kWarp; i < count; i += warps * kAhead) {
    Words v[kAhead];
    Piece piece[kAhead];
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int number = i + j * warps;
      piece[j] = tile.piece(number, kWorld - 1, rank + 1);
      if (number >= count) piece[j].column = -1;
      if (piece[j].column < 0) continue;
      v[j] = load_words(static_cast<const char*>(p.x) + tile.place(piece[j]));
    }
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (piece[j].column < 0) continue;
      const unsigned phase = shared.epoch[piece[j].unit] & 1u;
      const long long unit = tile.global_unit(piece[j].unit);
      const long long offset = slot_offset<kWorld>(p.group, phase, unit, lane);
      char* slot = p.group.slots[piece[j].owner] + offset;
      push_words(slot + dense(rank, piece[j].owner) * kUnitBytes, canonical(v[j]));
    }
  }
}

template <class Type, int kWorld, Output kOutput>
FW_DEVICE void reduce(const Tile<kWorld>& tile, TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int lane = thread_index() % kWarp;
  const bool has_residual = kOutput != Output::kSum && p.residual != nullptr;
  void* sums = kOutput == Output::kSum ? p.output.out : p.residual_out;
  for (int i = thread_index() / kWarp; i < tile.units(); i += thread_count() / kWarp) {
    const Piece piece = tile.piece(i, 1, p.group.rank);
    float squares = 0.0f;
    if (piece.column >= 0) {
      Words own = canonical(load_words(static_cast<const char*>(p.x) + tile.place(piece)));
      if (tile.dead) own = empty_slot();
      Words residual = {};
      if (has_residual) {
        residual = load_words(static_cast<const char*>(p.residual) + tile.place(piece));
      }
      const unsigned phase = shared.epoch[i] & 1u;
      const long long unit = tile.global_unit(i);
      char* slot = tile.dead ? nullptr
                             : p.group.slots[p.group.rank] +
                                   slot_offset<kWorld>(p.group, phase, unit, lane);
      Words got[1][kWorld - 1] = {};
      take_from_peers<kWorld, 1>(p.group, &slot, piece.row, phase, got);
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
      squares = sum_of_squares<Type>(total);
    }
    if (kOutput == Output::kSum) continue;
    const float sum = warp_sum(squares);
    if (lane == 0) shared.squares[i] = sum;
  }
}

// This rank's part of a row's sum of squares, its units in order.
template <int kWorld>
FW_DEVICE float own_squares(const Tile<kWorld>& tile, const TwoShotShared& shared, int row) {
  float sum = 0.0f;
  for (int i = 0; i < tile.p.shard_units; ++i) {
    sum += shared.squares[row * tile.p.shard_units + i];
  }
  return sum;
}

// Exchanges the partial sums; afterwards every thread finds its rows' scales in shared memory.
template <int kWorld>
FW_DEVICE void exchange_squares(const Tile<kWorld>& tile, TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int rank = p.group.rank;
  block_barrier();  // all of shared.squares is written
  if (!tile.dead && rank * p.shard_vectors < p.row_vectors) {
    for (int i = thread_index(); i < tile.rows * (kWorld - 1); i += thread_count()) {
      const int row = i / (kWorld - 1);
      const int peer = (rank + 1 + i % (kWorld - 1)) % kWorld;
      const unsigned word = canonical_word(bits_of(own_squares(tile, shared, row)));
      push_word(partial_slot<kWorld>(p.group, peer, rank, tile.first_row + row), word);
    }
  }
  for (int row = thread_index(); row < tile.rows; row += thread_count()) {
    float sum = 0.0f;
    for (int source = 0; source < kWorld && source * p.shard_vectors < p.row_vectors; ++source) {
      if (source == rank) {
        sum += float_of(canonical_word(bits_of(own_squares(tile, shared, row))));
        continue;
      }
      char* slot = partial_slot<kWorld>(p.group, rank, source, tile.first_row + row);
      Patience patience;
      unsigned word = tile.dead ? kSentinel : peek_word(slot);
      while (word == kSentinel && !tile.dead &&
             patience.more(p.group, tile.first_row + row, kPartialPhase, source)) {
        word = peek_word(slot);
      }
      if (!tile.dead) push_word(slot, kSentinel);
      sum += float_of(word);
    }
    shared.scale[row] = reciprocal_sqrt(sum * p.inverse_hidden_size + p.eps);
  }
  block_barrier();  // all of shared.scale is written
}

// Waits until every piece that has a slot is full; after a time-out the missing words are NaN.
FW_DEVICE void await_pieces(const GroupParams& group, const Piece (&piece)[kAhead],
                            char* const (&slot)[kAhead], Words (&v)[kAhead]) {
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

template <class Type, int kWorld, Output kOutput>
FW_DEVICE void gather(const Tile<kWorld>& tile, const TwoShotShared& shared) {
  const TwoShotParams& p = tile.p;
  const int rank = p.group.rank;
  const int lane = thread_index() % kWarp;
  const int warps = thread_count() / kWarp;
  const int count = tile.units() * (kWorld - 1);
  void* sums = kOutput == Output::kSum ? p.output.out : p.residual_out;
  for (int i = thread_index() / kWarp; i < count; i += warps * kAhead) {
    Piece piece[kAhead];
    char* slot[kAhead];
    Words v[kAhead];
    Words weight[kAhead] = {};
    FW_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int number = i + j * warps;
      piece[j] = tile.piece(number, kWorld - 1, rank + 1);
      if (number >= count) piece[j].column = -1;
      const long long unit = tile.global_unit(piece[j].unit);
      slot[j] = p.group.slots[rank] + slot_offset<kWorld>(p.group, kGatherPhase, unit, lane) +
                dense(piece[j].owner, rank) * kUnitBytes;
      if (piece[j].column < 0 || tile.dead) slot[j] = nullptr;
      v[j] = slot[j] != nullptr ? peek_words(slot[j]) : empty_slot();
      if (kOutput == Output::kNorm && piece[j].column >= 0) {
        weight[j] = weight_at(p, piece[j].column);
      }
    }
    await_pieces(p.group, piece, slot, v);
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
}

template <class Type, int kWorld, Output kOutput, bool kEarlyTrigger, class Skew = NoSkew>
FW_DEVICE void two_shot(const TwoShotParams& p, TwoShotShared& shared) {
  prefetch(p.group.dead);
  if (thread_index() < p.rows_per_tile * p.shard_units) {
    const long long unit = static_cast<long long>(block_index()) * p.rows_per_tile * p.shard_units;
    const long long at = unit + thread_index();
    if (at < p.group.unit_capacity) prefetch(p.group.epochs + at);
  }
  dependency_wait();  // by every thread, as in one_shot
  const bool dead = is_dead(p.group);
  const int tiles = (p.num_tokens + p.rows_per_tile - 1) / p.rows_per_tile;
  for (int number = block_index(); number < tiles; number += block_count()) {
    const int first_row = number * p.rows_per_tile;
    const int left = p.num_tokens - first_row;
    const Tile<kWorld> tile{p, first_row, left < p.rows_per_tile ? left : p.rows_per_tile, dead};
    open_tile(tile, shared);
    Skew::before_push(p.group.rank, first_row);
    if (!dead) scatter(tile, shared);
    if (kEarlyTrigger) dependents_launch();
    Skew::before_take(p.group.rank, first_row);
    reduce<Type, kWorld, kOutput>(tile, shared);
    if (kOutput != Output::kSum) exchange_squares(tile, shared);
    gather<Type, kWorld, kOutput>(tile, shared);
    if (kOutput == Output::kNorm) {
      write_own<Type>(tile, shared);
    } else if (kOutput != Output::kSum) {
      write_fp8<Type, kWorld, kOutput>(tile, shared);
    }
    block_barrier();  // nobody reads this tile's shared memory any more, and all have stored
  }
  if (!kEarlyTrigger) dependents_launch();
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_CUH
