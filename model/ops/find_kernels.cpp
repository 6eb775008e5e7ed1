// See kernels.h.

#include <cstring>

#include "kernels.h"

#if defined(PHI_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace phi {

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

#if defined(PHI_HAS_AMX)
// Asks the kernel too: tiles are 8 KB of state that a process must be allowed to have. For the whole process and those
// that it forks.
bool ask_for_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool has_amx() {
  if (!has_vnni() || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return false;
  static const bool allowed = ask_for_tiles();
  return allowed;
}
#endif

bool always() { return true; }

struct Candidate {
  bool (*is_there)();
  const Kernels& (*kernels)();
};

// Best first.
const Candidate kCandidates[] = {
#if defined(PHI_HAS_AMX)
    {has_amx, amx::kernels},
#endif
#if defined(__x86_64__)
    {has_vnni, avx512_vnni::kernels},
    {has_avx512, avx512::kernels},
    {has_avx2, avx2::kernels},
#endif
    {always, plain::kernels},
};

}  // namespace

const Kernels* find_kernels(const char* isa) {
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.is_there()) continue;
    const Kernels& kernels = candidate.kernels();
    if (*isa == '\0' || std::strcmp(isa, kernels.isa) == 0) return &kernels;
  }
  return nullptr;
}

}  // namespace phi
