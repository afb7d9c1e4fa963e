// What a thread of the two-shot kernel has under way at once: pieces it sends, pieces it gathers.

#ifndef FUSEWISE_TWO_SHOT_PIECES_CUH
#define FUSEWISE_TWO_SHOT_PIECES_CUH

#include "two_shot_outputs.cuh"

namespace fusewise {

// Up to Config::kAhead vectors that a thread sends to their owners.
template <class Config>
struct Scattered {
  Piece piece[Config::kAhead];
  const char* x[Config::kAhead];
  unsigned* epoch[Config::kAhead];

  FW_DEVICE Scattered(const Tile<Config>& tile, int first) {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      piece[j] = tile.peers_piece(first + j * (thread_count() / kWarp));
      x[j] = static_cast<const char*>(tile.p.x) + tile.place(piece[j]);
      epoch[j] = tile.p.group.epochs + tile.global_unit(piece[j].unit);
    }
  }

  FW_DEVICE void compute_now() {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      fusewise::compute_now(x[j]);
      fusewise::compute_now(epoch[j]);
    }
  }

  FW_DEVICE void send(const Tile<Config>& tile) const {
    const GroupParams& group = tile.p.group;
    Words v[Config::kAhead];
    unsigned phase[Config::kAhead];
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (piece[j].column < 0) continue;
      v[j] = load_words(x[j]);
      phase[j] = load_word(epoch[j]) % 2;
    }
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (piece[j].column < 0 || tile.dead) continue;
      const long long unit = tile.global_unit(piece[j].unit);
      const long long offset =
          slot_offset<Config::kWorld>(group, phase[j], unit, thread_index() % kWarp);
      push_words(group.peers[piece[j].peer] + offset, canonical(v[j]));
    }
  }
};

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

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_PIECES_CUH
