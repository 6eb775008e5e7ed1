// Attention over stored keys and values: softmax(q k) v for chunks of any size.
//
// Owns: the order in which blocks of keys are visited, and how super blocks' results are merged. A query's result has
// the same bits whatever else is computed with it: blocks of 32 keys begin at position 0, super blocks of 512 keys are
// summed apart and then merged in ascending order. Knows nothing of rope, of sessions, or of threads: a caller runs the
// items of attention_args.h in any order. Included by isa_*.cpp only, after simd_headers.h.

#pragma once

#include "attention_args.h"
#include "attention_few.h"
#include "attention_kv.h"
#include "attention_scratch.h"
#include "attention_tile.h"
#if defined(PHI_AMX)
#include "attention_amx.h"
#endif
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// While it lives, this thread takes numbers too small for float32's full precision for zeros, as AMX's tiles do.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

inline void load_queries(const AttendArgs& a, const AttendItem& it, int group, float* to) {
  const int dim = padded_dim(a.head_dim);
  const F16 factor = F16::set1(static_cast<float>(static_cast<double>(a.scale) * 1.4426950408889634));
  for (int kv_head = it.first_head; kv_head < it.last_head; kv_head++) {
    for (int query = it.first_query; query < it.last_query; query++) {
      for (int g = 0; g < group; g++, to += dim) {
        const float* from = a.qkv + query * a.ld_qkv + (kv_head * group + g) * a.head_dim;
        int d = 0;
        for (; d + 16 <= a.head_dim; d += 16) as_bf16(F16::load(from + d) * factor).store(to + d);
        if (d < a.head_dim) as_bf16(load_first(from + d, a.head_dim - d) * factor).store(to + d);
      }
    }
  }
}

#if defined(PHI_AMX)
// Whether an item's rows meet keys and values in tiles.
PHI_INLINE bool use_tiles(const AttendArgs& a, int num_rows) {
  return a.kv_kind == KV_BF16 && a.head_dim % 32 == 0 && num_rows > kFewRows;
}

// The queries, which are bfloat16 already, as such; zeros behind them.
inline void narrow_queries(const float* queries, int num_rows, int dim, uint16_t* to) {
  for (int i = 0; i < num_rows * dim; i += 16) to_bf16(F16::load(queries + i), to + i);
  memset(to + num_rows * dim, 0, sizeof(uint16_t) * kMatrixRows * dim);
}
#endif

// What an item does at once: one block of keys for one kv head, and which comes after it.
struct BlockStep {
  int kv_head, block;
  int next_head, next_block;
};

template <int Kind>
inline void attend_block(const AttendArgs& a, const AttendItem& it, int group, const BlockStep& step,
                         const Scratch& s) {
  const int dim = padded_dim(a.head_dim), num_rows = (it.last_query - it.first_query) * group;
  const int base = (step.kv_head - it.first_head) * num_rows;
  const TileRows rows = {s.queries + base * dim, s.acc + base * dim, s.sums + base * 16, s.most + base, s.weights};

  const int position = a.start + it.first_query, first_position = step.block * kKeyBlock;
  const SeenBlock seen = seen_block(a, it, group, step.block);
  const int head_nbytes = stored_nbytes(Kind, a.head_dim);
  const int64_t at = first_position * a.row_nbytes + step.kv_head * head_nbytes;
  const int64_t next = step.next_block * kKeyBlock * a.row_nbytes + step.next_head * head_nbytes;
  const StoredBlock keys = {a.keys + at, a.keys + next, a.row_nbytes, seen.first, seen.last, a.head_dim};
  const StoredBlock values = {a.values + at, a.values + next, a.row_nbytes, seen.first, seen.last, a.head_dim};

  int row = seen.first_row;
  const int end = seen.last_row;
#if defined(PHI_AMX)
  if (use_tiles(a, num_rows)) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(s.values);
    if (pair_values(values, pairs)) {
      turn_keys<Kind, false>(keys, s.keys, s.scales);
      const MatrixRows matrix = {reinterpret_cast<uint16_t*>(s.narrow), reinterpret_cast<uint32_t*>(s.keys), pairs};
      for (; row < end; row += kMatrixRows) attend_matrix(a, group, position, step.block, dim, rows, matrix, row);
      return;
    }
  }
