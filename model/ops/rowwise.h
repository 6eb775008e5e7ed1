// What is done to one row (token) at a time: norm, rotation, activation, and rounding to integers.
//
// Owns: this arithmetic (reference.py has it in torch). Rows are independent. Knows nothing of layers.

#pragma once

#include "rowwise_args.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// What int16 rows are rounded to at most: 256 * 127 + 127, so that both bytes of a number are int8 (linear_amx.h).
constexpr float kLargestInt16 = 32639.0f;

// The largest magnitude of n numbers (a multiple of 16); NaN if one of them is no finite number.
PHI_INLINE float largest_magnitude(const float* y, int n) {
  F16 largest = F16::zero(), bad = F16::zero();
  for (int i = 0; i < n; i += 16) {
    F16 v = F16::load(y + i);
    largest = max(largest, abs(v));
    bad = fma(v, F16::zero(), bad);
  }
  float nan = reduce_add(bad);
  return nan == 0.0f ? reduce_max(largest) : nan;
}

// The scale for numbers up to `largest`, which become integers up to `limit`; and its inverse. A NaN makes the scale
// NaN, so that the row's results are NaN and nobody else's. So small that the inverse would overflow counts as zero.
PHI_INLINE float scale_for(float largest, float limit, float& inverse) {
  bool usable = largest > 1e-30f;
  inverse = usable ? limit / largest : 0.0f;
  return usable ? largest / limit : (largest == largest ? 0.0f : largest);
}

// y times `inverse`, within the limits: its rounding may bring the largest just above; a NaN becomes the limit.
PHI_INLINE F16 scaled(const float* y, float inverse, float limit) {
  F16 v = F16::load(y) * F16::set1(inverse);
  return max(F16::set1(-limit), min(v, F16::set1(limit)));
}

inline void quantize_groups(const float* y, int k32, QuantizedRow out) {
  int8_t* x = static_cast<int8_t*>(out.x);
  for (int g = 0; g < k32 / 32; g++) {
    const float* group = y + 32 * g;
    float inverse, scale = scale_for(largest_magnitude(group, 32), 127.0f, inverse);
    to_i8(scaled(group, inverse, 127.0f), x + 32 * g);
    to_i8(scaled(group + 16, inverse, 127.0f), x + 32 * g + 16);
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += x[32 * g + i];
    out.scale[g] = scale;
    out.group_sums[g] = scale * static_cast<float>(sum);
    out.offsets[g] = -128 * sum;
  }
}

// 32 numbers to int16, in the order in which the linear layers of this instruction set read them.
PHI_INLINE void store_rounded(F16 first, F16 second, int i, int k32, void* row) {
#if defined(PHI_AMX)
  // linear_amx.h's planes: bytes of four inputs in quantize.py's order, the lower ones of 32 inputs and then the upper ones.
  alignas(64) static constexpr uint8_t kOrder[64] = {
#define PHI_FOUR(at, upper) at + upper, at + 4 + upper, at + 2 + upper, at + 6 + upper
#define PHI_ALL(upper) \
  PHI_FOUR(0, upper), PHI_FOUR(8, upper), PHI_FOUR(16, upper), PHI_FOUR(24, upper), PHI_FOUR(32, upper), \
      PHI_FOUR(40, upper), PHI_FOUR(48, upper), PHI_FOUR(56, upper)
      PHI_ALL(0), PHI_ALL(1)
#undef PHI_ALL
#undef PHI_FOUR
  };
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first.v));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second.v));
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  // Half a high byte more, for the low one is signed; that turns the low byte's sign.
  const __m512i raised = _mm512_add_epi16(words, _mm512_set1_epi16(128));
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kOrder), raised);
  const __m256i low = _mm256_xor_si256(_mm512_castsi512_si256(bytes), _mm256_set1_epi8(-128));
  char* to = static_cast<char*>(row) + i;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k32), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_extracti64x4_epi64(bytes, 1));
#else
  (void)k32;
  to_i16(first, static_cast<int16_t*>(row) + i);
  to_i16(second, static_cast<int16_t*>(row) + i + 16);
#endif
}

// Rounds y [k32] (zeros from k on) to integers with one scale, or one for each group.
inline void quantize_row(const float* y, int k32, QuantizedRow out) {
  if (out.group_sums != nullptr) {
    quantize_groups(y, k32, out);
    return;
  }
  float inverse;
  *out.scale = scale_for(largest_magnitude(y, k32), kLargestInt16, inverse);
  for (int i = 0; i < k32; i += 32) {
    store_rounded(scaled(y + i, inverse, kLargestInt16), scaled(y + i + 16, inverse, kLargestInt16), i, k32, out.x);
  }
}

// RMS norm of x [k] (readable and zero up to k32) times weight, then rounded. `scratch` [k32].
inline void norm_quantize(const float* x, const float* weight, float eps, int k, int k32, float* scratch,
                          QuantizedRow out) {
  F16 squares = F16::zero();
  for (int i = 0; i < k32; i += 16) {
    F16 v = F16::load(x + i);
    squares = fma(v, v, squares);
  }
  F16 factor = F16::set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(k) + eps));
  for (int i = 0; i < k32; i += 16) (F16::load(x + i) * factor * F16::load(weight + i)).store(scratch + i);
  quantize_row(scratch, k32, out);
}

// silu(gate) * up, rounded; gate_up holds k gates and then k ups. `scratch` [k32].
inline void silu_mul_quantize(const float* gate_up, int k, int k32, float* scratch, QuantizedRow out) {
  const F16 minus_log2e = F16::set1(-1.44269504f), one = F16::set1(1.0f);
  for (int i = 0; i < k32; i += 16) {
    int n = k - i;
    F16 gate, up;
    if (n >= 16) {
      gate = F16::load(gate_up + i), up = F16::load(gate_up + k + i);
    } else if (n > 0) {
      gate = load_first(gate_up + i, n), up = load_first(gate_up + k + i, n);
    } else {
      gate = up = F16::zero();
    }
    (gate / (one + exp2(gate * minus_log2e)) * up).store(scratch + i);
  }
  quantize_row(scratch, k32, out);
}

// Any row [k], rounded. `scratch` [k32].
inline void copy_quantize(const float* x, int k, int k32, float* scratch, QuantizedRow out) {
  for (int i = 0; i < k; i++) scratch[i] = x[i];
  for (int i = k; i < k32; i++) scratch[i] = 0.0f;
  quantize_row(scratch, k32, out);
}

// Turns the first 2 * half numbers of each of num_heads heads (Hugging Face's halves: i and i + half are a pair).
inline void rotate_heads(float* heads, int num_heads, int head_dim, const float* cos, const float* sin, int half) {
  for (int h = 0; h < num_heads; h++) {
    float* x = heads + static_cast<int64_t>(h) * head_dim;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
      F16 a = F16::load(x + i), b = F16::load(x + half + i), c = F16::load(cos + i), s = F16::load(sin + i);
      (a * c - b * s).store(x + i);
      (b * c + a * s).store(x + half + i);
    }
    for (; i < half; i++) {
      float a = x[i], b = x[half + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half + i] = b * cos[i] + a * sin[i];
    }
  }
}

inline void widen_row(const uint16_t* bf16, int k, float* out) {
  int i = 0;
  for (; i + 16 <= k; i += 16) from_bf16(bf16 + i).store(out + i);
  for (; i < k; i++) {
    uint32_t bits = static_cast<uint32_t>(bf16[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

}  // namespace PHI_ISA
}  // namespace phi
