// What a linear layer works on. Plain data, the same for every instruction set.

#pragma once

#include <cstdint>

namespace phi {

// Weights and the rows that meet them: int8 and int16, int4 and int8 in groups, int8 and int8 in groups.
enum LinearKind { LINEAR_INT8 = 0, LINEAR_INT4 = 1, LINEAR_INT8_GROUPS = 2 };

struct LinearArgs {
  // quantize.py's packed int8 or int4 weights of ceil(n / 16) panels, and their scales.
  const void* weight;
  const void* scale;
  // Outputs; inputs, padded to whole groups of 32.
  int n, k32;
  // Rounded rows [m, k32]: int16 with a scale each [m]; or int8 in groups of 32, with each group's scale [m, k32 / 32],
  // that scale times the group's sum, and -128 times its sum.
  const void* x;
  const float* x_scale;
  const float* group_sums;
  const int32_t* offsets;
  int m;
  // [m, n], rows ld_y apart; added to if `add`.
  float* y;
  int64_t ld_y;
  bool add;
};

// Rows that are multiplied at once, at most.
constexpr int kMostTileRows = 12;

// Bytes of memory for rows of k32 inputs: of int16, or of int8 with two numbers of four bytes for each group.
static inline int64_t linear_scratch(int k32) { return int64_t{kMostTileRows} * 2 * k32; }

}  // namespace phi
