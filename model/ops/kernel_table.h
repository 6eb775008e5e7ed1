// Fills the table for the instruction set PHI_ISA. Included by isa_*.cpp only, last.

#pragma once

#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "rowwise.h"
#include "sample.h"

namespace phi {
namespace PHI_ISA {

#define PHI_STRING_(x) #x
#define PHI_STRING(x) PHI_STRING_(x)

const Kernels& kernels() {
  static const Kernels table = {
      PHI_STRING(PHI_ISA), linear_int8,   linear_int4, norm_quantize, silu_mul_quantize, copy_quantize,
      rotate_heads,        widen_row,     store_kv_row, attend_item,  attend_merge_item, sample_row,
  };
  return table;
}

}  // namespace PHI_ISA
}  // namespace phi
