// Some tokens of a row, and which of them top_k, top_p and min_p keep.
//
// Owns: cutting a ranking without sorting it, by counting (or weighing) in buckets of value. Knows nothing of rows, of
// how candidates were found, or of the draw. Included by sample.h only.

#pragma once

#include "sample_simd.h"

namespace phi {
namespace PHI_ISA {
namespace sampling {

constexpr int kBuckets = 1024;
// So few are sorted.
constexpr int kFew = 64;

// In the order of their ids. Arrays have kSampleSlack of room behind them, as have `part_*`, which find_cut uses.
struct Candidates {
  float *values, *weights;
  int32_t* ids;
  float *part_values, *part_weights;
  int n;
};

// What a ranking keeps: values above `least`, and of those equal to it the first `num_least`.
struct Cut {
  float least;
  int32_t num_least;
};

PHI_INLINE uint32_t first_bits(int n) { return n >= 16 ? 0xffffu : (1u << n) - 1u; }

// find_cut for few values: sorts them.
inline Cut find_cut_sorted(const float* values, const float* weights, int n, double above, double target) {
  float v[kFew], w[kFew];
  for (int i = 0; i < n; i++) {
    int j = i;
    for (; j > 0 && v[j - 1] < values[i]; j--) v[j] = v[j - 1], w[j] = w[j - 1];
    v[j] = values[i];
    w[j] = weights ? weights[i] : 1.0f;
  }
  int kept = 0;
  for (; kept < n && above < target; kept++) above += w[kept];
  Cut cut = {v[kept - 1], 0};
  for (int i = kept - 1; i >= 0 && v[i] == cut.least; i--) cut.num_least++;
  return cut;
}

// The fewest largest of values [n] whose weights (null: 1 each) sum up to `target` > 0: one is kept if those before it
// do not reach it. Values are finite; equal ones have equal weights and are ranked as they stand. All if all weigh
// less.
inline Cut find_cut(const Candidates& c, const float* weights, double target) {
  float* values = c.values;
  int n = c.n;
  // The weight of all values above those that are left.
  double above = 0.0;
  double mass[2][kBuckets];
  while (n > kFew) {
    // So that whole vectors can be read.
    for (int i = 0; i < 16; i++) values[n + i] = values[0];
    F16 low = F16::load(values), high = low;
    for (int i = 16; i < n; i += 16) {
      F16 v = F16::load(values + i);
      low = min(low, v), high = max(high, v);
    }
    float hi = reduce_max(high), lo = -reduce_max(F16::zero() - low);
    if (hi == lo) {
      int kept = 0;
      for (; kept < n && above < target; kept++) above += weights ? weights[kept] : 1.0f;
      return {lo, kept};
    }
    // The largest goes to the first bucket and the smallest to the last, so there is always less left.
    const F16 top = F16::set1(hi), span = F16::set1(hi - lo), last = F16::set1(kBuckets - 1);
    std::memset(mass, 0, sizeof mass);
    for (int i = 0; i < n; i += 16) {
      int16_t bucket[16];
      to_i16((top - F16::load(values + i)) / span * last, bucket);
      int m = n - i < 16 ? n - i : 16;
      // Two sums for each bucket: an addition need not wait for the one before it.
      for (int j = 0; j < m; j++) mass[j & 1][bucket[j]] += weights ? weights[i + j] : 1.0f;
    }
    int b = 0;
    for (; b < kBuckets; b++) {
      double next = above + (mass[0][b] + mass[1][b]);
      if (next >= target) break;
      above = next;
    }
    if (b == kBuckets) return {lo, n};
    const F16 wanted = F16::set1(static_cast<float>(b));
    int left = 0;
    for (int i = 0; i < n; i += 16) {
      F16 v = F16::load(values + i), bucket = round((top - v) / span * last);
      uint32_t mask = mask_ge(bucket, wanted) & mask_ge(wanted, bucket) & first_bits(n - i);
      if (mask == 0) continue;
      if (weights) pack(mask, F16::load(weights + i), c.part_weights + left);
      pack(mask, v, c.part_values + left);
      left += __builtin_popcount(mask);
    }
    values = c.part_values;
    if (weights) weights = c.part_weights;
    n = left;
  }
  return find_cut_sorted(values, weights, n, above, target);
}

PHI_INLINE void keep(Candidates& c, int i, uint32_t mask, int& kept) {
  pack(mask, F16::load(c.values + i), c.values + kept);
  pack(mask, F16::load(c.weights + i), c.weights + kept);
  pack_ids(mask, c.ids + i, c.ids + kept);
  kept += __builtin_popcount(mask);
}

inline void keep_cut(Candidates& c, Cut cut) {
  const F16 least = F16::set1(cut.least);
  int kept = 0;
  for (int i = 0; i < c.n; i += 16) {
    F16 v = F16::load(c.values + i);
    uint32_t mask = mask_ge(v, least) & first_bits(c.n - i);
    if (mask == 0) continue;
    uint32_t equal = mask & mask_ge(least, v);
    int num_equal = __builtin_popcount(equal);
    for (; num_equal > cut.num_least; num_equal--) {
      uint32_t highest = 1u << (31 - __builtin_clz(equal));
      equal &= ~highest, mask &= ~highest;
    }
    cut.num_least -= num_equal;
    keep(c, i, mask, kept);
  }
  c.n = kept;
}

inline void keep_at_least(Candidates& c, float weight) {
  int kept = 0;
  for (int i = 0; i < c.n; i += 16) {
    uint32_t mask = mask_ge(F16::load(c.weights + i), F16::set1(weight)) & first_bits(c.n - i);
    if (mask) keep(c, i, mask, kept);
  }
  c.n = kept;
}

}  // namespace sampling
}  // namespace PHI_ISA
}  // namespace phi
