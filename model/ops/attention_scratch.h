// The memory that an item of attention works in.
//
// Owns: its parts, within what attend_scratch() says. Included by attention_*.h only.

#pragma once

#include <cstdint>

#include "attention_args.h"

namespace phi {
namespace PHI_ISA {

// An item's memory, within a thread's scratch.
struct Scratch {
  float* keys;     // [dim][32], or a slice's, turned
  float* values;   // [32][dim]
  float* weights;  // [kTileRows][32]
  float* scales;   // [heads of a slice][32]
  float* sums;     // [rows][16], this and the following as in TileRows
  float* queries;  // [rows][dim]
  float* acc;      // [rows][dim]
  float* most;     // [rows]
  float* narrow;   // the queries in bfloat16, if they are multiplied by tiles
  // The same of all super blocks before.
  float* total;      // [rows][dim]
  float* total_most;  // [rows]
  float* total_sum;   // [rows]
};

inline Scratch scratch_parts(float* memory, int rows, int dim) {
  Scratch s;
  s.keys = memory + (-(reinterpret_cast<uintptr_t>(memory) / sizeof(float)) & 15);
  s.values = s.keys + scratch_keys(dim);
  s.weights = s.values + kKeyBlock * dim;
  s.scales = s.weights + kTileRows * kKeyBlock;
  s.sums = s.scales + scratch_scales();
  rows += kSpareRows;
  s.queries = s.sums + rows * 16;
  s.acc = s.queries + rows * dim;
  s.total = s.acc + rows * dim;
  s.most = s.total + rows * dim;
  s.total_most = s.most + rows;
  s.total_sum = s.total_most + rows;
  s.narrow = s.total_sum + rows;
  return s;
}

}  // namespace PHI_ISA
}  // namespace phi
