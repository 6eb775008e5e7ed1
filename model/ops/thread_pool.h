// Threads that share the items of one job after another.
//
// Owns: the threads. Knows nothing of what an item is. A job costs about a microsecond: helpers wait awake for the next
// one and fall asleep after a while. The caller works too, and never waits for a helper that has not taken an item:
// one whose core is busy with something else delays nobody.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace phi {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls fn(item, thread) for items 0 to n - 1 (n < 2^20), thread in [0, num_threads); returns when all are done.
  // For one caller at a time.
  template <class Fn>
  void run(int n, const Fn& fn) {
    if (n <= 0) return;
    if (n == 1 || helpers_.empty()) {
      for (int i = 0; i < n; i++) fn(i, 0);
      return;
    }
    run_job(n, [](const void* f, int item, int thread) { (*static_cast<const Fn*>(f))(item, thread); }, &fn);
  }

 private:
  using Call = void (*)(const void* fn, int item, int thread);
  struct Job {
    Call call = nullptr;
    const void* fn = nullptr;
    std::atomic<int> done{0};
  };

  void run_job(int n, Call call, const void* fn);
  void help(int thread);
  void work(uint64_t& seen, int thread);

  // Job's number (24 bits), its items (20 bits), the next item (20 bits): whoever takes an item learns with the same
  // instruction which job it belongs to and whether it exists, so late helpers cannot mistake one job for another.
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) Job jobs_[2];
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  uint64_t number_ = 0;
};

}  // namespace phi
