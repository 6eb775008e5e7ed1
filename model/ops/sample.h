// From one row of logits to a token: argmax, or temperature, min_p, top_k, top_p and the draw.
//
// Owns: this arithmetic; sampler.py's numpy code is its reference and says what the parameters mean. A row's token
// depends on its SampleArgs alone. Knows nothing of what changes logits before the draw.
//
// Nothing is sorted. A pass over the row finds the largest logit of each block; whatever truncates then needs only
// candidates, and most blocks hold none.

#pragma once

#include "sample_args.h"
#include "sample_candidates.h"

namespace phi {
namespace PHI_ISA {
namespace sampling {

constexpr float kInfinity = __builtin_inff();
// exp2 is 0 below: such tokens cannot be drawn.
constexpr float kLowest = -126.0f;
// Thresholds that only have to be low enough are lowered by this (in powers of two), well above rounding errors.
constexpr float kMargin = 1e-3f;

struct Row {
  const float* logits;
  int n, num_blocks;
  // The largest logit; log2(e) / temperature.
  float peak, slope;
  // Of each block (then -infinity, to whole vectors); of each of its sixteen lanes.
  float *block_max, *lane_max;
  // Running sums are kept by block.
  double* sums;
};

// The logits of block b. Of one that the row does not fill: in `padded`, with -infinity behind them.
PHI_INLINE const float* block_of(const Row& row, int b, float* padded) {
  const float* x = row.logits + static_cast<int64_t>(b) * kSampleBlock;
  int n = row.n - b * kSampleBlock;
  if (n >= kSampleBlock) return x;
  for (int i = 0; i < kSampleBlock; i++) padded[i] = i < n ? x[i] : -kInfinity;
  return padded;
}

// log2 of a logit's weight; the weight of the largest is 1.
PHI_INLINE F16 exponent(const Row& row, F16 v) { return (v - F16::set1(row.peak)) * F16::set1(row.slope); }
PHI_INLINE float exponent(const Row& row, float v) { return (v - row.peak) * row.slope; }

// Sets peak, block_max and lane_max; returns whether no logit is NaN or +infinity.
inline bool find_largest(Row& row) {
  const F16 finite = F16::set1(-3.40282347e38f), none = F16::set1(-kInfinity);
  F16 bad0 = F16::zero(), bad1 = F16::zero(), bad2 = F16::zero(), bad3 = F16::zero();
  float padded[kSampleBlock];
  row.peak = -kInfinity;
  for (int b = 0; b < row.num_blocks; b++) {
    const float* x = block_of(row, b, padded);
    F16 even = none, odd = none;
    for (int i = 0; i < kSampleBlock; i += 64) {
      F16 v0 = F16::load(x + i), v1 = F16::load(x + i + 16), v2 = F16::load(x + i + 32), v3 = F16::load(x + i + 48);
      even = max(even, max(v0, v2));
      odd = max(odd, max(v1, v3));
      // max returns its second operand if one is NaN. -infinity is no error and must not become NaN here.
      bad0 = fma(max(finite, v0), F16::zero(), bad0);
      bad1 = fma(max(finite, v1), F16::zero(), bad1);
      bad2 = fma(max(finite, v2), F16::zero(), bad2);
      bad3 = fma(max(finite, v3), F16::zero(), bad3);
    }
    even = max(even, odd);
    even.store(row.lane_max + 16 * b);
    row.block_max[b] = reduce_max(even);
    if (row.block_max[b] > row.peak) row.peak = row.block_max[b];
  }
  return reduce_add((bad0 + bad1) + (bad2 + bad3)) == 0.0f;
}

inline int32_t why_not(const Row& row) {
  for (int i = 0; i < row.n; i++) {
    if (row.logits[i] != row.logits[i]) return kSampleNan;
  }
  return kSampleInfinite;
}

inline int32_t first_largest(const Row& row) {
  int b = 0;
  while (row.block_max[b] != row.peak) b++;
  int i = b * kSampleBlock;
  while (row.logits[i] != row.peak) i++;
  return i;
}

// Appends those of x [n, a multiple of 16] that are at least `bound` and whose exponent is at least `lowest`, as ids
// `first`, ...
PHI_INLINE void gather(const Row& row, const float* x, int n, int first, float bound, float lowest, Candidates& out) {
  for (int i = 0; i < n; i += 16) {
    F16 v = F16::load(x + i);
    uint32_t mask = mask_ge(exponent(row, v), F16::set1(lowest)) & mask_ge(v, F16::set1(bound));
    if (mask == 0) continue;
    pack(mask, v, out.values + out.n);
    pack_places(mask, first + i, out.ids + out.n);
    out.n += __builtin_popcount(mask);
  }
}

inline void gather_row(const Row& row, float bound, float lowest, Candidates& out) {
  float padded[kSampleBlock];
  out.n = 0;
  for (int b = 0; b < row.num_blocks; b++) {
    if (row.block_max[b] < bound || exponent(row, row.block_max[b]) < lowest) continue;
    gather(row, block_of(row, b, padded), kSampleBlock, b * kSampleBlock, bound, lowest, out);
  }
  for (int i = 0; i < out.n; i += 16) exp2(exponent(row, F16::load(out.values + i))).store(out.weights + i);
}

// A logit that at least k of the row reach, and few more: the k-th largest of the largest of many groups.
inline float reached_by(const Row& row, int k, float lowest, Candidates& c) {
  // The bound is good with at least twice as many groups as k; with fewer than k there is none.
  bool few = k <= row.num_blocks / 2;
  if (!few && k > row.num_blocks * 8) return -kInfinity;
  c.n = 0;
  if (few) {
    gather(row, row.block_max, (row.num_blocks + 15) / 16 * 16, 0, -kInfinity, lowest, c);
  } else {
    gather(row, row.lane_max, row.num_blocks * 16, 0, -kInfinity, lowest, c);
  }
  return c.n < k ? -kInfinity : find_cut(c, nullptr, k).least;
}

inline double add_up(const double* sums, int n) {
  double total = 0.0;
  for (int i = 0; i < n; i++) total += sums[i];
  return total;
}

// Sets row.sums to the sums of all weights by block; returns their total.
inline double sum_row(const Row& row) {
  float padded[kSampleBlock];
  for (int b = 0; b < row.num_blocks; b++) {
    Sum sum = Sum::zero();
    if (exponent(row, row.block_max[b]) >= kLowest) {
      const float* x = block_of(row, b, padded);
      for (int i = 0; i < kSampleBlock; i += 16) sum.add(exp2(exponent(row, F16::load(x + i))));
    }
    row.sums[b] = reduce_add(sum);
  }
  return add_up(row.sums, row.num_blocks);
}

// The same of weights [n]. Zeroes what stands behind them.
inline double sum_weights(float* weights, int n, double* sums) {
  for (int i = 0; i < 16; i++) weights[n + i] = 0.0f;
  int num_blocks = (n + kSampleBlock - 1) / kSampleBlock;
  for (int b = 0; b < num_blocks; b++) {
    Sum sum = Sum::zero();
    int end = (b + 1) * kSampleBlock < n ? (b + 1) * kSampleBlock : n;
    for (int i = b * kSampleBlock; i < end; i += 16) sum.add(F16::load(weights + i));
    sums[b] = reduce_add(sum);
  }
  return add_up(sums, num_blocks);
}

// The first place at which the running sum exceeds u times the total (u < 1), in two steps: its block, and the place
// in that block's weights. `target` is set by the first; `before` is the sum of the blocks before.
inline int find_block(const double* sums, double total, double u, double& before, double& target) {
  target = u * total;
  before = 0.0;
  // The last sum is total itself, and above target.
  for (int b = 0;; b++) {
    double next = before + sums[b];
    if (next > target) return b;
    before = next;
  }
}
inline int find_place(const float* weights, int n, double before, double target) {
  int last = 0;
  for (int i = 0; i < n; i++) {
    if (weights[i] == 0.0f) continue;
    before += weights[i];
    if (before > target) return i;
    last = i;
  }
  // The two sums of the block differ in the last bit, and the target lies between them.
  return last;
}

inline int32_t draw_from_row(const Row& row, double total, double u) {
  double before, target;
  int b = find_block(row.sums, total, u, before, target);
  float padded[kSampleBlock], weights[kSampleBlock];
  const float* x = block_of(row, b, padded);
  for (int i = 0; i < kSampleBlock; i += 16) exp2(exponent(row, F16::load(x + i))).store(weights + i);
  return b * kSampleBlock + find_place(weights, kSampleBlock, before, target);
}

inline int32_t draw_from(const Candidates& c, double* sums, double u) {
  double total = sum_weights(c.weights, c.n, sums), before, target;
  int start = find_block(sums, total, u, before, target) * kSampleBlock, n = c.n - start;
  return c.ids[start + find_place(c.weights + start, n < kSampleBlock ? n : kSampleBlock, before, target)];
}

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// sampler.py's `uniform`.
inline double uniform(uint64_t seed, uint64_t position) {
  const uint64_t golden = 0x9E3779B97F4A7C15u;
  return static_cast<double>(mix(mix(seed + golden) + (position + 1) * golden) >> 11) * 0x1p-53;
}

inline int32_t draw(const SampleArgs& args, const Row& row, Candidates& c) {
  double u = uniform(args.seed, args.position);
  bool top_k = args.top_k > 0 && args.top_k < row.n, min_p = args.min_p > 0.0f, top_p = args.top_p < 1.0;
  double total = 0.0;
  float bound = -kInfinity, lowest = kLowest;
  auto raise_lowest = [&](double weight) {
    float threshold = static_cast<float>(std::log2(weight)) - kMargin;
    if (threshold > lowest) lowest = threshold;
  };
  if (min_p) raise_lowest(static_cast<double>(args.min_p));
  if (top_k) {
    bound = reached_by(row, args.top_k, lowest, c);
  } else if (!min_p) {
    total = sum_row(row);
    if (!top_p) return draw_from_row(row, total, u);
    // Tokens lighter than this weigh, all together, less than 1 - top_p of the total, so the others hold the nucleus.
    raise_lowest((1.0 - args.top_p) * total / row.n);
  }
  gather_row(row, bound, lowest, c);
  // The order of min_p and top_k is free: each keeps the upper part of one and the same ranking.
  if (top_k && c.n > args.top_k) keep_cut(c, find_cut(c, nullptr, args.top_k));
  if (min_p) keep_at_least(c, args.min_p);
  if (top_p) {
    if (top_k || min_p) total = sum_weights(c.weights, c.n, row.sums);
    keep_cut(c, find_cut(c, c.weights, args.top_p * total));
  }
  return draw_from(c, row.sums, u);
}

}  // namespace sampling

// Sets args.token and args.status. `scratch`: sample_scratch_floats(args.vocab), aligned for double.
inline void sample_row(SampleArgs& args, float* scratch) {
  sampling::Row row;
  row.logits = args.logits;
  row.n = args.vocab;
  row.num_blocks = (row.n + kSampleBlock - 1) / kSampleBlock;
  auto take = [&](int64_t n) {
    float* start = scratch;
    scratch += n;
    return start;
  };
  row.sums = reinterpret_cast<double*>(take(row.num_blocks * int64_t{2}));
  int num_maxima = (row.num_blocks + 15) / 16 * 16;
  row.block_max = take(num_maxima);
  for (int b = row.num_blocks; b < num_maxima; b++) row.block_max[b] = -sampling::kInfinity;
  row.lane_max = take(row.num_blocks * int64_t{16});
  args.token = -1;
  bool finite = sampling::find_largest(row);
  args.status = kSampled;
  if (!finite) args.status = sampling::why_not(row);
  else if (row.peak == -sampling::kInfinity) args.status = kSampleMasked;
  if (args.status != kSampled) return;
  if (args.temperature == 0.0f) {
    args.token = sampling::first_largest(row);
    return;
  }
  row.slope = 1.44269504f / args.temperature;
  int64_t size = row.n + int64_t{kSampleSlack};
  sampling::Candidates candidates;
  candidates.values = take(size);
  candidates.weights = take(size);
  candidates.ids = reinterpret_cast<int32_t*>(take(size));
  candidates.part_values = take(size);
  candidates.part_weights = take(size);
  candidates.n = 0;
  args.token = sampling::draw(args, row, candidates);
}

}  // namespace PHI_ISA
}  // namespace phi
