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
  char* target[Config::kAhead];  // of phase 0
  Words v[Config::kAhead];
  unsigned phase[Config::kAhead];

  FW_DEVICE Scattered(const Tile<Config>& tile, int first) {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      piece[j] = tile.peers_piece(first + j * (thread_count() / kWarp));
      x[j] = static_cast<const char*>(tile.p.x) + tile.place(piece[j]);
      epoch[j] = tile.p.group.epochs + tile.global_unit(piece[j].unit);
      target[j] = tile.p.group.peers[piece[j].peer] + tile.scatter_slot(piece[j], 0);
    }
  }

  FW_DEVICE void compute_now(Computed& addresses) {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      addresses.add(x[j]);
      addresses.add(epoch[j]);
      addresses.add(target[j]);
    }
  }

  FW_DEVICE void load() {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (!piece[j].used) continue;
      v[j] = load_words(x[j]);
      phase[j] = load_word(epoch[j]) % 2;
    }
  }

  FW_DEVICE void send(const Tile<Config>& tile) const {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (!piece[j].owns() || tile.dead) continue;
      push_words(target[j] + phase[j] * kSourcesBytes<Config::kWorld>, canonical(v[j]));
    }
  }
};

// A vector of this rank's own columns and what its sum and its norm need besides the peers' parts.
template <class Config>
struct Own {
  Piece piece;
  const char* x_at;
  unsigned* epoch_at;  // null: the block has no such piece
  unsigned epoch = 0;
  Words x;
  Words residual;
  Words weight = {};

  // Piece number `i` of this block's own columns.
  FW_DEVICE Own(const Tile<Config>& tile, int i) {
    const GroupParams& group = tile.p.group;
    piece = tile.own_piece(i);
    x_at = static_cast<const char*>(tile.p.x) + tile.place(piece);
    epoch_at = i < tile.own_units() ? group.epochs + tile.global_unit(piece.unit) : nullptr;
  }

  FW_DEVICE void compute_now(Computed& addresses) {
    addresses.add(x_at);
    addresses.add(epoch_at);
  }

  // What the sum needs.
  FW_DEVICE void load() {
    if (epoch_at == nullptr) return;
    epoch = load_word(epoch_at);
    if (piece.used) x = load_words(x_at);
  }

  FW_DEVICE void load_rest(const Tile<Config>& tile) {
    const TwoShotParams& p = tile.p;
    if (epoch_at == nullptr || !piece.used) return;
    residual = nothing_to_add<typename Config::Type>();
    if (Config::kHasNorm && p.residual != nullptr) {
      residual = load_words(static_cast<const char*>(p.residual) + tile.place(piece));
    }
    if (Config::kEarlyWeight) weight = weight_at(p, piece.column);
  }
};

// Up to Config::kAhead gathered vectors that a thread has asked for.
template <class Config>
struct Gathered {
  Piece piece[Config::kAhead];
  char* slot[Config::kAhead];
  Words v[Config::kAhead];
  Words weight[Config::kAhead];

  FW_DEVICE void ask(const Tile<Config>& tile, int first) {
    const TwoShotParams& p = tile.p;
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      piece[j] = tile.peers_piece(first + j * (thread_count() / kWarp));
      slot[j] = p.group.slots + source_of<Config::kWorld>(piece[j].owner) * kUnitBytes +
                tile.gather_slot(piece[j]);
      if (!piece[j].used || tile.dead) slot[j] = nullptr;
      v[j] = slot[j] != nullptr ? peek_words(slot[j]) : empty_slot();
      weight[j] = Words{};
      if (Config::kOutput == Output::kNorm && piece[j].used) {
        weight[j] = weight_at(p, piece[j].column);
      }
    }
  }

  // Waits until every piece that has a slot is full; after a time-out the missing words are NaN. Second
  // to the warps that reduce: those know which rank is missing, while an owner's columns may be missing
  // because it waits for that rank too.
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
    } while (!patience.is_over(group, true));
    give_up(group, row, kGatherPhase, owner);
  }

  // Empties the slots and stores the sums.
  FW_DEVICE void store_sums(const Tile<Config>& tile) const {
    if (!Config::kFullUnits) warp_barrier();  // all lanes have taken theirs: two may have the same slot
    void* sums = Config::kHasNorm ? tile.p.residual_out : tile.p.output.out;
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (!piece[j].used) continue;
      if (slot[j] != nullptr) push_words(slot[j], empty_slot());
      store_words(static_cast<char*>(sums) + tile.place(piece[j]), v[j]);
    }
  }

  FW_DEVICE void store_norms(const Tile<Config>& tile, const TwoShotShared& shared) const {
    FW_UNROLL
    for (int j = 0; j < Config::kAhead; ++j) {
      if (!piece[j].used) continue;
      store_words(static_cast<char*>(tile.p.output.out) + tile.place(piece[j]),
                  norm_of(tile, scale_of(tile, shared, piece[j].row), v[j], weight[j]));
    }
  }
};

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_PIECES_CUH
