// The kernels for CPUs with avx2,fma,f16c.

#if defined(__x86_64__)

#include "simd_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define PHI_ISA avx2
#define PHI_AVX2
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