#endif
  turn_keys<Kind, true>(keys, s.keys, s.scales);
  widen_values<Kind>(values, s.values);
  const WideBlock block = {s.keys, s.values, a.head_dim};
  attend_rows<kTileRows>(a, rows, group, position, step.block, block, row, end);
  attend_rows<4>(a, rows, group, position, step.block, block, row, end);
  attend_rows<2>(a, rows, group, position, step.block, block, row, end);
  attend_rows<1>(a, rows, group, position, step.block, block, row, end);
}

// Adds a super block's result (`most`, `sum`, `acc` [dim]) to that of all before it.
PHI_INLINE void merge(const float* acc, float most, float sum, int dim, float* total, float* total_most,
                      float* total_sum) {
  const float greatest = most > *total_most ? most : *total_most;
  const F16 old_factor = exp2(F16::set1(*total_most - greatest)), factor = exp2(F16::set1(most - greatest));
  for (int d = 0; d < dim; d += 16) {
    fma(F16::load(acc + d), factor, F16::load(total + d) * old_factor).store(total + d);
  }
  float factors[2][16];
  old_factor.store(factors[0]);
  factor.store(factors[1]);
  *total_sum = *total_sum * factors[0][0] + sum * factors[1][0];
  *total_most = greatest;
}

PHI_INLINE void write_output(const AttendArgs& a, const float* total, float sum, int query, int head) {
  float* out = a.out + query * a.ld_out + head * a.head_dim;
  const F16 factor = F16::set1(1.0f / sum);
  for (int d = 0; d < a.head_dim; d += 16) {
    const F16 x = F16::load(total + d) * factor;
    const F16 y = a.kv_kind == KV_BF16 ? in_order<KV_BF16>(x) : in_order<KV_INT8>(x);
    if (d + 16 <= a.head_dim) {
      y.store(out + d);
    } else {
      store_first(y, out + d, a.head_dim - d);
    }
  }
}

// A super block's result for one query and head in `partials`: dim numbers, the greatest score, the sum.
PHI_INLINE float* partial_of(const AttendArgs& a, int super, int query, int head) {
  return a.partials + ((int64_t{super} * a.n + query) * a.num_heads + head) * (padded_dim(a.head_dim) + 2);
}

// After a super block: merges its result for each row that saw some of it, or stores it to be merged later.
inline void end_super(const AttendArgs& a, const AttendPlan& plan, const AttendItem& it, int super, const Scratch& s) {
  const int dim = padded_dim(a.head_dim);
  int row = 0;
  for (int kv_head = it.first_head; kv_head < it.last_head; kv_head++) {
    for (int query = it.first_query; query < it.last_query; query++) {
      const int t = a.start + query, first = first_key(a, t) / kSuperBlock, last = t / kSuperBlock;
      for (int g = 0; g < plan.group; g++, row++) {
        if (super < first || super > last) continue;
        const int head = kv_head * plan.group + g;
        const float* acc = s.acc + row * dim;
        float* total = s.total + row * dim;
        const float most = s.most[row], sum = reduce_add(F16::load(s.sums + 16 * row));
        if (plan.split) {
          float* partial = partial_of(a, super - plan.first_super, query, head);
          memcpy(partial, acc, sizeof(float) * dim);
          partial[dim] = most;
          partial[dim + 1] = sum;
        } else if (first == last) {
          write_output(a, acc, sum, query, head);
        } else if (super == first) {
          memcpy(total, acc, sizeof(float) * dim);
          s.total_most[row] = most;
          s.total_sum[row] = sum;
        } else {
          merge(acc, most, sum, dim, total, s.total_most + row, s.total_sum + row);
          if (super == last) write_output(a, total, s.total_sum[row], query, head);
        }
      }
    }
  }
}

