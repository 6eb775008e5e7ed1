// See thread_pool.h.

#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phi {

namespace {

constexpr int kItemBits = 20;
constexpr uint64_t kItemMask = (uint64_t{1} << kItemBits) - 1;
// A step's serial parts are shorter than this; the pause between two steps is longer.
constexpr auto kAwake = std::chrono::microseconds(150);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

inline uint64_t job_of(uint64_t word) { return word >> (2 * kItemBits); }

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; i++) helpers_.emplace_back([this, i] { help(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::run_job(int n, Call call, const void* fn) {
  number_ = (number_ + 1) & 0xffffff;
  Job& job = jobs_[number_ & 1];
  job.call = call;
  job.fn = fn;
  job.done.store(0, std::memory_order_relaxed);
  // Sequentially consistent with num_asleep_: either we see the sleeper, or it sees the job.
  next_.store(number_ << (2 * kItemBits) | static_cast<uint64_t>(n) << kItemBits);
  if (num_asleep_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  uint64_t seen;
  work(seen, 0);
  for (int spins = 0; job.done.load(std::memory_order_acquire) != n; spins++) {
    if (spins < 2000) {
      relax();
    } else {
      // A helper holds an item and was put aside: give it this core.
      std::this_thread::yield();
    }
  }
}

// Takes items until there are none. `seen` becomes the number of the last job that was looked at.
void ThreadPool::work(uint64_t& seen, int thread) {
  for (;;) {
    uint64_t word = next_.fetch_add(1, std::memory_order_acq_rel);
    int n = static_cast<int>((word >> kItemBits) & kItemMask);
    int item = static_cast<int>(word & kItemMask);
    seen = job_of(word);
    if (item >= n) return;
    Job& job = jobs_[seen & 1];
    job.call(job.fn, item, thread);
    job.done.fetch_add(1, std::memory_order_release);
  }
}

void ThreadPool::help(int thread) {
  uint64_t seen = 0;
  while (!stopping_.load(std::memory_order_relaxed)) {
    auto asleep_at = std::chrono::steady_clock::now() + kAwake;
    while (job_of(next_.load(std::memory_order_acquire)) == seen) {
      for (int i = 0; i < 16; i++) relax();
      if (std::chrono::steady_clock::now() < asleep_at) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      num_asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return stopping_ || job_of(next_.load()) != seen; });
      num_asleep_.fetch_sub(1);
      if (stopping_) return;
    }
    work(seen, thread);
  }
}

}  // namespace phi
