// A tile of rows in the two-shot kernel: its pieces, its slots, and what its threads share.
//
// Pure addressing. The protocol is in two_shot.cuh.

#ifndef FUSEWISE_TWO_SHOT_TILE_CUH
#define FUSEWISE_TWO_SHOT_TILE_CUH

#include "outputs.cuh"

namespace fusewise {

constexpr int kMaxTileRows = 16;
constexpr int kMaxTileUnits = 256;
constexpr int kGatherPhase = 2;
constexpr int kPartialPhase = 3;
constexpr int kAhead = 4;  // vectors a thread loads or asks for before it uses the first

// Mirrored in params.py; tensors as in OneShotParams.
struct TwoShotParams {
  GroupParams group;
  OutputParams output;
  const void* x;
  const void* residual;
  const void* weight;
  void* residual_out;
  int num_tokens;
  int row_vectors;
  int shard_vectors;  // ceil(row_vectors / world): columns of rank r begin at r * shard_vectors
  int shard_units;    // ceil(shard_vectors / 32)
  int rows_per_tile;
  float inverse_hidden_size;
  float eps;
  float weight_bias;
};

struct TwoShotShared {
  float squares[kMaxTileUnits * kMaxRanks];  // per unit and owner: the partial sums
  float scale[kMaxTileRows];
};

// A warp's piece of a tile: 32 vectors of one owner's columns in one row.
struct Piece {
  int row;     // in the message
  int owner;
  int unit;    // within the tile
  int column;  // this lane's vector in the row; -1: none
};

template <int kWorld>
struct Tile {
  const TwoShotParams& p;
  int first_row;
  int rows;
  bool dead;  // sends nothing, takes nothing, gives NaN

  FW_DEVICE int units() const { return rows * p.shard_units; }

  // Piece number `i` of `owners` owners per unit; owner number 0 is `first_owner`.
  FW_DEVICE Piece piece(int i, int owners, int first_owner) const {
    Piece piece;
    piece.unit = i / owners;
    piece.owner = (first_owner + i % owners) % kWorld;
    piece.row = first_row + piece.unit / p.shard_units;
    const int lane = thread_index() % kWarp;
    const int in_shard = piece.unit % p.shard_units * kWarp + lane;
    const int column = piece.owner * p.shard_vectors + in_shard;
    const bool used = in_shard < p.shard_vectors && column < p.row_vectors;
    piece.column = used ? column : -1;
    return piece;
  }

  // Whether the owner has columns in this unit: the last owners of a narrow row may have none.
  FW_DEVICE bool has_columns(int unit, int owner) const {
    return owner * p.shard_vectors + unit % p.shard_units * kWarp < p.row_vectors;
  }

  FW_DEVICE unsigned epoch(int unit) const {
    return load_word(p.group.epochs + global_unit(unit));
  }

  FW_DEVICE long long global_unit(int unit) const {
    return static_cast<long long>(first_row) * p.shard_units + unit;
  }

  FW_DEVICE long long place(const Piece& piece) const {
    return (static_cast<long long>(piece.row) * p.row_vectors + piece.column) * kVectorBytes;
  }
};

FW_DEVICE int dense(int source, int owner) { return source - (source > owner ? 1 : 0); }

// Where the partial sum of an owner's unit arrives: a word per unit and source, behind the vectors.
template <int kWorld>
FW_DEVICE char* partial_slot(const GroupParams& group, int receiver, int source, long long unit) {
  const long long before = 3 * group.unit_capacity * (kWorld - 1) * kUnitBytes;
  return group.slots[receiver] + before + (unit * (kWorld - 1) + dense(source, receiver)) * 4;
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_TILE_CUH
