// What a draw needs and brings. Plain data, the same for every instruction set; sampler.py's ROW is its layout.

#pragma once

#include <cstdint>

namespace phi {

enum SampleStatus : int32_t {
  kSampled = 0,
  // A logit is NaN.
  kSampleNan = 1,
  // A logit is +infinity (and none is NaN).
  kSampleInfinite = 2,
  // Every logit is -infinity.
  kSampleMasked = 3,
};

struct SampleArgs {
  // [vocab], only read.
  const float* logits;
  // The random number is a function of these two: sampler.py's `uniform`.
  uint64_t seed;
  uint64_t position;
  // 1 or more: off.
  double top_p;
  // 0: greedy, and nothing else but the logits is read. Otherwise 1e-5 to 1e30.
  float temperature;
  // 0: off.
  float min_p;
  // 0, or vocab and more: off.
  int32_t top_k;
  int32_t vocab;
  // Set by the draw: the token, -1 if there is none, and why (SampleStatus).
  int32_t token;
  int32_t status;
};

// Elements in a block of the running sum.
constexpr int kSampleBlock = 256;
// Room that a vector may write beyond the end of an array.
constexpr int kSampleSlack = 16;

// How many floats (aligned for double) sample_row needs as scratch for rows of up to `vocab`.
static inline int64_t sample_scratch_floats(int32_t vocab) {
  int64_t blocks = (static_cast<int64_t>(vocab) + kSampleBlock - 1) / kSampleBlock;
  // Sums (double), the largest of each block, the largest of each lane; then five arrays of candidates.
  int64_t size = blocks * (2 + 1 + 16) + 16 + 5 * (static_cast<int64_t>(vocab) + kSampleSlack);
  // Whole cache lines, so that scratches may follow each other.
  return (size + 15) / 16 * 16;
}

}  // namespace phi
