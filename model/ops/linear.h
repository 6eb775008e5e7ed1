// Linear layers: packed int8 weights times int16 activations, or int8 or int4 weights times int8 ones in groups, summed
// exactly as integers and then in float32 in one fixed order, so that a row's result depends on nothing but the row.
//
// Owns: the arithmetic (reference.py has it in torch) and the blocking. The packed formats are quantize.py's. Knows
// nothing of threads: it is called for a range of panels (16 outputs each), with linear_scratch() bytes of memory.

#pragma once

#include "linear_args.h"
#include "linear_rows.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

#if defined(PHI_AVX512)
constexpr int kMaxRowsInt8 = 12, kMaxRowsInt8Groups = 12, kMaxRowsInt4 = 8;
#else
constexpr int kMaxRowsInt8 = 6, kMaxRowsInt8Groups = 4, kMaxRowsInt4 = 4;
#endif

// Inputs whose products are summed exactly and then rounded once; int32 holds half as many: 127 * 32639 * 512 < 2^31.
constexpr int kExactBlock = 1024, kInt32Block = kExactBlock / 2;

// So far ahead weights are asked for. By itself the CPU fetches them too late where eight rows and more share them: this
// brings 12 to 20 %, 1 and 4 KiB less.
constexpr int kPrefetchNbytes = 2048;

// Adds the products of inputs [k, end).
template <int R>
PHI_INLINE void add_int8(const int8_t* w, const RowTile<R>& rows, int k, int end, Sums (&sums)[R]) {
  for (int r = 0; r < R; r++) sums[r] = Sums::zero();
  for (; k < end; k += 4) {
    Pairs first, second;
    __builtin_prefetch(w + 16 * k + kPrefetchNbytes);
    pairs_from_i8(w + 16 * k, first, second);
    const int16_t* x = reinterpret_cast<const int16_t*>(rows.x) + R * k;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) add_products(sums[r], first, x + 2 * r);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) add_products(sums[r], second, x + 2 * R + 2 * r);
  }
}

template <int R>
PHI_INLINE void panel_int8(const int8_t* w, int k32, const RowTile<R>& rows, F16 (&f)[R]) {
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int block = 0; block < k32; block += kExactBlock) {
    const int half = block + kInt32Block, end = block + kExactBlock < k32 ? block + kExactBlock : k32;
    Sums sums[R];
    if (end <= half) {
      add_int8<R>(w, rows, block, end, sums);
      for (int r = 0; r < R; r++) f[r] = f[r] + to_float(sums[r]);
      continue;
    }
    Sums others[R];
    add_int8<R>(w, rows, block, half, others);
    add_int8<R>(w, rows, half, end, sums);
    for (int r = 0; r < R; r++) f[r] = f[r] + to_float(others[r], sums[r]);
  }
}

// The same for rows in groups of 32, each group's sums rounded once.
template <int R>
PHI_INLINE void panel_int8_groups(const int8_t* w, int k32, const RowTile<R>& rows, F16 (&f)[R]) {
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int g = 0; g < k32 / 32; g++, w += 16 * 32) {
    const int8_t* x = rows.x + static_cast<int64_t>(R) * 32 * g;
    SignedSums sums[R];
    for (int r = 0; r < R; r++) sums[r] = SignedSums::begin(rows.offsets + R * g + r);
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += 4) {
      __builtin_prefetch(w + 16 * k + kPrefetchNbytes);
      const Fours fours = fours_from_i8(w + 16 * k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], fours, x + R * k + 4 * r);
    }
    for (int r = 0; r < R; r++) f[r] = fma(to_float(sums[r]), F16::set1(rows.scale[R * g + r]), f[r]);
  }
}

