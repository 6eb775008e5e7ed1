// The kernels for CPUs with avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c.

#if defined(__x86_64__)

#include "simd_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define PHI_ISA avx512
#define PHI_AVX512
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
