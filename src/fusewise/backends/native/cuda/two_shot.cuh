// Two-shot push: every rank reduces its share of the columns and sends the result to everybody.
//
// Per tile of rows: (1) scatter: send each peer its columns; (2) reduce: take one's own columns of
// all ranks, add in rank order in fp32, add the residual, round, send the rounded columns and, per
// unit, the sum of squares of the unrounded ones; (3) gather: take the peers' columns and partial
// sums, add the latter in a fixed order, and normalise. Every rank normalises the same rounded
// columns with the same sum, so all get the same bits. A message crosses each link
// 2 (world - 1) / world times. Where rows are few, several blocks share a tile, unit by unit; each
// needs all partial sums, so those are sent to each, also by the other blocks of its own rank.
//
// Slots. Scatter slots have two phases with an epoch per unit (slots.cuh). Gathered columns and
// partial sums have one: an owner sends either only after it took the scatter of the same call from
// all ranks, each of which sent it after its kernel of the call before had ended, and with it every
// read of a gathered slot; a rank's own blocks send each other words after the call before has ended
// too. An owner without columns in a unit sends no partial sum of it, and nobody expects one.
//
// Progress. As one_shot, with tiles for rows: tiles are equal on all ranks (rows_per_tile follows
// from the shape), taken in rising order, and all blocks are resident. The smallest unfinished tile
// has been scattered by all its blocks on all ranks, so it is reduced by all, so gathered by all.

#ifndef FUSEWISE_TWO_SHOT_CUH
#define FUSEWISE_TWO_SHOT_CUH

#include "two_shot_pieces.cuh"

