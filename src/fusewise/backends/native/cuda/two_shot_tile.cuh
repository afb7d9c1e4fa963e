// A tile of rows in the two-shot kernel: its pieces, its slots, and what its threads share.
//
// Pure addressing. The protocol is in two_shot.cuh.

#ifndef FUSEWISE_TWO_SHOT_TILE_CUH
#define FUSEWISE_TWO_SHOT_TILE_CUH

#include "outputs.cuh"

namespace fusewise {

constexpr int kMaxTileRows = 16;
constexpr int kMaxTileUnits = 256;
constexpr int kMaxTileBlocks = 4;
constexpr int kGatherPhase = 2;
constexpr int kPartialPhase = 3;

// Mirrored in params.py; tensors as in OneShotParams.
struct TwoShotParams {
  const void* x;
  int num_tokens;
  int rows_per_tile;
  GroupParams group;
  const void* residual;
  const void* weight;
  void* residual_out;
  float inverse_hidden_size;
  float eps;
  float weight_bias;
  int row_vectors;
  OutputParams output;
  int shard_vectors;  // ceil(row_vectors / world): columns of rank r begin at r * shard_vectors
  int shard_units;    // ceil(shard_vectors / 32)
};

// What is compiled, as OneShotConfig.
template <class Type_, int kWorld_, int kAhead_, int kBlocks_, Output kOutput_,
          bool kEarlyTrigger_, bool kOnePass_ = false, int kRowVectors_ = 0>
struct TwoShotConfig {
  using Type = Type_;
  static constexpr int kWorld = kWorld_;
  static constexpr int kPeers = kWorld - 1;
  static constexpr int kAhead = kAhead_;  // vectors a thread loads or asks for before it uses one
  static constexpr int kBlocks = kBlocks_;  // that share a tile, each its units
  static constexpr Output kOutput = kOutput_;
  static constexpr bool kEarlyTrigger = kEarlyTrigger_;
  // Every worker has one tile, and no warp has more pieces in it than it has under way at once.
  static constexpr bool kOnePass = kOnePass_;
  static constexpr bool kHasNorm = kOutput != Output::kSum;
  // Whether there are registers for what is needed after the wait only.
  static constexpr bool kEarlyWeight = kOutput == Output::kNorm && kWorld < 8;
  static constexpr bool kEarlyTarget = kHasNorm && kAhead == 1;
  static_assert(kBlocks <= kMaxTileBlocks && kBlocks * kWorld <= kWarp, "a lane sends each word");
  static_assert(kBlocks == 1 || kOutput == Output::kNorm || kOutput == Output::kSum,
                "an FP8 output looks at whole rows");
  static constexpr int kRowVectors = kRowVectors_;
  static constexpr int kShardVectors = (kRowVectors + kWorld - 1) / kWorld;
  static constexpr bool kEqualShards = kRowVectors > 0 && kRowVectors % kWorld == 0;
  static constexpr bool kFullUnits = kEqualShards && kShardVectors % kWarp == 0;

  FW_DEVICE static int row_vectors(const TwoShotParams& p) {
    return kRowVectors > 0 ? kRowVectors : p.row_vectors;
  }
  FW_DEVICE static int shard_vectors(const TwoShotParams& p) {
    return kRowVectors > 0 ? kShardVectors : p.shard_vectors;
  }
  FW_DEVICE static int shard_units(const TwoShotParams& p) {
    return kRowVectors > 0 ? (kShardVectors + kWarp - 1) / kWarp : p.shard_units;
  }
};

struct TwoShotShared {
  alignas(16) float squares[kMaxTileUnits * kMaxRanks];  // per unit and owner: the partial sums
};

// A warp's piece of a tile: 32 vectors of one owner's columns in one row. Where those end within the
// warp, the lanes behind their end repeat the last vector, as in one-shot (RowPart).
struct Piece {
  int row;       // in the message
  int owner;     // number `peer` in GroupParams::peers, if it is another rank
  int peer;
  int unit;      // within the tile
  int lane;      // this lane's vector in the unit
  int column;    // and in the row
  bool used;     // of all lanes of the warp, or of none
  bool is_copy;  // another lane's vector

