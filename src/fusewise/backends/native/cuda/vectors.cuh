// Element types, and 16-byte vectors of them as fp32.
//
// Moves bits unchanged and rounds only in pack(): signed zeros, subnormals and infinities survive
// every step. Knows nothing of ranks.

#ifndef FUSEWISE_VECTORS_CUH
#define FUSEWISE_VECTORS_CUH

#include "primitives.cuh"

namespace fusewise {

constexpr float kLeastNormal = 1.17549435e-38f;

// Each type says how many elements one 4-byte word holds and how words become fp32 and back.
struct BFloat16 {
  static constexpr int kPerWord = 2;
  static constexpr unsigned kNegativeZeros = 0x80008000u;
  FW_DEVICE static void unpack(unsigned word, float* value) {
    value[0] = float_of(word << 16);
    value[1] = float_of(word & 0xffff0000u);
  }
  FW_DEVICE static unsigned pack(const float* value) { return to_bfloat_pair(value[0], value[1]); }
};

struct Float16 {
  static constexpr int kPerWord = 2;
  static constexpr unsigned kNegativeZeros = 0x80008000u;
  FW_DEVICE static void unpack(unsigned word, float* value) {
    value[0] = half_to_float(word & 0xffffu);
    value[1] = half_to_float(word >> 16);
  }
  FW_DEVICE static unsigned pack(const float* value) { return to_half_pair(value[0], value[1]); }
};

struct Float32 {
  static constexpr int kPerWord = 1;
  static constexpr unsigned kNegativeZeros = 0x80000000u;
  FW_DEVICE static void unpack(unsigned word, float* value) { value[0] = float_of(word); }
  FW_DEVICE static unsigned pack(const float* value) { return bits_of(value[0]); }
};

// One vector's elements in fp32.
template <class Type>
struct Floats {
  static constexpr int kCount = 4 * Type::kPerWord;
  float at[kCount];
};

template <class Type>
FW_DEVICE Floats<Type> unpack(Words words) {
  Floats<Type> v;
  FW_UNROLL
  for (int i = 0; i < 4; ++i) Type::unpack(words.word[i], v.at + i * Type::kPerWord);
  return v;
}

// To the element type, to nearest even.
template <class Type>
FW_DEVICE Words pack(const Floats<Type>& v) {
  Words words;
  FW_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = Type::pack(v.at + i * Type::kPerWord);
  return words;
}

// What changes nothing when it is added, not even the sign of a zero.
template <class Type>
FW_DEVICE Words nothing_to_add() {
  constexpr unsigned kWord = Type::kNegativeZeros;
  return Words{{kWord, kWord, kWord, kWord}};
}

template <class Type>
FW_DEVICE void add(Floats<Type>& sum, Words words) {
  const Floats<Type> v = unpack<Type>(words);
  FW_UNROLL
  for (int i = 0; i < Floats<Type>::kCount; ++i) sum.at[i] += v.at[i];
}

template <class Type>
FW_DEVICE float sum_of_squares(const Floats<Type>& v) {
  float part[4] = {};  // side by side
  FW_UNROLL
  for (int i = 0; i < Floats<Type>::kCount; ++i) part[i % 4] += v.at[i] * v.at[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// What a row is multiplied by: its root mean square's reciprocal.
FW_DEVICE float scale_of_sum(float squares, float inverse_hidden_size, float eps) {
  const float mean = squares * inverse_hidden_size + eps;
  return eps >= kLeastNormal ? reciprocal_sqrt_of_normal(mean) : reciprocal_sqrt(mean);
}

// v * scale * (weight + bias), in this order, as the unfused kernel of this package computes it.
template <class Type>
FW_DEVICE Floats<Type> normalise(const Floats<Type>& v, float scale, Words weight, float bias) {
  Floats<Type> norm = unpack<Type>(weight);
  FW_UNROLL
  for (int i = 0; i < Floats<Type>::kCount; ++i) {
    norm.at[i] = v.at[i] * scale * (norm.at[i] + bias);
  }
  return norm;
}

}  // namespace fusewise

#endif  // FUSEWISE_VECTORS_CUH
