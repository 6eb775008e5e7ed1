// See step.h.

#include "step.h"

#include <algorithm>
#include <cmath>

namespace phi {

namespace {

int pad32(int n) { return (n + 31) / 32 * 32; }

// Rows a thread takes at once: enough that taking them costs little.
constexpr int kRowsPerItem = 4;
// A range of weights that a thread takes at once: it stays in the core's outer cache while all rows meet it.
constexpr int64_t kRangeNbytes = 192 << 10;
constexpr int64_t kLeastRangeNbytes = 24 << 10;

template <class Vector>
void grow(Vector& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(size);
}

}  // namespace

Network::Network(const PhiNetwork& description, const Kernels& kernels, int num_threads)
    : net_(description), kernels_(kernels), pool_(num_threads) {
  linears_.assign(net_.linears, net_.linears + 4 * net_.num_layers + 1);
  hidden_stride_ = pad32(net_.hidden_size);
  attention_width_ = net_.num_heads * net_.head_dim;
  qkv_width_ = attention_width_ + 2 * net_.num_kv_heads * net_.head_dim;
  max_k32_ = std::max({hidden_stride_, pad32(attention_width_), pad32(net_.intermediate_size)});
  norms_.assign(static_cast<size_t>(2 * net_.num_layers + 1) * hidden_stride_, 0.0f);
  for (int i = 0; i < 2 * net_.num_layers + 1; i++) {
    std::copy(net_.norms[i], net_.norms[i] + net_.hidden_size, norms_.data() + static_cast<size_t>(i) * hidden_stride_);
  }
  int64_t floats = std::max({static_cast<int64_t>(max_k32_), linear_scratch(max_k32_) / 4,
                             sample_scratch_floats(net_.vocab_size),
                             attend_scratch(net_.head_dim, net_.num_heads, net_.num_kv_heads)});
  scratch_size_ = (floats + 15) / 16 * 8;  // whole lines
  scratch_.resize(scratch_size_ * pool_.num_threads());
}

void Network::forward(const PhiChunk* chunks, int num_chunks, const int32_t* token_ids, float* logits) {
  prepare(chunks, num_chunks);
  embed(token_ids);
  for (int i = 0; i < net_.num_layers; i++) {
    const PhiLinear* layer = &linears_[4 * i];
    norm(&norms_[static_cast<size_t>(2 * i) * hidden_stride_], layer[0].kind, nullptr, num_tokens_);
    linear(layer[0], num_tokens_, qkv_.data(), qkv_width_, false);
    rotate_and_store(i, chunks);
    attend(i, chunks);
    pool_.run((num_tokens_ + kRowsPerItem - 1) / kRowsPerItem, [&](int item, int thread) {
      for (int t = item * kRowsPerItem; t < std::min((item + 1) * kRowsPerItem, num_tokens_); t++) {
        int k32 = pad32(attention_width_);
        kernels_.copy_quantize(&attention_[static_cast<int64_t>(t) * attention_width_], attention_width_, k32,
                               scratch(thread), quantized(t, k32, layer[1].kind));
      }
    });
    linear(layer[1], num_tokens_, hidden_.data(), hidden_stride_, true);
    norm(&norms_[static_cast<size_t>(2 * i + 1) * hidden_stride_], layer[2].kind, nullptr, num_tokens_);
    linear(layer[2], num_tokens_, gate_up_.data(), 2 * net_.intermediate_size, false);
    pool_.run((num_tokens_ + kRowsPerItem - 1) / kRowsPerItem, [&](int item, int thread) {
      for (int t = item * kRowsPerItem; t < std::min((item + 1) * kRowsPerItem, num_tokens_); t++) {
        int k32 = pad32(net_.intermediate_size);
        kernels_.silu_mul_quantize(&gate_up_[static_cast<int64_t>(t) * 2 * net_.intermediate_size],
                                   net_.intermediate_size, k32, scratch(thread), quantized(t, k32, layer[3].kind));
      }
    });
    linear(layer[3], num_tokens_, hidden_.data(), hidden_stride_, true);
    progress_.fetch_add(1, std::memory_order_relaxed);
  }
  int num_wanted = static_cast<int>(wanted_.size());
  if (num_wanted == 0) return;
  const PhiLinear& head = linears_.back();
  norm(&norms_[static_cast<size_t>(2 * net_.num_layers) * hidden_stride_], head.kind, wanted_.data(), num_wanted);
  linear(head, num_wanted, logits, net_.vocab_size, false);
}

void Network::sample(SampleArgs* rows, int num_rows) {
  pool_.run(num_rows, [&](int item, int thread) { kernels_.sample_row(rows[item], scratch(thread)); });
}

void Network::prepare(const PhiChunk* chunks, int num_chunks) {
  const int half = net_.rotary_dim / 2;
  chunk_of_.clear(), offset_of_.clear(), wanted_.clear();
  attends_.clear(), attend_items_.clear(), merge_items_.clear();
  for (int c = 0; c < num_chunks; c++) {
    int first = static_cast<int>(chunk_of_.size()), n = chunks[c].num_tokens;
    for (int i = 0; i < n; i++) chunk_of_.push_back(c), offset_of_.push_back(i);
    for (int i = n - chunks[c].num_logits; i < n; i++) wanted_.push_back(first + i);
  }
  num_tokens_ = static_cast<int>(chunk_of_.size());
  grow(hidden_, static_cast<int64_t>(num_tokens_) * hidden_stride_);
  grow(qkv_, static_cast<int64_t>(num_tokens_) * qkv_width_);
  grow(attention_, static_cast<int64_t>(num_tokens_) * attention_width_);
  grow(gate_up_, static_cast<int64_t>(num_tokens_) * 2 * net_.intermediate_size);
  grow(x_, static_cast<int64_t>(num_tokens_) * max_k32_);
  grow(x_scale_, static_cast<int64_t>(num_tokens_) * (max_k32_ / 32));
  grow(group_sums_, static_cast<int64_t>(num_tokens_) * (max_k32_ / 32));
  grow(offsets_, static_cast<int64_t>(num_tokens_) * (max_k32_ / 32));
  grow(cos_, static_cast<int64_t>(num_tokens_) * half);
  grow(sin_, static_cast<int64_t>(num_tokens_) * half);
  for (int t = 0; t < num_tokens_; t++) {
    const PhiChunk& chunk = chunks[chunk_of_[t]];
    const float* inv_freq = chunk.long_rope ? net_.long_inv_freq : net_.short_inv_freq;
    float position = static_cast<float>(chunk.start + offset_of_[t]);
    for (int i = 0; i < half; i++) {
      float angle = position * inv_freq[i];
      cos_[static_cast<int64_t>(t) * half + i] = std::cos(angle) * net_.attention_factor;
      sin_[static_cast<int64_t>(t) * half + i] = std::sin(angle) * net_.attention_factor;
    }
  }
  // Many chunks keep the threads busy without cutting each of them.
  attend_threads_ = num_chunks < 2 * pool_.num_threads() ? pool_.num_threads() : 1;
  int row = 0;
  int64_t partials = 0;
  for (int c = 0; c < num_chunks; c++) {
    AttendArgs a = {};
    a.qkv = &qkv_[static_cast<int64_t>(row) * qkv_width_];
    a.ld_qkv = qkv_width_;
    a.row_nbytes = net_.kv_row_nbytes;
    a.kv_kind = net_.kv_kind;
    a.num_heads = net_.num_heads, a.num_kv_heads = net_.num_kv_heads, a.head_dim = net_.head_dim;
    a.start = chunks[c].start, a.n = chunks[c].num_tokens, a.window = net_.sliding_window;
    a.scale = 1.0f / std::sqrt(static_cast<float>(net_.head_dim));
    a.out = &attention_[static_cast<int64_t>(row) * attention_width_];
    a.ld_out = attention_width_;
    attends_.push_back(a);
    partials += attend_partials(a, attend_threads_);
    for (int i = 0; i < attend_num_items(a, attend_threads_); i++) attend_items_.push_back({c, i});
    for (int i = 0; i < attend_num_merges(a, attend_threads_); i++) merge_items_.push_back({c, i});
    row += chunks[c].num_tokens;
  }
  grow(partials_, partials);
  partials = 0;
  for (AttendArgs& a : attends_) {
    int64_t size = attend_partials(a, attend_threads_);
    a.partials = size ? partials_.data() + partials : nullptr;
    partials += size;
  }
}

void Network::embed(const int32_t* token_ids) {
  for (int t = 0; t < num_tokens_; t++) {
    float* row = &hidden_[static_cast<int64_t>(t) * hidden_stride_];
    kernels_.widen_row(net_.embed_tokens + static_cast<int64_t>(token_ids[t]) * net_.hidden_size, net_.hidden_size, row);
    std::fill(row + net_.hidden_size, row + hidden_stride_, 0.0f);
  }
}

void Network::rotate_and_store(int layer, const PhiChunk* chunks) {
  const int half = net_.rotary_dim / 2;
  pool_.run((num_tokens_ + kRowsPerItem - 1) / kRowsPerItem, [&](int item, int) {
    for (int t = item * kRowsPerItem; t < std::min((item + 1) * kRowsPerItem, num_tokens_); t++) {
      float* row = &qkv_[static_cast<int64_t>(t) * qkv_width_];
      kernels_.rotate_heads(row, net_.num_heads + net_.num_kv_heads, net_.head_dim,
                            &cos_[static_cast<int64_t>(t) * half], &sin_[static_cast<int64_t>(t) * half], half);
      const PhiChunk& chunk = chunks[chunk_of_[t]];
      char* keys = static_cast<char*>(chunk.kv) + 2 * layer * net_.kv_region_nbytes +
                   (chunk.start + offset_of_[t]) * net_.kv_row_nbytes;
      const float* key = row + attention_width_;
      kernels_.store_kv_row(key, net_.num_kv_heads, net_.head_dim, net_.kv_kind, keys);
      kernels_.store_kv_row(key + net_.num_kv_heads * net_.head_dim, net_.num_kv_heads, net_.head_dim, net_.kv_kind,
                            keys + net_.kv_region_nbytes);
    }
  });
}

void Network::attend(int layer, const PhiChunk* chunks) {
  for (size_t c = 0; c < attends_.size(); c++) {
    attends_[c].keys = static_cast<const char*>(chunks[c].kv) + 2 * layer * net_.kv_region_nbytes;
    attends_[c].values = attends_[c].keys + net_.kv_region_nbytes;
    // Where each chunk is one item, threads take turns.
    size_t next = c + pool_.num_threads();
    attends_[c].next = next < attends_.size() ? &attends_[next] : nullptr;
  }
  pool_.run(static_cast<int>(attend_items_.size()), [&](int i, int thread) {
    kernels_.attend_item(attends_[attend_items_[i].chunk], attend_threads_, attend_items_[i].item, scratch(thread));
  });
  pool_.run(static_cast<int>(merge_items_.size()), [&](int i, int) {
    kernels_.attend_merge_item(attends_[merge_items_[i].chunk], attend_threads_, merge_items_[i].item);
  });
}

void Network::norm(const float* weight, int kind, const int32_t* rows, int num_rows) {
  pool_.run((num_rows + kRowsPerItem - 1) / kRowsPerItem, [&](int item, int thread) {
    for (int i = item * kRowsPerItem; i < std::min((item + 1) * kRowsPerItem, num_rows); i++) {
      const float* x = &hidden_[static_cast<int64_t>(rows ? rows[i] : i) * hidden_stride_];
      kernels_.norm_quantize(x, weight, net_.rms_norm_eps, net_.hidden_size, hidden_stride_, scratch(thread),
                             quantized(i, hidden_stride_, kind));
    }
  });
}

void Network::linear(const PhiLinear& layer, int num_rows, float* y, int64_t ld_y, bool add) {
  LinearArgs a = {layer.weight, layer.scale,        layer.n,  pad32(layer.k), x_.data(), x_scale_.data(),
                  group_sums_.data(), offsets_.data(), num_rows, y, ld_y, add};
  auto kernel = kernels_.linear[layer.kind];
  int num_panels = (layer.n + 15) / 16;
  int64_t panel_nbytes = static_cast<int64_t>(a.k32) * (layer.kind == LINEAR_INT4 ? 10 : 16);
  int64_t shared = (num_panels + 4 * pool_.num_threads() - 1) / (4 * pool_.num_threads());
  int64_t least = std::max<int64_t>(1, kLeastRangeNbytes / (panel_nbytes * num_rows));
  int64_t most = std::max<int64_t>(1, kRangeNbytes / panel_nbytes);
  int panels = static_cast<int>(std::min(std::max(shared, least), most));
  pool_.run((num_panels + panels - 1) / panels, [&](int item, int thread) {
    kernel(a, item * panels, std::min((item + 1) * panels, num_panels), scratch(thread));
  });
}

QuantizedRow Network::quantized(int row, int k32, int kind) {
  int16_t* x = x_.data() + static_cast<int64_t>(row) * k32;
  if (kind == LINEAR_INT8) return {x, x_scale_.data() + row, nullptr, nullptr};
  int64_t first_group = static_cast<int64_t>(row) * (k32 / 32);
  return {reinterpret_cast<int8_t*>(x_.data()) + static_cast<int64_t>(row) * k32, x_scale_.data() + first_group,
          group_sums_.data() + first_group, offsets_.data() + first_group};
}

}  // namespace phi