  // Whether the vector is this lane's, and no repetition.
  FW_DEVICE bool owns() const { return used && !is_copy; }
};

// Where the gathered vectors of a unit arrive: behind all of the scatter's slots.
template <int kWorld>
FW_DEVICE unsigned long long gather_offset(const GroupParams& group, unsigned unit) {
  const unsigned long long behind = 2ull * group.unit_capacity + unit;
  return behind * kSourcesBytes<kWorld>;
}

// Where the partial sums of a unit arrive, behind the vectors: for each block that may share a tile a
// word per source, this rank among them.
template <int kWorld>
FW_DEVICE unsigned long long partial_offset(const GroupParams& group, unsigned unit, int block) {
  const unsigned long long vectors = gather_offset<kWorld>(group, group.unit_capacity);
  const unsigned word = (unit * kMaxTileBlocks + block) * kWorld;
  return vectors + static_cast<unsigned long long>(word) * 4;
}

template <class Config>
struct Tile {
  const TwoShotParams& p;
  int first_row;
  int rows;           // none behind the last tile
  int share;          // this block among the tile's: it has every kBlocks-th unit, of all owners
  bool dead = false;  // sends nothing, takes nothing, gives NaN

  FW_DEVICE Tile(const TwoShotParams& p, int number)
      : p(p), share(block_index() % Config::kBlocks) {
    go_to(number);
  }

  FW_DEVICE void go_to(int number) {
    first_row = number * p.rows_per_tile;
    const int left = p.num_tokens - first_row;
    rows = left < p.rows_per_tile ? left : p.rows_per_tile;
  }

  FW_DEVICE int units() const { return rows * Config::shard_units(p); }
  FW_DEVICE int own_units() const {
    return (units() - share + Config::kBlocks - 1) / Config::kBlocks;
  }
  FW_DEVICE int own_unit(int i) const { return i * Config::kBlocks + share; }
  FW_DEVICE bool owns(int unit) const { return unit % Config::kBlocks == share; }

  // Piece number `i` of this block, of this rank's own columns.
  FW_DEVICE Piece own_piece(int i) const { return piece(own_unit(i), -1); }

  // Piece number `i` of this block, of all peers' columns; none from number peers_pieces() on.
  FW_DEVICE int peers_pieces() const { return own_units() * Config::kPeers; }
  FW_DEVICE Piece peers_piece(int i) const {
    Piece found = piece(own_unit(i / Config::kPeers), i % Config::kPeers);
    if (i >= peers_pieces()) found.used = false;
    return found;
  }

  FW_DEVICE Piece piece(int unit, int peer) const {
    Piece piece;
    piece.unit = unit;
    piece.peer = peer;
    piece.owner = (p.group.rank + 1 + peer) % Config::kWorld;
    piece.row = first_row + unit / Config::shard_units(p);
    const int lane = thread_index() % kWarp;
    const int left = columns(unit, piece.owner);
    piece.used = Config::kEqualShards || left > 0;
    piece.is_copy = !Config::kFullUnits && lane >= left;
    piece.lane = piece.is_copy ? left - 1 : lane;
    piece.column = first_column(unit, piece.owner) + piece.lane;
    return piece;
  }

  FW_DEVICE int first_column(int unit, int owner) const {
    return owner * Config::shard_vectors(p) + unit % Config::shard_units(p) * kWarp;
  }

  // The owner's columns from the first of this unit on. The last owners of a narrow row may have none.
  FW_DEVICE int columns(int unit, int owner) const {
    const int in_shard = Config::shard_vectors(p) - unit % Config::shard_units(p) * kWarp;
    if (Config::kEqualShards) return in_shard;
    const int in_row = Config::row_vectors(p) - first_column(unit, owner);
    return in_shard < in_row ? in_shard : in_row;
  }

  FW_DEVICE unsigned epoch(int unit) const {
    return load_word(p.group.epochs + global_unit(unit));
  }

  FW_DEVICE unsigned global_unit(int unit) const {
    return static_cast<unsigned>(first_row) * Config::shard_units(p) + unit;
  }

  // Behind a rank's slots: this lane's vector of a piece, of the first source.
  FW_DEVICE unsigned long long scatter_slot(const Piece& piece, unsigned phase) const {
    return slot_offset<Config::kWorld>(global_unit(piece.unit), piece.lane) +
           phase * kSourcesBytes<Config::kWorld>;
  }

  FW_DEVICE unsigned long long gather_slot(const Piece& piece) const {
    return gather_offset<Config::kWorld>(p.group, global_unit(piece.unit)) +
           piece.lane * kVectorBytes;
  }

  // Bytes into a tensor of the message's shape.
  FW_DEVICE unsigned long long place(const Piece& piece) const {
    const unsigned vector =
        static_cast<unsigned>(piece.row) * Config::row_vectors(p) + piece.column;
    return static_cast<unsigned long long>(vector) * kVectorBytes;
  }
};

// The warp's number where a rank's own columns are shared out: from the last, which have the fewest of
// the peers' to send before they can wait.
FW_DEVICE int reducing_warp() { return thread_count() / kWarp - 1 - thread_index() / kWarp; }

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_TILE_CUH
