// What is written for a row once its norm is known: the element type, FP8, or both.
//
// FP8 values are quantised from the norm as rounded to the element type, so that they equal what a
// separate quantiser makes of the normal output. A scale is what the reader multiplies by. The rule
// is vLLM's, bit for bit: static scales multiply by the reciprocal, dynamic ones divide. Only NaN
// differs: vLLM's quantisers turn it into 448, ours keep it, so that a dead group gives no number.

#ifndef FUSEWISE_OUTPUTS_CUH
#define FUSEWISE_OUTPUTS_CUH

#include "row_reduce.cuh"
#include "vectors.cuh"

namespace fusewise {

enum class Output { kSum, kNorm, kStaticFp8, kTokenFp8, kGroupFp8 };

constexpr float kFp8Max = 448.0f;                       // the largest finite e4m3
constexpr float kMinScale = 1.0f / (kFp8Max * 512.0f);  // vLLM's floor for a token's scale
constexpr float kMinLargest = 1e-10f;                   // vLLM's floor for a group's magnitude
constexpr int kGroup = 128;                             // elements of one group

struct OutputParams {
  void* out;                  // [num_tokens, hidden_size], or null beside FP8
  void* quantised;            // e4m3 [num_tokens, hidden_size]
  float* scales;              // [num_tokens] or [num_tokens, ceil(hidden_size / 128)]: written
  const float* static_scale;  // one number: read
};

template <class Type>
FW_DEVICE float largest_of(const Floats<Type>& v) {
  float largest = 0.0f;
  FW_UNROLL
  for (int i = 0; i < Floats<Type>::kCount; ++i) largest = max_or_nan(largest, absolute(v.at[i]));
  return largest;
}

template <Output kOutput>
FW_DEVICE float dynamic_scale(float largest) {
  if (kOutput == Output::kGroupFp8) return max_or_nan(largest, kMinLargest) / kFp8Max;
  return max_or_nan(largest / kFp8Max, kMinScale);
}

// v / scale as vLLM rounds it; `scale` is the reciprocal where the scale is static.
template <Output kOutput>
FW_DEVICE float scaled(float v, float scale) {
  return kOutput == Output::kStaticFp8 ? v * scale : v / scale;
}

// One vector as e4m3, at vector number `vector` of the output: 8 bytes from a 16-bit type, 4 from
// fp32.
template <class Type, Output kOutput>
FW_DEVICE void store_e4m3(void* quantised, long long vector, const Floats<Type>& v, float scale) {
  const float by = kOutput == Output::kStaticFp8 ? 1.0f / scale : scale;
  unsigned word[Floats<Type>::kCount / 4];
  FW_UNROLL
  for (int i = 0; i < Floats<Type>::kCount / 4; ++i) {
    const float* at = v.at + 4 * i;
    word[i] = to_e4m3_pair(scaled<kOutput>(at[0], by), scaled<kOutput>(at[1], by)) |
              to_e4m3_pair(scaled<kOutput>(at[2], by), scaled<kOutput>(at[3], by)) << 16;
  }
  char* at = static_cast<char*>(quantised) + vector * Floats<Type>::kCount;
  if (Floats<Type>::kCount == 8) {
    store_two_words(at, word[0], word[Floats<Type>::kCount / 4 - 1]);
  } else {
    store_word(at, word[0]);
  }
}

}  // namespace fusewise

#endif  // FUSEWISE_OUTPUTS_CUH
