// The kernels of one instruction set, as a table.
//
// Owns: which instruction sets there are and which of them this CPU has. Knows nothing of what the kernels do.

#pragma once

#include "amx.h"
#include "attention_args.h"
#include "linear_args.h"
#include "rowwise_args.h"
#include "sample_args.h"

namespace phi {

struct Kernels {
  const char* isa;
  // By LinearKind.
  void (*linear[3])(const LinearArgs&, int first_panel, int last_panel, void* memory);
  void (*norm_quantize)(const float* x, const float* weight, float eps, int k, int k32, float* scratch, QuantizedRow);
  void (*silu_mul_quantize)(const float* gate_up, int k, int k32, float* scratch, QuantizedRow);
  void (*copy_quantize)(const float* x, int k, int k32, float* scratch, QuantizedRow);
  void (*rotate_heads)(float* heads, int num_heads, int head_dim, const float* cos, const float* sin, int half);
  void (*widen_row)(const uint16_t* bf16, int k, float* out);
  void (*store_kv_row)(const float* numbers, int num_kv_heads, int head_dim, int kv_kind, char* row);
  void (*attend_item)(const AttendArgs&, int num_threads, int item, float* scratch);
  void (*attend_merge_item)(const AttendArgs&, int num_threads, int item);
  void (*sample_row)(SampleArgs&, float* scratch);
};

namespace plain {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_vnni {
const Kernels& kernels();
}
#endif
#if defined(PHI_HAS_AMX)
namespace amx {
const Kernels& kernels();
}
#endif

// The named instruction set's kernels, or the best ones for "". Null if this CPU lacks it or the name is unknown.
const Kernels* find_kernels(const char* isa);

}  // namespace phi