// Item `item` of attend_num_items(); `scratch` has attend_scratch() floats.
inline void attend_item(const AttendArgs& a, int num_threads, int item, float* scratch) {
  const FlushDenormals flush;
  const AttendPlan plan = attend_plan(a, num_threads);
  const AttendItem it = attend_item_at(a, plan, item);
  const int rows = (it.last_query - it.first_query) * (it.last_head - it.first_head) * plan.group;
  const int dim = padded_dim(a.head_dim);
  const Scratch s = scratch_parts(scratch, rows, dim);
  load_queries(a, it, plan.group, s.queries);
#if defined(PHI_AMX)
  // Where there are tiles, an item has one kv head.
  const bool tiles = use_tiles(a, (it.last_query - it.first_query) * plan.group);
  if (tiles) {
    narrow_queries(s.queries, rows, dim, reinterpret_cast<uint16_t*>(s.narrow));
    load_matrix_shapes();
  }
#endif
#if defined(PHI_AVX2) || defined(PHI_AVX512)
  const bool few = (it.last_query - it.first_query) * plan.group <= kNarrowRows && a.head_dim % 16 == 0;
#endif
  const int first_block = first_key(a, a.start + it.first_query) / kKeyBlock;
  const int last_block = ceil_div(a.start + it.last_query, kKeyBlock);
  for (int super = it.first_super; super < it.last_super; super++) {
    int block = super * (kSuperBlock / kKeyBlock), end = block + kSuperBlock / kKeyBlock;
    if (block < first_block) block = first_block;
    if (end > last_block) end = last_block;
    if (block >= end) continue;
    memset(s.acc, 0, sizeof(float) * rows * dim);
    memset(s.sums, 0, sizeof(float) * rows * 16);
    for (int r = 0; r < rows; r++) s.most[r] = -INFINITY;
    for (; block < end; block++) {
#if defined(PHI_AVX2) || defined(PHI_AVX512)
      if (few) {
        const AttendArgs* after = block + 1 < last_block ? &a : a.next;
        if (a.kv_kind == KV_BF16) {
          attend_few<KV_BF16>(a, it, plan.group, block, after, s);
        } else {
          attend_few<KV_INT8>(a, it, plan.group, block, after, s);
        }
        continue;
      }
#endif
      for (int kv_head = it.first_head; kv_head < it.last_head; kv_head++) {
        const bool more = kv_head + 1 < it.last_head;
        const BlockStep step = {kv_head, block, more ? kv_head + 1 : it.first_head, more ? block : block + 1};
        if (a.kv_kind == KV_BF16) {
          attend_block<KV_BF16>(a, it, plan.group, step, s);
        } else {
          attend_block<KV_INT8>(a, it, plan.group, step, s);
        }
      }
    }
    end_super(a, plan, it, super, s);
  }
#if defined(PHI_AMX)
  if (tiles) PHI_TILES_RELEASE();
#endif
}

// Item `item` of attend_num_merges(): one query's heads.
inline void attend_merge_item(const AttendArgs& a, int num_threads, int item) {
  const FlushDenormals flush;
  const AttendPlan plan = attend_plan(a, num_threads);
  const int query = item, dim = padded_dim(a.head_dim);
  const int t = a.start + query, first = first_key(a, t) / kSuperBlock, last = t / kSuperBlock;
  for (int head = 0; head < a.num_heads; head++) {
    // The first result is where the others are added.
    float* total = partial_of(a, first - plan.first_super, query, head);
    for (int super = first + 1; super <= last; super++) {
      const float* partial = partial_of(a, super - plan.first_super, query, head);
      merge(partial, partial[dim], partial[dim + 1], dim, total, total + dim, total + dim + 1);
    }
    write_output(a, total, total[dim + 1], query, head);
  }
}

}  // namespace PHI_ISA
}  // namespace phi
