// What one attention call works on, and how its work is cut into items: the same for every instruction set.
//
// Owns: AttendArgs, the sizes of its workspaces, and the plan of items. The plan never changes a result, only who
// computes it. Knows nothing of arithmetic. The functions are `static`, so that no copy that was compiled for one CPU
// is linked in the place of another.

#pragma once

#include <cstdint>

namespace phi {

enum KVKind { KV_BF16 = 0, KV_INT8 = 1 };

// One chunk of one sequence in one layer.
struct AttendArgs {
  // float32 [n][(num_heads + 2 * num_kv_heads) * head_dim], rows `ld_qkv` floats apart; queries come first, after rope.
  const float* qkv;
  int64_t ld_qkv;
  // The layer's stored keys and values: position t's row, [num_kv_heads][head_dim], at + t * row_nbytes. The rows of
  // this chunk's own tokens are among them. int8: each head is 4 bytes of float32 scale, then its numbers.
  const char* keys;
  const char* values;
  int64_t row_nbytes;
  int kv_kind;
  int num_heads, num_kv_heads;
  // A multiple of 2.
  int head_dim;
  // Position of the first of n tokens.
  int start, n;
  // The query at position t sees keys max(0, t - window + 1) to t. 0: all up to t.
  int window;
  // 1 / sqrt(head_dim).
  float scale;
  // float32 [n][num_heads * head_dim], rows `ld_out` floats apart.
  float* out;
  int64_t ld_out;
  // Workspace of attend_partials() floats; may be null if that is 0.
  float* partials;
  // Whose keys and values are probably read next by the thread that computes this chunk's last item; may be null.
  const AttendArgs* next;
};

constexpr int kKeyBlock = 32;
constexpr int kSuperBlock = 512;
// Queries x heads that an item computes at once, unless one query of one kv head has more.
constexpr int kItemRows = 96;
// Rows behind an item's that are computed for nothing where rows are taken by sixteen.
constexpr int kSpareRows = 16;
// Up to so many rows for each kv head, reading what is stored is most of the work, and an item takes several kv heads:
// they lie side by side in memory.
constexpr int kFewRows = 8;
// Up to so many rows are computed where keys and values are stored, and so many bytes of a position are read at once.
constexpr int kNarrowRows = 4;
constexpr int kSliceNbytes = 768;
// Items for each thread, so that threads end at about the same time.
constexpr int kItemsPerThread = 4;

struct AttendPlan {
  // Query heads for each kv head.
  int group;
  // Queries of an item, and the number of such blocks of queries.
  int queries, query_blocks;
  // Kv heads of an item, and the number of such blocks of heads.
  int heads, head_blocks;
  // The first super block that any query sees, and the number of them.
  int first_super, supers;
  // Whether each super block is an item of its own.
  bool split;
};

struct AttendItem {
  int first_head, last_head, first_query, last_query, first_super, last_super;  // "last" is one behind
};

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int padded_dim(int head_dim) { return ceil_div(head_dim, 16) * 16; }
// Bytes of one kv head's numbers at one position.
static inline int stored_nbytes(int kv_kind, int head_dim) { return kv_kind == KV_BF16 ? 2 * head_dim : 4 + head_dim; }
// Kv heads of a slice.
static inline int slice_heads(int kv_kind, int head_dim) {
  const int heads = kSliceNbytes / stored_nbytes(kv_kind, head_dim);
  return heads > 0 ? heads : 1;
}

// The first key that the query at position t sees.
static inline int first_key(const AttendArgs& a, int t) {
  return a.window > 0 && t - a.window + 1 > 0 ? t - a.window + 1 : 0;
}

static inline AttendPlan attend_plan(const AttendArgs& a, int num_threads) {
  AttendPlan p;
  p.group = a.num_heads / a.num_kv_heads;
  const int most = kItemRows / p.group > 0 ? kItemRows / p.group : 1;
  // Blocks of equal size, whose rows fill whole tiles of six.
  p.queries = ceil_div(a.n, ceil_div(a.n, most));
  if (p.queries > 6) p.queries = ceil_div(p.queries, 6) * 6 <= most ? ceil_div(p.queries, 6) * 6 : most;
  p.query_blocks = ceil_div(a.n, p.queries);
  p.first_super = first_key(a, a.start) / kSuperBlock;
  p.supers = (a.start + a.n - 1) / kSuperBlock + 1 - p.first_super;
  const int wanted = num_threads > 1 ? kItemsPerThread * num_threads : 1, rows = p.queries * p.group;
  const bool few = rows <= kFewRows;
  p.split = p.supers > 1 && num_threads > 1 && (few || a.num_kv_heads * p.query_blocks < wanted);
  const int others = p.query_blocks * (p.split ? p.supers : 1);
  p.heads = 1;
  if (few) {
    p.heads = kItemRows / rows < a.num_kv_heads ? kItemRows / rows : a.num_kv_heads;
    while (p.heads > 1 && ceil_div(a.num_kv_heads, p.heads) * others < wanted) p.heads--;
  }
  p.head_blocks = ceil_div(a.num_kv_heads, p.heads);
  return p;
}

static inline AttendItem attend_item_at(const AttendArgs& a, const AttendPlan& p, int item) {
  const auto least = [](int x, int y) { return x < y ? x : y; };
  AttendItem it;
  it.first_head = item % p.head_blocks * p.heads;
  it.last_head = least(it.first_head + p.heads, a.num_kv_heads);
  item /= p.head_blocks;
  // Late queries see the most keys: they go first.
  it.first_query = (p.query_blocks - 1 - item % p.query_blocks) * p.queries;
  it.last_query = least(it.first_query + p.queries, a.n);
  item /= p.query_blocks;
  it.first_super = p.first_super + (p.split ? item : 0);
  it.last_super = p.split ? it.first_super + 1 : p.first_super + p.supers;
  return it;
}

// Independent items of the first phase, for a caller that has `num_threads` threads for this chunk alone (1: other
// chunks keep the threads busy).
static inline int attend_num_items(const AttendArgs& a, int num_threads) {
  const AttendPlan p = attend_plan(a, num_threads);
  return p.head_blocks * p.query_blocks * (p.split ? p.supers : 1);
}

// Items of the second phase, which begins when the first is done: 0 unless super blocks were split.
static inline int attend_num_merges(const AttendArgs& a, int num_threads) {
  return attend_plan(a, num_threads).split ? a.n : 0;
}

// Floats of `partials`: for each super block, token and head its sum's numbers, greatest score and sum of weights.
static inline int64_t attend_partials(const AttendArgs& a, int num_threads) {
  const AttendPlan p = attend_plan(a, num_threads);
  return p.split ? int64_t{p.supers} * a.n * a.num_heads * (padded_dim(a.head_dim) + 2) : 0;
}

// Floats for a widened block of keys, or a slice of turned ones; and for their scales.
static inline int64_t scratch_keys(int head_dim) {
  const int64_t wide = int64_t{kKeyBlock} * padded_dim(head_dim), slice = kKeyBlock * kSliceNbytes / 4;
  return wide > slice ? wide : slice;
}
static inline int64_t scratch_scales() { return kKeyBlock * slice_heads(KV_INT8, 16); }

// Floats of each thread's scratch, for any chunk and any number of threads.
static inline int64_t attend_scratch(int head_dim, int num_heads, int num_kv_heads) {
  const int group = num_heads / num_kv_heads;
  const int64_t rows = group > kItemRows ? group : kItemRows, dim = padded_dim(head_dim);
  // See Scratch in attention_scratch.h: keys and their scales, a block of values, a tile's weights (of at most 8 rows),
  // and what is kept for each row. It begins on a cache line.
  return 16 + scratch_keys(head_dim) + scratch_scales() + kKeyBlock * dim + 8 * kKeyBlock +
         (rows + kSpareRows) * (3 * dim + dim / 2 + 16 + 3);
}

}  // namespace phi
