// Where a rounded row goes. Plain data, the same for every instruction set.

#pragma once

#include <cstdint>

namespace phi {

// For int8 weights: int16 [k32] (amx: as linear_amx.h's planes) and one scale. For int4 weights, where `group_sums` is not null: int8 [k32], a scale for
// each group of 32, and the scale times the group's sum.
struct QuantizedRow {
  void* x;
  float* scale;
  float* group_sums;
};

}  // namespace phi
