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
// What is fast about it: nothing waits that need not. Own columns are loaded with those that are
// sent; a reducing warp sends its sum of squares first; the others take the peers' columns meanwhile,
// so that behind the last partial sum only the norm is left.
//
// Progress. As one_shot, with tiles for rows: tiles are equal on all ranks (rows_per_tile follows
// from the shape), taken in rising order, and all blocks are resident. The smallest unfinished tile
// has been scattered by all its blocks on all ranks, so it is reduced by all, so gathered by all.

#ifndef FUSEWISE_TWO_SHOT_CUH
#define FUSEWISE_TWO_SHOT_CUH

#include "two_shot_pieces.cuh"

namespace fusewise {

// Where this lane sends the sum of squares of this rank's columns in a unit: lanes share out the blocks
// of the tile, its own and the peers'. Null: nowhere.
template <class Config>
FW_DEVICE char* partial_target(const Tile<Config>& tile, int unit) {
  constexpr int kWorld = Config::kWorld;
  const GroupParams& group = tile.p.group;
  const int lane = thread_index() % kWarp;
  const int block = lane / kWorld;
  const int peer = lane % kWorld;  // the last is this rank
  if (block >= Config::kBlocks || tile.dead || tile.columns(unit, group.rank) <= 0) return nullptr;
  const unsigned long long words =
      partial_offset<kWorld>(group, tile.global_unit(unit), block) + group.rank * 4;
  if (peer == Config::kPeers) return block != tile.share ? group.slots + words : nullptr;
  // peers[] begins at this rank's vectors there.
  return group.peers[peer] + words - source_of<kWorld>(group.rank) * kUnitBytes;
}

// Takes this rank's columns in a unit of all ranks, adds and sends them; they are returned as rounded.
template <class Config>
FW_DEVICE Words reduce_unit(const Tile<Config>& tile, TwoShotShared& shared,
                            const Own<Config>& own) {
  using Type = typename Config::Type;
  constexpr int kWorld = Config::kWorld;
  const TwoShotParams& p = tile.p;
  const Piece& piece = own.piece;
  const unsigned phase = own.epoch % 2;
  float squares = 0.0f;
  Words rounded = {};
  Arrival<kWorld> peers;
  Computed addresses;  // but for the first, while the answer is under way
  if (piece.used) {
    peers.slot = p.group.slots + tile.scatter_slot(piece, phase);
    addresses.add(peers.slot);
    peers.ask(p.group, or_nan(canonical(own.x), tile.dead));
  }
  unsigned long long gathered = tile.gather_slot(piece);
  addresses.add(gathered);
  char* target = nullptr;
  if (Config::kEarlyTarget) {
    target = partial_target(tile, piece.unit);
    addresses.add(target);
  }
  peers.await(p.group, piece.row, phase, piece.used && !tile.dead);
  if (piece.used) {
    Floats<Type> total = peers.template sum<Type>();
    if (Config::kHasNorm) add<Type>(total, own.residual);
    rounded = canonical(pack<Type>(total));
    squares = piece.is_copy ? 0.0f : sum_of_squares<Type>(total);
  }
  unsigned word = 0;
  if (Config::kHasNorm) {
    // First, because the peers need it before they can use the columns.
    word = canonical_word(bits_of(warp_sum(squares)));
    if (!Config::kEarlyTarget) target = partial_target(tile, piece.unit);
    if (target != nullptr) push_word(target, word);
  } else {
    warp_barrier();  // all lanes have taken theirs, as behind warp_sum: two may have the same slots
  }
  if (piece.owns() && !tile.dead) push_to_peers<kWorld>(p.group, gathered, rounded);
  if (Config::kHasNorm && thread_index() % kWarp == 0) {
    shared.squares[piece.unit * kWorld + p.group.rank] = float_of(word);
  }
  if (piece.used) {
    if (!tile.dead) peers.empty_all();
    void* sums = Config::kHasNorm ? p.residual_out : p.output.out;
    store_words(static_cast<char*>(sums) + tile.place(piece), rounded);
  }
  return rounded;
}

// All units of this warp, of which `own` is the first.
template <class Config>
FW_DEVICE Kept reduce(const Tile<Config>& tile, TwoShotShared& shared, Own<Config> own) {
  Kept kept = {};
  for (int i = reducing_warp(); i < tile.own_units(); i += thread_count() / kWarp) {
    const bool first = i == reducing_warp();
    if (!first) {
      own = Own<Config>(tile, i);
      own.load();
      own.load_rest(tile);
    }
    const Words rounded = reduce_unit(tile, shared, own);
    if (Config::kOutput == Output::kNorm && !Config::kEarlyWeight && own.piece.used) {
      own.weight = weight_at(tile.p, own.piece.column);
    }
    if (first) kept = {rounded, own.weight};
    if (Config::kOnePass) break;
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
  } while (!patience.is_over(group, true) || (source == group.rank && peek_word(group.dead) == 0));
  give_up(group, row, kPartialPhase, source);
  return kSentinel;
}

// Waits for the partial sums that this block has not made, a thread each; afterwards all are in shared
// memory, where every thread adds those of its row: every rank the same words in the same order. First
// by the warps that reduced, because a peer owes no word before it has all ranks' columns; second to
// whoever waits for those, as Gathered is.
template <class Config>
FW_DEVICE void await_squares(const Tile<Config>& tile, TwoShotShared& shared) {
  constexpr int kWorld = Config::kWorld;
  const TwoShotParams& p = tile.p;
  const int shard_units = Config::shard_units(p);
  const int thread = reducing_warp() * kWarp + thread_index() % kWarp;
  for (int i = thread; i < tile.units() * kWorld; i += thread_count()) {
    const int unit = i / kWorld;
    const int source = i % kWorld;
    unsigned word = tile.dead ? kSentinel : 0;
    const bool is_own = source == p.group.rank && tile.owns(unit);
    if (!is_own && !tile.dead && tile.columns(unit, source) > 0) {
      char* slot = p.group.slots + source * 4 +
                   partial_offset<kWorld>(p.group, tile.global_unit(unit), tile.share);
      word = await_word(p.group, slot, tile.first_row + unit / shard_units, source);
      push_word(slot, kSentinel);
    }
    if (!is_own) shared.squares[i] = float_of(word);
    if (Config::kOnePass) break;
  }
  block_barrier();  // all of shared.squares is written
}

// When nobody of the block reads the tile's epochs any more. `epoch` is that of the warp's first unit.
template <class Config>
FW_DEVICE void raise_epochs(const Tile<Config>& tile, unsigned epoch) {
  if (thread_index() % kWarp != 0) return;
  for (int i = reducing_warp(); i < tile.own_units(); i += thread_count() / kWarp) {
    const int unit = tile.own_unit(i);
    if (i != reducing_warp()) epoch = tile.epoch(unit);
    store_word(tile.p.group.epochs + tile.global_unit(unit), epoch + 1);
    if (Config::kOnePass) break;
  }
}

// One tile from the first load to the last store of its sums and norms.
template <class Config, class Skew>
FW_DEVICE void run_tile(const Tile<Config>& tile, TwoShotShared& shared,
                        Scattered<Config>& first, Own<Config>& own) {
  constexpr bool kPlainNorm = Config::kOutput == Output::kNorm;
  const int warp = thread_index() / kWarp;
  const int rank = tile.p.group.rank;
  Skew::before_push(rank, tile.first_row);
  first.load();
  own.load();
  first.send(tile);
  const int pieces = Config::kOnePass ? 0 : tile.peers_pieces();
  const int at_once = thread_count() / kWarp * Config::kAhead;
  for (int i = warp + at_once; i < pieces; i += at_once) {
    Scattered<Config> more(tile, i);
    more.load();
    more.send(tile);
  }
  own.load_rest(tile);
  Skew::before_take(rank, tile.first_row);
  const Kept kept = reduce(tile, shared, own);
  // The first columns while nobody can have all partial sums yet.
  Gathered<Config> gathered;
  gathered.ask(tile, warp);
  gathered.await(tile.p.group);
  gathered.store_sums(tile);
  if (Config::kHasNorm) await_squares(tile, shared);
  if (kPlainNorm) gathered.store_norms(tile, shared);
  for (int i = warp + at_once; i < pieces; i += at_once) {
    gathered.ask(tile, i);
    gathered.await(tile.p.group);
    gathered.store_sums(tile);
    if (kPlainNorm) gathered.store_norms(tile, shared);
  }
  if (kPlainNorm) {
    write_own(tile, shared, kept);
  } else if (Config::kHasNorm) {
    write_fp8(tile, shared);
  }
  block_barrier();  // nobody reads this tile's epochs or shared memory any more, and all have stored
  raise_epochs(tile, own.epoch);
}

template <class Config, class Skew = NoSkew>
FW_DEVICE void two_shot(const TwoShotParams& p, TwoShotShared& shared) {
  const int warp = thread_index() / kWarp;
  const int workers = block_count() / Config::kBlocks;
  int number = block_index() / Config::kBlocks;  // there are no more workers than tiles
  Tile<Config> tile(p, number);
  Scattered<Config> first(tile, warp);
  Own<Config> own(tile, reducing_warp());
  Computed addresses;
  first.compute_now(addresses);
  own.compute_now(addresses);
  const unsigned* dead_copy = copy_of_dead(p.group);
  addresses.add(dead_copy);
  dependency_wait(addresses);  // by every thread, as in one_shot
  if (Config::kEarlyTrigger) dependents_launch();
  tile.dead = is_dead(dead_copy);
  for (;;) {
    run_tile<Config, Skew>(tile, shared, first, own);
    if (Config::kOnePass) break;
    number += workers;
    tile.go_to(number);
    if (tile.rows <= 0) break;
    first = Scattered<Config>(tile, warp);
    own = Own<Config>(tile, reducing_warp());
  }
  if (!Config::kEarlyTrigger) dependents_launch();
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_CUH
