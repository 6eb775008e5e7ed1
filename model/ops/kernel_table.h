// Fills the table for the instruction set PHI_ISA. Included by isa_*.cpp only, last.

#pragma once

#include "attention.h"
#include "kernels.h"
#include "linear.h"
#if defined(PHI_AMX)
#include "linear_amx.h"
#endif
#include "rowwise.h"
#include "sample.h"

namespace phi {
namespace PHI_ISA {

#define PHI_STRING_(x) #x
#define PHI_STRING(x) PHI_STRING_(x)

const Kernels& kernels() {
#if defined(PHI_AMX)
  const auto int8 = linear_int8_tiles, int4 = linear_int4_tiles;
#else
  const auto int8 = linear_int8, int4 = linear_int4;
#endif
  static const Kernels table = {
      PHI_STRING(PHI_ISA), {int8, int4, linear_int8_groups}, norm_quantize, silu_mul_quantize, copy_quantize,
      rotate_heads,        widen_row,                        store_kv_row,  attend_item,       attend_merge_item,
      sample_row,
  };
  return table;
}

}  // namespace PHI_ISA
}  // namespace phi
