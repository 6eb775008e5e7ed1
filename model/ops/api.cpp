// The C functions that library.py calls.
//
// Owns: the boundary: handles in, numbers out, no exception beyond. Knows nothing of how anything is computed.

#include <new>
#include <vector>

#include "attention_api.h"
#include "kernels.h"
#include "network.h"
#include "step.h"

using phi::Network;

#pragma GCC visibility push(default)

extern "C" {

// Raised with every change to these functions or their structures.
int phi_abi() { return 3; }

// The instruction set that `isa` ("": the best) means on this CPU, or null.
const char* phi_isa(const char* isa) {
  const phi::Kernels* kernels = phi::find_kernels(isa);
  return kernels ? kernels->isa : nullptr;
}

// Null if memory is short or this CPU lacks `isa`.
void* phi_network_create(const PhiNetwork* description, const char* isa, int num_threads) {
  const phi::Kernels* kernels = phi::find_kernels(isa);
  if (kernels == nullptr) return nullptr;
  try {
    return new Network(*description, *kernels, num_threads);
  } catch (...) {
    return nullptr;
  }
}

void phi_network_destroy(void* network) { delete static_cast<Network*>(network); }

// 0, or 1 if memory is short.
int phi_network_forward(void* network, const PhiChunk* chunks, int num_chunks, const int32_t* token_ids,
                        float* logits) {
  try {
    static_cast<Network*>(network)->forward(chunks, num_chunks, token_ids, logits);
    return 0;
  } catch (...) {
    return 1;
  }
}

// May be called from any thread while the network computes.
uint64_t phi_network_progress(const void* network) { return static_cast<const Network*>(network)->progress(); }

// Draws a token for each row, on the network's threads.
void phi_network_sample(void* network, phi::SampleArgs* rows, int num_rows) {
  static_cast<Network*>(network)->sample(rows, num_rows);
}

// Single kernels, for tests and for the check at start: whole layers on the caller's thread. The instruction set must
// be there.
void phi_linear(const char* isa, int kind, const phi::LinearArgs* args) {
  const phi::Kernels& kernels = *phi::find_kernels(isa);
  std::vector<char> memory(phi::linear_scratch(args->k32));
  kernels.linear[kind](*args, 0, (args->n + 15) / 16, memory.data());
}

void phi_sample(const char* isa, phi::SampleArgs* rows, int num_rows) {
  const phi::Kernels& kernels = *phi::find_kernels(isa);
  for (int i = 0; i < num_rows; i++) {
    std::vector<double> scratch(phi::sample_scratch_floats(rows[i].vocab) / 2);
    kernels.sample_row(rows[i], reinterpret_cast<float*>(scratch.data()));
  }
}

// One row each. `scratch` has room for k32 floats.
void phi_norm_quantize(const char* isa, const float* x, const float* weight, float eps, int k, int k32, float* scratch,
                       const phi::QuantizedRow* out) {
  phi::find_kernels(isa)->norm_quantize(x, weight, eps, k, k32, scratch, *out);
}

void phi_silu_mul_quantize(const char* isa, const float* gate_up, int k, int k32, float* scratch,
                           const phi::QuantizedRow* out) {
  phi::find_kernels(isa)->silu_mul_quantize(gate_up, k, k32, scratch, *out);
}

void phi_copy_quantize(const char* isa, const float* x, int k, int k32, float* scratch, const phi::QuantizedRow* out) {
  phi::find_kernels(isa)->copy_quantize(x, k, k32, scratch, *out);
}

void phi_rotate_heads(const char* isa, float* heads, int num_heads, int head_dim, const float* cos, const float* sin,
                      int half) {
  phi::find_kernels(isa)->rotate_heads(heads, num_heads, head_dim, cos, sin, half);
}

void phi_widen_row(const char* isa, const uint16_t* bf16, int k, float* out) {
  phi::find_kernels(isa)->widen_row(bf16, k, out);
}

void phi_test_attend(const char* isa, const phi::AttendArgs* args, int num_threads) {
  phi::test_attend(*phi::find_kernels(isa), *args, num_threads);
}

void phi_test_store_kv_row(const char* isa, const float* numbers, int num_kv_heads, int head_dim, int kv_kind,
                           char* row) {
  phi::test_store_kv_row(*phi::find_kernels(isa), numbers, num_kv_heads, head_dim, kv_kind, row);
}

}  // extern "C"

#pragma GCC visibility pop
