// Linear layers: packed int8 weights times int16 activations, or int8 or int4 weights times int8 ones in groups, summed
// exactly as integers and then in float32 in one fixed order, so that a row's result depends on nothing but the row.
//
// Owns: the arithmetic (reference.py has it in torch) and the blocking. The packed formats are quantize.py's. Knows
// nothing of threads: it is called for a range of panels (16 outputs each).

#pragma once

#include "linear_args.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

#if defined(PHI_AVX512)
constexpr int kMaxRowsInt8 = 12, kMaxRowsInt8Groups = 12, kMaxRowsInt4 = 6;
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
PHI_INLINE void add_int8(const int8_t* w, const int16_t* x, int64_t ld_x, int k, int end, Sums (&sums)[R]) {
  for (int r = 0; r < R; r++) sums[r] = Sums::zero();
  for (; k < end; k += 4) {
    Pairs first, second;
    __builtin_prefetch(w + 16 * k + kPrefetchNbytes);
    pairs_from_i8(w + 16 * k, first, second);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) add_products(sums[r], first, x + r * ld_x + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) add_products(sums[r], second, x + r * ld_x + k + 2);
  }
}

template <int R>
PHI_INLINE void panel_int8(const int8_t* w, const LinearArgs& a, int first_row, F16 (&f)[R]) {
  const int16_t* x = static_cast<const int16_t*>(a.x) + static_cast<int64_t>(first_row) * a.k32;
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int block = 0; block < a.k32; block += kExactBlock) {
    const int half = block + kInt32Block, end = block + kExactBlock < a.k32 ? block + kExactBlock : a.k32;
    Sums sums[R];
    if (end <= half) {
      add_int8<R>(w, x, a.k32, block, end, sums);
      for (int r = 0; r < R; r++) f[r] = f[r] + to_float(sums[r]);
      continue;
    }
    Sums others[R];
    add_int8<R>(w, x, a.k32, block, half, others);
    add_int8<R>(w, x, a.k32, half, end, sums);
    for (int r = 0; r < R; r++) f[r] = f[r] + to_float(others[r], sums[r]);
  }
}

// The same for rows in groups of 32, each group's sums rounded once.
template <int R>
PHI_INLINE void panel_int8_groups(const int8_t* w, const LinearArgs& a, int first_row, F16 (&f)[R]) {
  const int groups = a.k32 / 32;
  const int8_t* x = static_cast<const int8_t*>(a.x) + static_cast<int64_t>(first_row) * a.k32;
  const float* x_scale = a.x_scale + static_cast<int64_t>(first_row) * groups;
  const int32_t* offsets = a.offsets + static_cast<int64_t>(first_row) * groups;
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int g = 0; g < groups; g++) {
    SignedSums sums[R];
    for (int r = 0; r < R; r++) sums[r] = SignedSums::begin(offsets + static_cast<int64_t>(r) * groups + g);
    for (int k = 32 * g; k < 32 * g + 32; k += 4) {
      __builtin_prefetch(w + 16 * k + kPrefetchNbytes);
      const Fours fours = fours_from_i8(w + 16 * k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], fours, x + static_cast<int64_t>(r) * a.k32 + k);
    }
    for (int r = 0; r < R; r++) {
      f[r] = fma(to_float(sums[r]), F16::set1(x_scale[static_cast<int64_t>(r) * groups + g]), f[r]);
    }
  }
}

