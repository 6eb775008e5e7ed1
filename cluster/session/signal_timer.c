// Loaded into a session actor's process before Ray (LD_PRELOAD): its main thread looks for signals a hundred times a
// second by a timer of 10 ms that nothing can change, and each wake-up of an idle process costs up to 0.1 ms.
//
// Owns: that such a timer takes 200 ms. Only the main thread's, and only shorter ones than 20 ms: nothing else in Ray's
// worker waits for these. What is heard later by that is SIGTERM and SIGINT.

#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { SHORT_NS = 20 * 1000 * 1000, INSTEAD_NS = 200 * 1000 * 1000 };

int timerfd_settime(int fd, int flags, const struct itimerspec* new_value, struct itimerspec* old_value) {
  struct itimerspec value;
  if (new_value != NULL && flags == 0 && syscall(SYS_gettid) == getpid()) {
    value = *new_value;
    int once = value.it_interval.tv_sec == 0 && value.it_interval.tv_nsec == 0;
    // 0 disarms a timer.
    if (once && value.it_value.tv_sec == 0 && value.it_value.tv_nsec > 0 && value.it_value.tv_nsec < SHORT_NS) {
      value.it_value.tv_nsec = INSTEAD_NS;
      new_value = &value;
    }
  }
  return syscall(SYS_timerfd_settime, fd, flags, new_value, old_value);
}
