// The rows of a tile side by side: what is multiplied at the same time lies together, behind one pointer. Row after
// row, each would need an address of its own, of which a CPU has fewer than sums: int8 rows were 10 to 25 % slower.
//
// Owns: this order. Knows nothing of weights. Included by linear.h only.

#pragma once

#include <cstring>

#include "linear_args.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// R rows: four bytes of each (two int16 or four int8 inputs), then the next four; a group's numbers likewise.
template <int R>
struct RowTile {
  const int8_t* x;
  const float* scale;
  const float* group_sums;
  const int32_t* offsets;
};

// R rows of `nbytes` bytes (a multiple of 4), `nbytes` apart, to `to`, four bytes of each at a time.
template <int R>
PHI_INLINE void interleave(const void* from, int nbytes, void* to) {
  const char* rows = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  int r = 0;
#if defined(PHI_AVX2) || defined(PHI_AVX512)
  for (; r + 4 <= R; r += 4) {
    const char* row = rows + static_cast<int64_t>(r) * nbytes;
    const auto load = [&](int i, int at) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + static_cast<int64_t>(i) * nbytes + at));
    };
    const auto store = [&](int four, __m128i numbers) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + static_cast<int64_t>(four) * 4 * R + 4 * r), numbers);
    };
    int at = 0;
    for (; at + 16 <= nbytes; at += 16) {
      const __m128i a = load(0, at), b = load(1, at), c = load(2, at), d = load(3, at);
      const __m128i ab = _mm_unpacklo_epi32(a, b), ab2 = _mm_unpackhi_epi32(a, b);
      const __m128i cd = _mm_unpacklo_epi32(c, d), cd2 = _mm_unpackhi_epi32(c, d);
      store(at / 4, _mm_unpacklo_epi64(ab, cd));
      store(at / 4 + 1, _mm_unpackhi_epi64(ab, cd));
      store(at / 4 + 2, _mm_unpacklo_epi64(ab2, cd2));
      store(at / 4 + 3, _mm_unpackhi_epi64(ab2, cd2));
    }
    for (; at < nbytes; at += 4) {
      for (int i = 0; i < 4; i++) memcpy(out + at * R + 4 * (r + i), row + static_cast<int64_t>(i) * nbytes + at, 4);
    }
  }
#endif
  for (; r < R; r++) {
    const char* row = rows + static_cast<int64_t>(r) * nbytes;
    for (int at = 0; at < nbytes; at += 4) memcpy(out + at * R + 4 * r, row + at, 4);
  }
}

// Rows [row, row + R) of `a`, in `memory` (linear_scratch() bytes).
template <int R, LinearKind Kind>
PHI_INLINE RowTile<R> side_by_side(const LinearArgs& a, int row, void* memory) {
  const int x_nbytes = (Kind == LINEAR_INT8 ? 2 : 1) * a.k32, groups = a.k32 / 32;
  const int8_t* x = static_cast<const int8_t*>(a.x) + static_cast<int64_t>(row) * x_nbytes;
  const int64_t group = static_cast<int64_t>(row) * groups;
  // One row is in this order.
  if (R == 1) return {x, a.x_scale + group, a.group_sums + group, a.offsets + group};
  char* next = static_cast<char*>(memory);
  const auto put = [&](const void* from, int nbytes) {
    void* to = next;
    interleave<R>(from, nbytes, to);
    next += static_cast<int64_t>(R) * nbytes;
    return to;
  };
  RowTile<R> tile = {static_cast<const int8_t*>(put(x, x_nbytes)), nullptr, nullptr, nullptr};
  if (Kind == LINEAR_INT8) return tile;
  tile.scale = static_cast<const float*>(put(a.x_scale + group, 4 * groups));
  if (Kind == LINEAR_INT4) tile.group_sums = static_cast<const float*>(put(a.group_sums + group, 4 * groups));
  if (Kind == LINEAR_INT8_GROUPS) tile.offsets = static_cast<const int32_t*>(put(a.offsets + group, 4 * groups));
  return tile;
}

}  // namespace PHI_ISA
}  // namespace phi
