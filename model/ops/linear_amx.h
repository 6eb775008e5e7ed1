// Linear layers by AMX's products of tiles. Bit for bit what linear.h computes: integers are summed exactly in any order,
// and the float32 operations behind them are the same in the same order.
//
// Owns: the blocking, and int16 rows as two planes of bytes: x = 256 * high + low, first all of a row's `high`, then
// all of its `low`, both int8, each in the weights' order. Knows nothing of threads. Included by isa_amx.cpp only.

#pragma once

#include "amx.h"
#include "linear.h"

namespace phi {
namespace PHI_ISA {

// Rows and inputs of a tile of activations, outputs of one of weights; weights are asked for two tiles ahead.
constexpr int kTile = 16, kTileBytes = 64, kAheadNbytes = 2 * kTile * kTileBytes;
// Groups of int4 weights that are unpacked at once, and whose sums are taken out of the tiles at once.
constexpr int kUnpackedGroups = 32, kGroupTiles = 4;
// From so many rows on, tiles of int4 weights are quicker than vectors.
constexpr int kLeastRowsInt4 = 6;

// Rows of half a tile's width, with zeros behind.
PHI_INLINE void widen_half(const uint8_t* from, int64_t stride, int rows, uint8_t* to) {
  for (int r = 0; r < rows; r++) {
    _mm512_store_si512(to + kTileBytes * r,
                       _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * stride))));
  }
}

// A block's exact sums, rounded once: 256 * high + low, each of which float32 holds: 128 * 127 * kExactBlock < 2^24.
PHI_INLINE F16 sums_to_float(const int32_t* high, const int32_t* low) {
  const __m512 h = _mm512_cvtepi32_ps(_mm512_load_si512(high)), l = _mm512_cvtepi32_ps(_mm512_load_si512(low));
  return {_mm512_fmadd_ps(h, _mm512_set1_ps(256.0f), l)};
}

// Up to 16 rows' sums with a panel.
struct PanelSums {
  alignas(64) int32_t high[kTile * kTile];
  alignas(64) int32_t low[kTile * kTile];
  alignas(64) float before[kTile * kTile];  // all blocks before the last, if there are any
};

template <bool Before>
PHI_INLINE F16 sum_of(const PanelSums& s, int row) {
  const F16 f = sums_to_float(s.high + kTile * row, s.low + kTile * row);
  return Before ? F16::load(s.before + kTile * row) + f : f;
}

template <bool Before>
PHI_INLINE void write_sums(const LinearArgs& a, const PanelSums& s, int panel, int row, int rows) {
  const F16 scale = F16::load(static_cast<const float*>(a.scale) + kTile * panel);
  const float* x_scale = a.x_scale + row;
  for (int r = 0; r < rows; r++) {
    write_panel(a, panel, row + r, sum_of<Before>(s, r) * scale * F16::set1(x_scale[r]));
  }
}

PHI_INLINE void fetch_tile(const int8_t* w) {
  for (int i = 0; i < kTile; i++) __builtin_prefetch(w + kTileBytes * i);
}

