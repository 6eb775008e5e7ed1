// One forward pass over the chunks of many sequences, without anything but C++ between the layers.
//
// Owns: the order of the layers, the workspace, and how work is cut into items for the threads, also the draws behind it.
// The arithmetic is the kernels'. Knows nothing of Python or of sequences' lives.

#pragma once

#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "network.h"
#include "thread_pool.h"

namespace phi {

// For vectors whose rows begin with cache lines: tiles are loaded by whole ones.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const LineAllocator<U>&) const {
    return false;
  }
};
template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

class Network {
 public:
  Network(const PhiNetwork& description, const Kernels& kernels, int num_threads);

  // Writes the chunks' K and V rows and float32 logits [sum of num_logits, vocab_size]. token_ids holds all chunks'
  // tokens. For one caller at a time; all input must be valid.
  void forward(const PhiChunk* chunks, int num_chunks, const int32_t* token_ids, float* logits);

  // Grows with every layer computed: what a watchdog in another thread looks at.
  uint64_t progress() const { return progress_.load(std::memory_order_relaxed); }
  // Draws a token for each row, which must not be longer than vocab_size.
  void sample(SampleArgs* rows, int num_rows);

 private:
  struct ChunkItem {
    int chunk, item;
  };

  void prepare(const PhiChunk* chunks, int num_chunks);
  void embed(const int32_t* token_ids);
  void rotate_and_store(int layer, const PhiChunk* chunks);
  void attend(int layer, const PhiChunk* chunks);
  // Each row of `rows` (indices into hidden, null: all) normed and rounded as layers of this kind take it.
  void norm(const float* weight, int kind, const int32_t* rows, int num_rows);
  void linear(const PhiLinear& layer, int num_rows, float* y, int64_t ld_y, bool add);
  QuantizedRow quantized(int row, int k32, int kind);
  float* scratch(int thread) { return reinterpret_cast<float*>(scratch_.data() + thread * scratch_size_); }

  PhiNetwork net_;
  std::vector<PhiLinear> linears_;
  // Norms' weights padded with zeros to hidden_stride_.
  Lines<float> norms_;
  const Kernels& kernels_;
  ThreadPool pool_;

  int hidden_stride_, qkv_width_, attention_width_, max_k32_;
  // Of each thread, in doubles, because the sampler's must be aligned for them.
  int64_t scratch_size_;
  Lines<double> scratch_;
  std::atomic<uint64_t> progress_{0};
  int num_tokens_ = 0, attend_threads_ = 1;
  Lines<float> hidden_, qkv_, attention_, gate_up_, cos_, sin_, x_scale_, group_sums_, partials_;
  Lines<int32_t> offsets_;
  Lines<int16_t> x_;
  // For each of the step's tokens: its chunk, its place in it; the rows that logits are wanted of.
  std::vector<int32_t> chunk_of_, offset_of_, wanted_;
  std::vector<AttendArgs> attends_;
  std::vector<ChunkItem> attend_items_, merge_items_;
};

}  // namespace phi
