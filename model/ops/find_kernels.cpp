// See kernels.h.

#include <cstring>

#include "kernels.h"

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

bool always() { return true; }

struct Candidate {
  bool (*is_there)();
  const Kernels& (*kernels)();
};

// Best first.
const Candidate kCandidates[] = {
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
