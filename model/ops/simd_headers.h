// What all kernels include from outside, before any of them switches the compiler's target: inline functions of the
// standard library must be compiled for every CPU.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