template <int R>
PHI_INLINE void panel_int4(const uint8_t* w, const uint16_t* scale, const LinearArgs& a, int first_row, F16 (&f)[R]) {
  const int groups = a.k32 / 32;
  const int8_t* x = static_cast<const int8_t*>(a.x) + static_cast<int64_t>(first_row) * a.k32;
  const float* x_scale = a.x_scale + static_cast<int64_t>(first_row) * groups;
  const float* group_sums = a.group_sums + static_cast<int64_t>(first_row) * groups;
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int g = 0; g < groups; g++) {
    QuadSums sums[R];
    for (int r = 0; r < R; r++) sums[r] = QuadSums::zero();
    for (int k = 32 * g; k < 32 * g + 32; k += 8) {
      Quads first, second;
      __builtin_prefetch(w + 8 * k + kPrefetchNbytes);
      quads_from_i4(w + 8 * k, first, second);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], first, x + static_cast<int64_t>(r) * a.k32 + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) add_products(sums[r], second, x + static_cast<int64_t>(r) * a.k32 + k + 4);
    }
    F16 d = from_f16(scale + 32 * g), m = from_f16(scale + 32 * g + 16);
    for (int r = 0; r < R; r++) {
      f[r] = fma(to_float(sums[r]), d * F16::set1(x_scale[static_cast<int64_t>(r) * groups + g]), f[r]);
      f[r] = fma(m, F16::set1(group_sums[static_cast<int64_t>(r) * groups + g]), f[r]);
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

template <int R>
PHI_INLINE void tile_int8(const LinearArgs& a, int panel, int row) {
  F16 f[R];
  panel_int8<R>(static_cast<const int8_t*>(a.weight) + static_cast<int64_t>(panel) * 16 * a.k32, a, row, f);
  F16 scale = F16::load(static_cast<const float*>(a.scale) + 16 * panel);
  for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r] * scale * F16::set1(a.x_scale[row + r]));
}

template <int R>
PHI_INLINE void tile_int8_groups(const LinearArgs& a, int panel, int row) {
  F16 f[R];
  panel_int8_groups<R>(static_cast<const int8_t*>(a.weight) + static_cast<int64_t>(panel) * 16 * a.k32, a, row, f);
  F16 scale = F16::load(static_cast<const float*>(a.scale) + 16 * panel);
  for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r] * scale);
}

template <int R>
PHI_INLINE void tile_int4(const LinearArgs& a, int panel, int row) {
  F16 f[R];
  panel_int4<R>(static_cast<const uint8_t*>(a.weight) + static_cast<int64_t>(panel) * 8 * a.k32,
                static_cast<const uint16_t*>(a.scale) + static_cast<int64_t>(panel) * a.k32, a, row, f);
  for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r]);
}

// A tile of at most R rows.
template <int R, LinearKind Kind>
inline void tile_of_rows(const LinearArgs& a, int panel, int row, int rows) {
  if constexpr (R > 0) {
    if (rows == R) {
      if constexpr (Kind == LINEAR_INT4) {
        tile_int4<R>(a, panel, row);
      } else if constexpr (Kind == LINEAR_INT8_GROUPS) {
        tile_int8_groups<R>(a, panel, row);
      } else {
        tile_int8<R>(a, panel, row);
      }
    } else {
      tile_of_rows<R - 1, Kind>(a, panel, row, rows);
    }
  }
}

template <int R, LinearKind Kind>
inline void linear(const LinearArgs& a, int first_panel, int last_panel) {
  // A tile of rows stays in the inner cache while it meets all panels of the range, which stay in the outer one. Tiles
  // are about equally large: each of them unpacks the weights again, which a small one hardly makes use of.
  int tiles = (a.m + R - 1) / R;
  for (int tile = 0; tile < tiles; tile++) {
    int row = tile * a.m / tiles, rows = (tile + 1) * a.m / tiles - row;
    for (int panel = first_panel; panel < last_panel; panel++) tile_of_rows<R, Kind>(a, panel, row, rows);
  }
}

inline void linear_int8(const LinearArgs& a, int first_panel, int last_panel) {
  linear<kMaxRowsInt8, LINEAR_INT8>(a, first_panel, last_panel);
}

inline void linear_int8_groups(const LinearArgs& a, int first_panel, int last_panel) {
  linear<kMaxRowsInt8Groups, LINEAR_INT8_GROUPS>(a, first_panel, last_panel);
}

inline void linear_int4(const LinearArgs& a, int first_panel, int last_panel) {
  linear<kMaxRowsInt4, LINEAR_INT4>(a, first_panel, last_panel);
}

}  // namespace PHI_ISA
}  // namespace phi