namespace fusewise {

// What a warp keeps of its first unit from reduce() to the end; of further units it reads it back.
struct Kept {
  Words sum;       // this rank's rounded columns
  Words weight;    // of these columns
  unsigned epoch;  // as read; raised at the end of the tile, when nobody reads it any more
};

// Sends the sum of squares of this rank's columns in a unit to every block of the tile, its own and
// the peers': a lane each.
template <class Config>
FW_DEVICE void send_squares(const Tile<Config>& tile, TwoShotShared& shared, int unit, float sum) {
  constexpr int kWorld = Config::kWorld;
  const GroupParams& group = tile.p.group;
  const int lane = thread_index() % kWarp;
  const unsigned word = canonical_word(bits_of(sum));
  if (lane == 0) shared.squares[unit * kWorld + group.rank] = float_of(word);
  if (lane >= Config::kBlocks * kWorld || tile.dead || !tile.has_columns(unit, group.rank)) return;
  const int block = lane / kWorld;
  const int peer = lane % kWorld;  // the last is this rank
  const long long words = partial_offset<kWorld>(group, tile.global_unit(unit), block);
  if (peer < Config::kPeers) {
    // peers[] begins at this rank's vectors there.
    const int source = dense(group.rank, (group.rank + 1 + peer) % kWorld);
    push_word(group.peers[peer] + words + group.rank * 4 - source * kUnitBytes, word);
  } else if (block != tile.share) {
    push_word(group.slots + words + group.rank * 4, word);
  }
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
  for (int i = reducing_warp(); i < tile.own_units(); i += thread_count() / kWarp) {
    const Piece piece = tile.own_piece(i);
    const unsigned epoch = tile.epoch(piece.unit);
    const bool first = i < thread_count() / kWarp;
    if (first) kept.epoch = epoch;
    float squares = 0.0f;
    Words rounded = {};
    Arrival<kWorld> peers;
    if (piece.column >= 0) {
      Words own = load_words(static_cast<const char*>(p.x) + tile.place(piece));
      Words residual = {};
      if (has_residual) {
        residual = load_words(static_cast<const char*>(p.residual) + tile.place(piece));
      }
      if (first && Config::kOutput == Output::kNorm) kept.weight = weight_at(p, piece.column);
      const unsigned phase = epoch % 2;
      const long long unit = tile.global_unit(piece.unit);
      peers.slot = p.group.slots + slot_offset<kWorld>(p.group, phase, unit, lane);
      peers.ask();
      own = or_nan(canonical(own), tile.dead);
      if (!tile.dead) peers.await(p.group, piece.row, phase);
      Floats<Type> total = sum_over_ranks<Type, kWorld>(p.group.rank, peers.got, own);
      if (has_residual) add<Type>(total, residual);
      rounded = canonical(pack<Type>(total));
      if (!tile.dead) {
        push_to_peers<kWorld>(p.group, slot_offset<kWorld>(p.group, kGatherPhase, unit, lane),
                              rounded);
      }
      squares = sum_of_squares<Type>(total);
      if (first) kept.sum = rounded;
    }
    if (Config::kHasNorm) send_squares(tile, shared, piece.unit, warp_sum(squares));
    // What nobody waits for comes last.
    if (piece.column >= 0) {
      if (!tile.dead) peers.empty();
      store_words(static_cast<char*>(sums) + tile.place(piece), rounded);
    }
  }
  return kept;
}

// The block of this rank that owes a word waits for the peers itself, and says for whom in vain.
FW_DEVICE unsigned await_word(const GroupParams& group, const char* slot, int row, int source) {
  Patience patience;
  do {
    FW_KEEP_LOOP
    for (int polls = 0; polls < kPollsPerCheck; ++polls) {
      const unsigned word = peek_word(slot);
      if (word != kSentinel) return word;
    }
  } while (!patience.is_over(group) || (source == group.rank && peek_word(group.dead) == 0));
  give_up(group, row, kPartialPhase, source);
  return kSentinel;
}

// Waits for the partial sums that this block has not made, a thread each; afterwards all are in shared
// memory, where every thread adds those of its row: every rank the same words in the same order. By the
// warps that reduced: a peer owes no word before it has all ranks' columns, and whoever waits in vain
// should name the rank that is missing, not one that waits for it too.
template <class Config>
FW_DEVICE void await_squares(const Tile<Config>& tile, TwoShotShared& shared) {
  constexpr int kWorld = Config::kWorld;
  const TwoShotParams& p = tile.p;
  const int shard_units = Config::shard_units(p);
  const int thread = reducing_warp() * kWarp + thread_index() % kWarp;
  for (int i = thread; i < tile.units() * kWorld; i += thread_count()) {
    const int unit = i / kWorld;
    const int source = i % kWorld;
    if (source == p.group.rank && tile.owns(unit)) continue;
    unsigned word = tile.dead ? kSentinel : 0;
    if (!tile.dead && tile.has_columns(unit, source)) {
      const long long words = partial_offset<kWorld>(p.group, tile.global_unit(unit), tile.share);
      char* slot = p.group.slots + words + source * 4;
      word = await_word(p.group, slot, tile.first_row + unit / shard_units, source);
      push_word(slot, kSentinel);
    }
    shared.squares[i] = float_of(word);
  }
  block_barrier();  // all of shared.squares is written
}

// When nobody of the block reads the tile's epochs any more.
template <class Config>
FW_DEVICE void raise_epochs(const Tile<Config>& tile, const Kept& kept) {
  const int warps = thread_count() / kWarp;
  for (int i = reducing_warp(); i < tile.own_units(); i += warps) {
    if (thread_index() % kWarp != 0) continue;
    const int unit = tile.own_unit(i);
    const unsigned epoch = i < warps ? kept.epoch : tile.epoch(unit);
    store_word(tile.p.group.epochs + tile.global_unit(unit), epoch + 1);
  }
}

// One tile from the first load to the last store of its sums and norms.
template <class Config, class Skew>
FW_DEVICE void run_tile(const Tile<Config>& tile, TwoShotShared& shared,
                        const Scattered<Config>& first) {
  constexpr bool kPlainNorm = Config::kOutput == Output::kNorm;
  const int warp = thread_index() / kWarp;
  const int warps = thread_count() / kWarp;
  const int rank = tile.p.group.rank;
  Skew::before_push(rank, tile.first_row);
  first.send(tile);
  for (int i = warp + warps * Config::kAhead; i < tile.peers_pieces();
       i += warps * Config::kAhead) {
    Scattered<Config>(tile, i).send(tile);
  }
  Skew::before_take(rank, tile.first_row);
  const Kept kept = reduce(tile, shared);
  // The first vectors are asked for before the partial sums are awaited: one trip, not two.
  Gathered<Config> gathered;
  gathered.ask(tile, warp, kPlainNorm);
  if (Config::kHasNorm) {
    await_squares(tile, shared);
    raise_epochs(tile, kept);
  }
  for (int i = warp; i < tile.peers_pieces(); i += warps * Config::kAhead) {
    if (i != warp) gathered.ask(tile, i, kPlainNorm);
    gathered.await(tile.p.group);
    gathered.write(tile, shared);
  }
  if (kPlainNorm) {
    write_own(tile, shared, kept.sum, kept.weight);
  } else if (Config::kHasNorm) {
    write_fp8(tile, shared);
  }
  block_barrier();  // nobody reads this tile's epochs or shared memory any more, and all have stored
  if (!Config::kHasNorm) raise_epochs(tile, kept);
}

template <class Config, class Skew = NoSkew>
FW_DEVICE void two_shot(const TwoShotParams& p, TwoShotShared& shared) {
  const int warp = thread_index() / kWarp;
  const int workers = block_count() / Config::kBlocks;
  int number = block_index() / Config::kBlocks;  // there are no more workers than tiles
  Tile<Config> tile(p, number);
  Scattered<Config> first(tile, warp);
  first.compute_now();
  dependency_wait();  // by every thread, as in one_shot
  if (Config::kEarlyTrigger) dependents_launch();
  tile.dead = is_dead(p.group);
  for (;;) {
    run_tile<Config, Skew>(tile, shared, first);
    number += workers;
    tile.go_to(number);
    if (tile.rows <= 0) break;
    first = Scattered<Config>(tile, warp);
  }
  if (!Config::kEarlyTrigger) dependents_launch();
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_CUH
