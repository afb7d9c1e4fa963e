// What the two-shot kernel writes once a tile's sums and scales are known.
//
// Every rank computes the norm from the rounded sums, which are the same bits on all of them.

#ifndef FUSEWISE_TWO_SHOT_OUTPUTS_CUH
#define FUSEWISE_TWO_SHOT_OUTPUTS_CUH

#include "two_shot_tile.cuh"

namespace fusewise {

FW_DEVICE Words weight_at(const TwoShotParams& p, int column) {
  return load_words(static_cast<const char*>(p.weight) + column * kVectorBytes);
}

// What a row is multiplied by, from the partial sums of its columns; in any thread.
template <class Config>
FW_DEVICE float scale_of(const Tile<Config>& tile, const TwoShotShared& shared, int row) {
  const int count = Config::shard_units(tile.p) * Config::kWorld;
  const float* squares = shared.squares + (row - tile.first_row) * count;
  float part[4] = {};
  FW_UNROLL
  for (int i = 0; i < count; ++i) part[i % 4] += squares[i];
  const float sum = (part[0] + part[1]) + (part[2] + part[3]);
  return scale_of_sum(sum, tile.p.inverse_hidden_size, tile.p.eps);
}

// The norm of one vector as words of the element type.
template <class Config>
FW_DEVICE Words norm_of(const Tile<Config>& tile, float scale, Words sum, Words weight) {
  using Type = typename Config::Type;
  return pack<Type>(normalise<Type>(unpack<Type>(sum), scale, weight, tile.p.weight_bias));
}

// What a warp keeps of its first unit from its sum to its norm; of further units it reads it back.
struct Kept {
  Words sum;     // this rank's rounded columns
  Words weight;  // of these columns
};

// The norm of this rank's own columns.
template <class Config>
FW_DEVICE void write_own(const Tile<Config>& tile, const TwoShotShared& shared, Kept kept) {
  const TwoShotParams& p = tile.p;
  for (int i = reducing_warp(); i < tile.own_units(); i += thread_count() / kWarp) {
    const Piece piece = tile.own_piece(i);
    if (piece.used) {
      if (i != reducing_warp()) {
        kept.sum = load_words(static_cast<const char*>(p.residual_out) + tile.place(piece));
        kept.weight = weight_at(p, piece.column);
      }
      store_words(static_cast<char*>(p.output.out) + tile.place(piece),
                  norm_of(tile, scale_of(tile, shared, piece.row), kept.sum, kept.weight));
    }
    if (Config::kOnePass) break;
  }
}

// FP8: a warp per row, over the finished sums: rows and groups straddle the owners' columns.
template <class Config>
FW_DEVICE void write_fp8(const Tile<Config>& tile, const TwoShotShared& shared) {
  using Type = typename Config::Type;
  constexpr Output kOutput = Config::kOutput;
  const int row_vectors = Config::row_vectors(tile.p);
  const TwoShotParams& p = tile.p;
  constexpr int kLanes = kGroup / Floats<Type>::kCount;
  const int lane = thread_index() % kWarp;
  const int groups = (row_vectors + kLanes - 1) / kLanes;
  block_barrier();  // the tile's sums are stored
  for (int i = thread_index() / kWarp; i < tile.rows; i += thread_count() / kWarp) {
    const int row = tile.first_row + i;
    const long long start = static_cast<long long>(row) * row_vectors;
    const char* sums = static_cast<const char*>(p.residual_out) + start * kVectorBytes;
    const float row_scale = scale_of(tile, shared, row);
    float scale = 0.0f;
    if (kOutput == Output::kStaticFp8) scale = float_of(load_word(p.output.static_scale));
    if (kOutput == Output::kTokenFp8) {
      float largest = 0.0f;
      for (int column = lane; column < row_vectors; column += kWarp) {
        const Words sum = load_words(sums + column * kVectorBytes);
        const Words norm = norm_of(tile, row_scale, sum, weight_at(p, column));
        largest = max_or_nan(largest, largest_of<Type>(unpack<Type>(norm)));
      }
      scale = dynamic_scale<kOutput>(warp_max(largest, kWarp));
      if (lane == 0) store_word(p.output.scales + row, bits_of(scale));
    }
    for (int first = 0; first < row_vectors; first += kWarp) {
      const int column = first + lane;
      const bool used = column < row_vectors;
      Words norm = {};
      if (used) {
        const Words sum = load_words(sums + column * kVectorBytes);
        norm = norm_of(tile, row_scale, sum, weight_at(p, column));
      }
      if (kOutput == Output::kGroupFp8) {
        const float largest = used ? largest_of<Type>(unpack<Type>(norm)) : 0.0f;
        scale = dynamic_scale<kOutput>(warp_max(largest, kLanes));
        if (used && column % kLanes == 0) {
          const long long at = static_cast<long long>(row) * groups + column / kLanes;
          store_word(p.output.scales + at, bits_of(scale));
        }
      }
      if (!used) continue;
      if (p.output.out != nullptr) {
        store_words(static_cast<char*>(p.output.out) + (start + column) * kVectorBytes, norm);
      }
      store_e4m3<Type, kOutput>(p.output.quantised, start + column, unpack<Type>(norm), scale);
    }
  }
}

}  // namespace fusewise

#endif  // FUSEWISE_TWO_SHOT_OUTPUTS_CUH