// `rows` rows (at most 16) against Panels (1 or 2) panels of int8 weights. Fetch: the weights come from afar, and are
// asked for early. Tiles 0 to 3: sums; 4, 5: activations; 6, 7: weights.
template <int Panels, bool Fetch>
inline void tiles_int8(const LinearArgs& a, int panel, int row, int rows) {
  PanelSums sums[Panels];
  alignas(64) uint8_t tail[4][kTile * kTileBytes];
  const uint8_t* high = static_cast<const uint8_t*>(a.x) + int64_t{2} * row * a.k32;
  const uint8_t* low = high + a.k32;
  const int64_t stride = int64_t{2} * a.k32;
  const int8_t* w0 = static_cast<const int8_t*>(a.weight) + int64_t{panel} * kTile * a.k32;
  const int8_t* w1 = w0 + (Panels - 1) * kTile * a.k32;
  for (int block = 0; block < a.k32; block += kExactBlock) {
    const int end = block + kExactBlock < a.k32 ? block + kExactBlock : a.k32;
    PHI_TILE_ZERO(0);
    PHI_TILE_ZERO(1);
    if (Panels == 2) {
      PHI_TILE_ZERO(2);
      PHI_TILE_ZERO(3);
    }
    int k = block;
    for (; k + kTileBytes <= end; k += kTileBytes) {
      if (Fetch) fetch_tile(w0 + kTile * k + kAheadNbytes);
      if (Fetch && Panels == 2) fetch_tile(w1 + kTile * k + kAheadNbytes);
      PHI_TILE_LOAD(6, w0 + kTile * k, kTileBytes);
      PHI_TILE_LOAD(4, high + k, stride);
      PHI_TILE_ADD_SS(0, 4, 6);
      if (Panels == 2) {
        PHI_TILE_LOAD(7, w1 + kTile * k, kTileBytes);
        PHI_TILE_ADD_SS(2, 4, 7);
      }
      PHI_TILE_LOAD(5, low + k, stride);
      PHI_TILE_ADD_SS(1, 5, 6);
      if (Panels == 2) PHI_TILE_ADD_SS(3, 5, 7);
    }
    if (k < end) {
      // Half a tile: the other half is zeros.
      widen_half(high + k, stride, rows, tail[0]);
      widen_half(low + k, stride, rows, tail[1]);
      memset(tail[2], 0, sizeof(tail[2]) * 2);
      memcpy(tail[2], w0 + kTile * k, kTileBytes * kTile / 2);
      memcpy(tail[3], w1 + kTile * k, kTileBytes * kTile / 2);
      PHI_TILE_LOAD(4, tail[0], kTileBytes);
      PHI_TILE_LOAD(5, tail[1], kTileBytes);
      PHI_TILE_LOAD(6, tail[2], kTileBytes);
      PHI_TILE_ADD_SS(0, 4, 6);
      PHI_TILE_ADD_SS(1, 5, 6);
      if (Panels == 2) {
        PHI_TILE_LOAD(7, tail[3], kTileBytes);
        PHI_TILE_ADD_SS(2, 4, 7);
        PHI_TILE_ADD_SS(3, 5, 7);
      }
    }
    PHI_TILE_STORE(0, sums[0].high, kTileBytes);
    PHI_TILE_STORE(1, sums[0].low, kTileBytes);
    if (Panels == 2) {
      PHI_TILE_STORE(2, sums[Panels - 1].high, kTileBytes);
      PHI_TILE_STORE(3, sums[Panels - 1].low, kTileBytes);
    }
    if (end == a.k32) break;
    for (PanelSums& s : sums) {
      for (int r = 0; r < rows; r++) (block ? sum_of<true>(s, r) : sum_of<false>(s, r)).store(s.before + kTile * r);
    }
  }
  for (int p = 0; p < Panels; p++) {
    if (a.k32 > kExactBlock) {
      write_sums<true>(a, sums[p], panel + p, row, rows);
    } else {
      write_sums<false>(a, sums[p], panel + p, row, rows);
    }
  }
}

template <bool Fetch>
inline void tiles_int8_row(const LinearArgs& a, int first_panel, int last_panel, int row, int rows) {
  int panel = first_panel;
  for (; panel + 2 <= last_panel; panel += 2) tiles_int8<2, Fetch>(a, panel, row, rows);
  if (panel < last_panel) tiles_int8<1, Fetch>(a, panel, row, rows);
}

// f += the products with groups [group, group + num), whose weights stand in `unpacked`; num is at most 4.
template <int R>
PHI_INLINE void add_groups(const LinearArgs& a, int row, int group, int num, const uint16_t* scale,
                           const uint8_t* unpacked, int32_t (&sums)[kGroupTiles][kTile * kTile], F16 (&f)[R]) {
  constexpr int kNbytes = kTileBytes * 8;
  const int groups = a.k32 / 32;
  const int8_t* x = static_cast<const int8_t*>(a.x) + int64_t{row} * a.k32 + 32 * group;
#define PHI_GROUP(i, x_tile, w_tile)                           \
  if (i < num) {                                               \
    PHI_TILE_ZERO(i);                                          \
    PHI_TILE_LOAD(x_tile, x + 32 * i, a.k32);                  \
    PHI_TILE_LOAD(w_tile, unpacked + kNbytes * i, kTileBytes); \
    PHI_TILE_ADD_SU(i, x_tile, w_tile);                        \
  }
  PHI_GROUP(0, 4, 6)
  PHI_GROUP(1, 5, 7)
  PHI_GROUP(2, 4, 6)
  PHI_GROUP(3, 5, 7)
#undef PHI_GROUP
  PHI_TILE_STORE(0, sums[0], kTileBytes);
  if (num > 1) PHI_TILE_STORE(1, sums[1], kTileBytes);
  if (num > 2) PHI_TILE_STORE(2, sums[2], kTileBytes);
  if (num > 3) PHI_TILE_STORE(3, sums[3], kTileBytes);
  const float* x_scale = a.x_scale + int64_t{row} * groups + group;
  const float* group_sums = a.group_sums + int64_t{row} * groups + group;
  for (int i = 0; i < num; i++) {
    const F16 d = from_f16(scale + 32 * (group + i)), m = from_f16(scale + 32 * (group + i) + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const F16 sum = {_mm512_cvtepi32_ps(_mm512_load_si512(sums[i] + kTile * r))};
      f[r] = fma(sum, d * F16::set1(x_scale[int64_t{r} * groups + i]), f[r]);
      f[r] = fma(m, F16::set1(group_sums[int64_t{r} * groups + i]), f[r]);
    }
  }
}

