// Some rows (query x head) against one block of 32 keys and values: scores, weights, weighted values.
//
// Owns: what is done with a block's scores, and what is rounded to bfloat16 for AMX's sake: queries, and weights before
// they meet values. Knows nothing of items and super blocks, and of where a block is read from. Included by attention_*.h
// only.

#pragma once

#include "attention_sums.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// The rows' memory: row r's part of a [rows][x] array is at + r * x.
struct TileRows {
  const float* queries;  // [rows][dim], times scale and log2 e, rounded to bfloat16
  float* acc;            // [rows][dim]: weighted values of the super block so far
  float* sums;           // [rows][16]: its weights, summed by their keys' position modulo 16
  float* most;           // [rows]: its greatest score
  float* weights;        // [tile's rows][32]: workspace
};

// A block that was widened: keys [dim][32], values [32][dim].
struct WideBlock {
  const float* keys;
  const float* values;
  int head_dim;

  PHI_INLINE int dim() const { return padded_dim(head_dim); }

  // to[r][..] = q k for R rows of queries [R][dim] and the block's 32 keys; the second argument has room for them.
  template <int R>
  PHI_INLINE void scores(const float* queries, float*, F16 (&to)[R][2]) const {
    constexpr int kPieces = tile_pieces<R>() < 2 ? 1 : 2;
    for (int c = 0; c < 2; c += kPieces) {
      F16 sums[R][kPieces];
      for (int r = 0; r < R; r++) {
        for (int i = 0; i < kPieces; i++) sums[r][i] = F16::zero();
      }
      for (int d = 0; d < head_dim; d += kChainedDims) {
        const int last = d + kChainedDims < head_dim ? d + kChainedDims : head_dim;
        F16 even[R][kPieces], odd[R][kPieces];
        for (int r = 0; r < R; r++) {
          for (int i = 0; i < kPieces; i++) even[r][i] = odd[r][i] = F16::zero();
        }
        const FloatRows numbers = {keys + 16 * c, kKeyBlock};
        add_outer<R, kPieces>(even, queries, dim(), numbers, d, last);
        add_outer<R, kPieces>(odd, queries, dim(), numbers, d + 1, last);
        add_chains<R, kPieces>(even, odd, sums);
      }
      for (int r = 0; r < R; r++) {
        for (int i = 0; i < kPieces; i++) to[r][c + i] = sums[r][i];
      }
    }
  }

  // As add_values, for all dimensions.
  template <int R>
  PHI_INLINE void weigh(const Visible<R>& v, const float* weights, const float* factor, float* acc) const {
    constexpr int kPieces = tile_pieces<R>();
    int d = 0;
    for (; d + 16 * kPieces <= dim(); d += 16 * kPieces) {
      add_values<R, kPieces>(v, weights, factor, FloatRows{values + d, dim()}, dim(), acc + d);
    }
    for (; kPieces > 1 && d < dim(); d += 16) {
      add_values<R, 1>(v, weights, factor, FloatRows{values + d, dim()}, dim(), acc + d);
    }
  }
};

// One block, for R rows.
template <int R, class Block>
inline __attribute__((noinline)) void attend_tile(const Visible<R>& v, const TileRows& rows, int row,
                                                  const Block& block) {
  const int dim = block.dim();
  F16 scores[R][2];
  block.template scores<R>(rows.queries + row * dim, rows.weights, scores);
  if (!v.whole) {
    for (int r = 0; r < R; r++) {
      float* all = rows.weights + r * kKeyBlock;
      scores[r][0].store(all);
      scores[r][1].store(all + 16);
      for (int j = 0; j < v.first[r]; j++) all[j] = -INFINITY;
      for (int j = v.last[r]; j < kKeyBlock; j++) all[j] = -INFINITY;
      scores[r][0] = F16::load(all);
      scores[r][1] = F16::load(all + 16);
    }
  }
  float factor[16] = {};
  for (int r = 0; r < R; r++) {
    const float before = rows.most[row + r], here = reduce_max(max(scores[r][0], scores[r][1]));
    const float most = here > before ? here : before;
    rows.most[row + r] = most;
    factor[r] = before - most;
    scores[r][0] = scores[r][0] - F16::set1(most);
    scores[r][1] = scores[r][1] - F16::set1(most);
  }
  exp2(F16::load(factor)).store(factor);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    scores[r][0] = exp2(scores[r][0]);
    scores[r][1] = exp2(scores[r][1]);
  }
  for (int r = 0; r < R; r++) {
    as_bf16(scores[r][0]).store(rows.weights + r * kKeyBlock);
    as_bf16(scores[r][1]).store(rows.weights + r * kKeyBlock + 16);
    float* sums = rows.sums + 16 * (row + r);
    fma(F16::load(sums), F16::set1(factor[r]), scores[r][0] + scores[r][1]).store(sums);
  }
  block.template weigh<R>(v, rows.weights, factor, rows.acc + row * dim);
}

// Rows from `row` on, R at a time while so many are left before `end`.
template <int R, class Block>
PHI_INLINE void attend_rows(const AttendArgs& a, const TileRows& rows, int group, int position, int block_index,
                            const Block& block, int& row, int end) {
  for (; row + R <= end; row += R) {
    attend_tile<R>(visible_keys<R>(a, group, position, row, block_index), rows, row, block);
  }
}

}  // namespace PHI_ISA
}  // namespace phi
