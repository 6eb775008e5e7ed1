// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes, and products of them.
//
// Owns: their instructions, and whether this compiler and this process may use them. Knows nothing of layers.

#pragma once

#include <cstdint>

// Compilers that know the instructions come with this header; their assembler is what we need.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define PHI_HAS_AMX
#endif
#endif

#if defined(PHI_HAS_AMX)

namespace phi {

// The shapes of the eight tiles, as `ldtilecfg` reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_nbytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int nbytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_nbytes[tile] = static_cast<uint16_t>(nbytes);
  }
};

// Macros, for the tiles' numbers are part of the instructions. "memory": what is written before must be there.
#define PHI_TILES_LOAD_SHAPES(shapes) __asm__ volatile("ldtilecfg %0" ::"m"(shapes))
#define PHI_TILES_RELEASE() __asm__ volatile("tilerelease" ::: "memory")
#define PHI_TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define PHI_TILE_LOAD(t, base, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define PHI_TILE_STORE(t, base, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
// sums += x * w: int8 times int8, int8 times uint8, bfloat16 times bfloat16.
#define PHI_TILE_ADD_SS(sums, x, w) __asm__ volatile("tdpbssd %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::: "memory")
#define PHI_TILE_ADD_SU(sums, x, w) __asm__ volatile("tdpbsud %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::: "memory")
#define PHI_TILE_ADD_BF16(sums, x, w) __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::: "memory")

}  // namespace phi

#endif