// R rows against a panel of int4 weights. Tiles 0 to 3: sums of a group each; 4, 5: activations; 6, 7: weights.
template <int R>
inline void tiles_int4(const LinearArgs& a, int panel, int row) {
  alignas(64) int32_t sums[kGroupTiles][kTile * kTile];
  alignas(64) uint8_t unpacked[kUnpackedGroups * 8 * kTileBytes];
  const uint8_t* w = static_cast<const uint8_t*>(a.weight) + int64_t{panel} * 8 * a.k32;
  const uint16_t* scale = static_cast<const uint16_t*>(a.scale) + int64_t{panel} * a.k32;
  const int groups = a.k32 / 32;
  F16 f[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) f[r] = F16::zero();
  for (int first = 0; first < groups; first += kUnpackedGroups) {
    const int num = groups - first < kUnpackedGroups ? groups - first : kUnpackedGroups;
    for (int i = 0; i < 4 * num; i++) {
      Quads low, high;
      quads_from_i4(w + int64_t{256} * first + kTileBytes * i, low, high);
      _mm512_store_si512(unpacked + 2 * kTileBytes * i, low.v);
      _mm512_store_si512(unpacked + 2 * kTileBytes * i + kTileBytes, high.v);
    }
    int g = 0;
    for (; g + kGroupTiles <= num; g += kGroupTiles) {
      add_groups<R>(a, row, first + g, kGroupTiles, scale, unpacked + 8 * kTileBytes * g, sums, f);
    }
    if (g < num) add_groups<R>(a, row, first + g, num - g, scale, unpacked + 8 * kTileBytes * g, sums, f);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) write_panel(a, panel, row + r, f[r]);
}

template <int R>
inline void tiles_int4_rows(const LinearArgs& a, int first_panel, int last_panel, int row, int rows) {
  if constexpr (R >= kLeastRowsInt4) {
    if (rows != R) return tiles_int4_rows<R - 1>(a, first_panel, last_panel, row, rows);
    TileShapes shapes;
    for (int t = 0; t < 4; t++) shapes.set(t, R, kTileBytes);
    for (int t = 4; t < 6; t++) shapes.set(t, R, 32);
    for (int t = 6; t < 8; t++) shapes.set(t, 8, kTileBytes);
    PHI_TILES_LOAD_SHAPES(shapes);
    for (int panel = first_panel; panel < last_panel; panel++) tiles_int4<R>(a, panel, row);
  }
}

inline void linear_int4_tiles(const LinearArgs& a, int first_panel, int last_panel, void* memory) {
  if (a.m < kLeastRowsInt4) return linear_int4(a, first_panel, last_panel, memory);
  for (int row = 0; row < a.m;) {
    // What is left is cut in halves rather than leave a few rows.
    const int left = a.m - row, rows = left <= kTile ? left : left < kTile + kLeastRowsInt4 ? left / 2 : kTile;
    tiles_int4_rows<kTile>(a, first_panel, last_panel, row, rows);
    row += rows;
  }
  PHI_TILES_RELEASE();
}

inline void linear_int8_tiles(const LinearArgs& a, int first_panel, int last_panel, void*) {
  for (int row = 0; row < a.m; row += kTile) {
    const int rows = a.m - row < kTile ? a.m - row : kTile;
    TileShapes shapes;
    for (int t = 0; t < 6; t++) shapes.set(t, rows, kTileBytes);
    for (int t = 6; t < 8; t++) shapes.set(t, kTile, kTileBytes);
    PHI_TILES_LOAD_SHAPES(shapes);
    // Later rows find the range's weights in the outer cache.
    if (row == 0) {
      tiles_int8_row<true>(a, first_panel, last_panel, row, rows);
    } else {
      tiles_int8_row<false>(a, first_panel, last_panel, row, rows);
    }
  }
  PHI_TILES_RELEASE();
}

}  // namespace PHI_ISA
}  // namespace phi
