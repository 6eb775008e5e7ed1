// A block of 32 keys for all kv heads of an item that has only a few rows for each: one sequence that decodes.
//
// Owns: that stored keys and values are read in the order of memory, whatever the order of heads. Reading is most of
// the work here: head by head, in pieces of two lines that lie a row apart, a core read 9 GB/s of what it reads at 25
// in order. Included by attention.h only.

#pragma once

#include "attention_narrow.h"
#include "attention_scratch.h"
#include "attention_tile.h"

#if defined(PHI_AVX2) || defined(PHI_AVX512)

namespace phi {
namespace PHI_ISA {

// Block `block_index` of `it`. `after`: whose first block (its own: the next one) is asked for meanwhile, or null.
// head_dim is a multiple of 16.
template <int Kind>
inline void attend_few(const AttendArgs& a, const AttendItem& it, int group, int block_index, const AttendArgs* after,
                       const Scratch& s) {
  const int dim = a.head_dim, num_rows = (it.last_query - it.first_query) * group;
  const int head_nbytes = stored_nbytes(Kind, dim), head_floats = kKeyBlock * (Kind == KV_BF16 ? 2 : 1) * dim / 4;

  const int position = a.start + it.first_query, first_position = block_index * kKeyBlock;
  const SeenBlock seen = seen_block(a, it, group, block_index);

  LinesAhead ahead = {};
  if (after != nullptr) {
    const int next = after == &a ? block_index + 1 : first_key(*after, after->start) / kKeyBlock;
    const int64_t at = next * int64_t{kKeyBlock} * a.row_nbytes + it.first_head * head_nbytes;
    ahead = {after->keys + at, after->values + at, a.row_nbytes, (it.last_head - it.first_head) * head_nbytes, 0};
  }
  const int most_heads = slice_heads(Kind, dim);
  for (int head = it.first_head; head < it.last_head; head += most_heads) {
    const int heads = it.last_head - head < most_heads ? it.last_head - head : most_heads;
    const int64_t at = first_position * a.row_nbytes + head * head_nbytes;
    turn_heads<Kind>({a.keys + at, nullptr, a.row_nbytes, seen.first, seen.last, dim}, heads, s.keys, s.scales);
    for (int h = 0; h < heads; h++) {
      const int base = (head + h - it.first_head) * num_rows;
      const TileRows rows = {s.queries + base * dim, s.acc + base * dim, s.sums + base * 16, s.most + base, s.weights};
      const StoredBlock values = {a.values + at + h * head_nbytes, nullptr, a.row_nbytes, seen.first, seen.last, dim};
      const NarrowBlock<Kind> block = {s.keys + h * head_floats, s.scales + h * kKeyBlock, values, ahead};
      int row = seen.first_row;
      attend_rows<4>(a, rows, group, position, block_index, block, row, seen.last_row);
      attend_rows<3>(a, rows, group, position, block_index, block, row, seen.last_row);
      attend_rows<2>(a, rows, group, position, block_index, block, row, seen.last_row);
      attend_rows<1>(a, rows, group, position, block_index, block, row, seen.last_row);
    }
  }
}

}  // namespace PHI_ISA
}  // namespace phi

#endif
