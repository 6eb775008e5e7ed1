// What a caller describes a network and its work with. Plain C: library.py has the same structures in ctypes.

#pragma once

#include <cstdint>

extern "C" {

// A packed linear layer (quantize.py) of n outputs and k inputs.
struct PhiLinear {
  const void* weight;
  const void* scale;
  int32_t n, k;
  // A LinearKind.
  int32_t kind;
  int32_t unused;
};

// Everything it points to must live as long as the network that is made of it.
struct PhiNetwork {
  // bfloat16 [vocab, hidden].
  const uint16_t* embed_tokens;
  // [rotary_dim / 2] each: LongRoPE's two sets, or twice the same.
  const float* short_inv_freq;
  const float* long_inv_freq;
  // 2 * layers + 1 rows [hidden]: of each layer before attention and before MLP, then the last.
  const float* const* norms;
  // 4 * layers + 1: of each layer qkv, o, gate_up, down, then the head.
  const PhiLinear* linears;
  // The KV area's layout: bytes of a region (K or V of a layer) and of a row (a token).
  int64_t kv_region_nbytes, kv_row_nbytes;
  int32_t kv_kind;
  int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, rotary_dim;
  // 0: none.
  int32_t sliding_window;
  float rms_norm_eps, attention_factor;
};

// Consecutive tokens of one sequence.
struct PhiChunk {
  // Its KV area, mapped writable.
  void* kv;
  // Absolute position of its first token, and how many there are.
  int32_t start, num_tokens;
  // Logits are wanted after the last so many.
  int32_t num_logits;
  int32_t long_rope;
};

}  // extern "C"
