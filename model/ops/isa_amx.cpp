// The kernels for CPUs with amx-int8,amx-bf16 and avx512vnni,avx512vbmi,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c.

#include "amx.h"

#if defined(PHI_HAS_AMX)

#include "simd_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vbmi,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512vbmi,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define PHI_ISA amx
#define PHI_AVX512
#define PHI_AVX512_VNNI
#define PHI_AMX
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
