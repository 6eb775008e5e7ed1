// What a linear layer works on. Plain data, the same for every instruction set.

#pragma once

#include <cstdint>

namespace phi {

struct LinearArgs {
  // quantize.py's packed int8 or int4 weights of ceil(n / 16) panels, and their scales.
  const void* weight;
  const void* scale;
  // Outputs; inputs, padded to whole groups of 32.
  int n, k32;
  // Rounded rows [m, k32]: int16 with a scale each [m]; for int4 weights int8 with a scale for each group of 32
  // [m, k32 / 32], and that scale times the group's sum.
  const void* x;
  const float* x_scale;
  const float* group_sums;
  int m;
  // [m, n], rows ld_y apart; added to if `add`.
  float* y;
  int64_t ld_y;
  bool add;
};

}  // namespace phi
