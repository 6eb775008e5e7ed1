// The attention kernels as single calls, for tests: api.cpp exports them.
//
// Owns: workspace and threads for one call. Knows nothing of layers. Compiled for every CPU: it only calls kernels.

#pragma once

#include <vector>

#include "attention_args.h"
#include "kernels.h"
#include "thread_pool.h"

namespace phi {

// Items are planned for `num_threads` threads, and computed by at most 4. `args.partials` is ignored.
inline void test_attend(const Kernels& kernels, const AttendArgs& args, int num_threads) {
  AttendArgs a = args;
  std::vector<float> partials(attend_partials(a, num_threads));
  a.partials = partials.empty() ? nullptr : partials.data();
  ThreadPool pool(num_threads < 4 ? num_threads : 4);
  const int64_t size = attend_scratch(a.head_dim, a.num_heads, a.num_kv_heads);
  std::vector<float> scratch(size * pool.num_threads());
  pool.run(attend_num_items(a, num_threads), [&](int item, int thread) {
    kernels.attend_item(a, num_threads, item, scratch.data() + thread * size);
  });
  pool.run(attend_num_merges(a, num_threads), [&](int item, int) { kernels.attend_merge_item(a, num_threads, item); });
}

inline void test_store_kv_row(const Kernels& kernels, const float* numbers, int num_kv_heads, int head_dim, int kv_kind,
                              char* row) {
  kernels.store_kv_row(numbers, num_kv_heads, head_dim, kv_kind, row);
}

}  // namespace phi
