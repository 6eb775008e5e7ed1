// The kernels in plain C++, for every CPU; also what the others are tested against.

#include "simd_headers.h"

#define PHI_ISA plain
#include "kernel_table.h"
