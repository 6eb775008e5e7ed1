// The kernels for CPUs with avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c.

#if defined(__x86_64__)

#include "simd_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define PHI_ISA avx512_vnni
#define PHI_AVX512
#define PHI_AVX512_VNNI
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