template <int R>
PHI_INLINE void panel_int4(const uint8_t* w, const uint16_t* scale, int k32, const RowTile<R>& rows, F16 (&f)[R]) {
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int g = 0; g < k32 / 32; g++, w += 8 * 32) {
    const int8_t* x = rows.x + static_cast<int64_t>(R) * 32 * g;
    QuadSums sums[R];
    for (int r = 0; r < R; r++) sums[r] = QuadSums::zero();
#pragma GCC unroll 4
    for (int k = 0; k < 32; k += 8) {
      Quads first, second;
      __builtin_prefetch(w + 8 * k + kPrefetchNbytes);
      quads_from_i4(w + 8 * k, first, second);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], first, x + R * k + 4 * r);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], second, x + R * k + 4 * R + 4 * r);
    }
    F16 d = from_f16(scale + 32 * g), m = from_f16(scale + 32 * g + 16);
    for (int r = 0; r < R; r++) {
      f[r] = fma(to_float(sums[r]), d * F16::set1(rows.scale[R * g + r]), f[r]);
      f[r] = fma(m, F16::set1(rows.group_sums[R * g + r]), f[r]);
    }
  }
}

// f into (or added to) the outputs of one panel.
PHI_INLINE void write_panel(const LinearArgs& a, int panel, int row, F16 f) {
  float* y = a.y + static_cast<int64_t>(row) * a.ld_y + 16 * panel;
  int n = a.n - 16 * panel;
  if (n >= 16) {
    if (a.add) f = F16::load(y) + f;
    f.store(y);
  } else {
    if (a.add) f = load_first(y, n) + f;
    store_first(f, y, n);
  }
}

template <int R, LinearKind Kind>
PHI_INLINE void panel(const LinearArgs& a, int panel, int row, const RowTile<R>& rows) {
  F16 f[R];
  constexpr int kInputNbytes = Kind == LINEAR_INT4 ? 8 : 16;
  const int8_t* w = static_cast<const int8_t*>(a.weight) + static_cast<int64_t>(panel) * kInputNbytes * a.k32;
  if constexpr (Kind == LINEAR_INT4) {
    const uint16_t* scale = static_cast<const uint16_t*>(a.scale) + static_cast<int64_t>(panel) * a.k32;
    panel_int4<R>(reinterpret_cast<const uint8_t*>(w), scale, a.k32, rows, f);
    for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r]);
    return;
  }
  const F16 scale = F16::load(static_cast<const float*>(a.scale) + 16 * panel);
  if constexpr (Kind == LINEAR_INT8_GROUPS) {
    panel_int8_groups<R>(w, a.k32, rows, f);
    for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r] * scale);
  } else {
    panel_int8<R>(w, a.k32, rows, f);
    for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r] * scale * F16::set1(a.x_scale[row + r]));
  }
}

// A tile of at most R rows against a range of panels.
template <int R, LinearKind Kind>
inline void tile_of_rows(const LinearArgs& a, int row, int rows, int first_panel, int last_panel, void* memory) {
  if constexpr (R > 0) {
    if (rows != R) return tile_of_rows<R - 1, Kind>(a, row, rows, first_panel, last_panel, memory);
    const RowTile<R> tile = side_by_side<R, Kind>(a, row, memory);
    for (int p = first_panel; p < last_panel; p++) panel<R, Kind>(a, p, row, tile);
  }
}

template <int R, LinearKind Kind>
inline void linear(const LinearArgs& a, int first_panel, int last_panel, void* memory) {
  static_assert(R <= kMostTileRows, "linear_scratch() has room for fewer");
  // A tile of rows stays in the inner cache while it meets all panels of the range, which stay in the outer one. Tiles
  // are about equally large: each of them unpacks the weights again, which a small one hardly makes use of.
  int tiles = (a.m + R - 1) / R;
  for (int tile = 0; tile < tiles; tile++) {
    int row = tile * a.m / tiles, rows = (tile + 1) * a.m / tiles - row;
    tile_of_rows<R, Kind>(a, row, rows, first_panel, last_panel, memory);
  }
}

inline void linear_int8(const LinearArgs& a, int first_panel, int last_panel, void* memory) {
  linear<kMaxRowsInt8, LINEAR_INT8>(a, first_panel, last_panel, memory);
}

inline void linear_int8_groups(const LinearArgs& a, int first_panel, int last_panel, void* memory) {
  linear<kMaxRowsInt8Groups, LINEAR_INT8_GROUPS>(a, first_panel, last_panel, memory);
}

inline void linear_int4(const LinearArgs& a, int first_panel, int last_panel, void* memory) {
  linear<kMaxRowsInt4, LINEAR_INT4>(a, first_panel, last_panel, memory);
}

}  // namespace PHI_ISA
}  // namespace phi
