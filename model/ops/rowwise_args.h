// Where a rounded row goes. Plain data, the same for every instruction set.

#pragma once

#include <cstdint>

namespace phi {

// int16 [k32] (amx: as linear_amx.h's planes) and one scale; or, where `group_sums` is not null, int8 [k32] and for
// each group of 32 a scale, the scale times the group's sum, and -128 times its sum.
struct QuantizedRow {
  void* x;
  float* scale;
  float* group_sums;
  int32_t* offsets;
};

}  // namespace phi
