// The plain C++ half of simd.h: the same names, one number after the other. Included by simd.h only.

struct F16 {
  float v[16];
  static inline F16 load(const float* p) {
    F16 r;
    for (int i = 0; i < 16; i++) r.v[i] = p[i];
    return r;
  }
  static inline F16 zero() { return set1(0.0f); }
  static inline F16 set1(float x) {
    F16 r;
    for (int i = 0; i < 16; i++) r.v[i] = x;
    return r;
  }
  inline void store(float* p) const {
    for (int i = 0; i < 16; i++) p[i] = v[i];
  }
};

namespace detail {
template <class Fn>
inline F16 each(Fn fn) {
  F16 r;
  for (int i = 0; i < 16; i++) r.v[i] = fn(i);
  return r;
}
inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  // Subnormal halves are whole multiples of 2^-24.
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  uint32_t high = exponent == 31 ? 255u : exponent + 112u;
  return bits_to_float(sign | high << 23 | mantissa << 13);
}
}  // namespace detail

inline F16 operator+(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F16 operator-(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F16 operator*(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F16 operator/(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return detail::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F16 max(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 min(F16 a, F16 b) {
  return detail::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 abs(F16 a) {
  return detail::each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline F16 round(F16 a) {
  return detail::each([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline F16 scale2(F16 x, F16 n) {
  return detail::each([&](int i) {
    // NaN has no integer; x is NaN then, and stays it.
    uint32_t whole = n.v[i] == n.v[i] ? static_cast<uint32_t>(static_cast<int32_t>(n.v[i])) : 0u;
    return detail::bits_to_float(detail::float_to_bits(x.v[i]) + (whole << 23));
  });
}
inline F16 zero_where_less(F16 a, F16 b, F16 x) {
  return detail::each([&](int i) { return a.v[i] < b.v[i] ? 0.0f : x.v[i]; });
}
inline F16 from_bf16(const uint16_t* p) {
  return detail::each([&](int i) { return detail::bits_to_float(static_cast<uint32_t>(p[i]) << 16); });
}
inline void to_bf16(F16 a, uint16_t* p) {
  for (int i = 0; i < 16; i++) {
    uint32_t u = detail::float_to_bits(a.v[i]);
    p[i] = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
}
inline F16 as_bf16(F16 a) {
  uint16_t rounded[16];
  to_bf16(a, rounded);
  return from_bf16(rounded);
}
inline F16 from_i8(const int8_t* p) {
  return detail::each([&](int i) { return static_cast<float>(p[i]); });
}
inline F16 from_f16(const uint16_t* p) {
  return detail::each([&](int i) { return detail::half_to_float(p[i]); });
}
inline void to_i16(F16 a, int16_t* p) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int16_t>(__builtin_nearbyintf(a.v[i]));
}
inline void to_i8(F16 a, int8_t* p) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(__builtin_nearbyintf(a.v[i]));
}

struct Pairs {
  int16_t v[32];
};
struct Sums {
  int32_t v[16];
  static inline Sums zero() { return {}; }
};
inline void pairs_from_i8(const int8_t* p, Pairs& first, Pairs& second) {
  for (int i = 0; i < 16; i++) {
    first.v[2 * i] = p[4 * i], first.v[2 * i + 1] = p[4 * i + 2];
    second.v[2 * i] = p[4 * i + 1], second.v[2 * i + 1] = p[4 * i + 3];
  }
}
inline void add_products(Sums& sums, const Pairs& weights, const int16_t* x) {
  for (int i = 0; i < 16; i++) {
    sums.v[i] += int32_t{weights.v[2 * i]} * x[0] + int32_t{weights.v[2 * i + 1]} * x[1];
  }
}
inline F16 to_float(const Sums& sums) {
  return detail::each([&](int i) { return static_cast<float>(sums.v[i]); });
}
inline F16 to_float(const Sums& a, const Sums& b) {
  return detail::each([&](int i) { return static_cast<float>(int64_t{a.v[i]} + b.v[i]); });
}

struct Quads {
  uint8_t v[64];
};
struct QuadSums {
  int32_t v[16];
  static inline QuadSums zero() { return {}; }
};
inline void quads_from_i4(const uint8_t* p, Quads& first, Quads& second) {
  for (int i = 0; i < 64; i++) {
    first.v[i] = p[i] & 15;
    second.v[i] = p[i] >> 4;
  }
}
inline void add_products(QuadSums& sums, const Quads& weights, const int8_t* x) {
  for (int i = 0; i < 64; i++) sums.v[i / 4] += int32_t{weights.v[i]} * x[i % 4];
}
inline F16 to_float(const QuadSums& sums) {
  return detail::each([&](int i) { return static_cast<float>(sums.v[i]); });
}

struct Fours {
  int8_t v[64];
};
struct SignedSums {
  int32_t v[16];
  static inline SignedSums begin(const int32_t*) { return {}; }
};
inline Fours fours_from_i8(const int8_t* p) {
  Fours fours;
  for (int i = 0; i < 64; i += 4) {
    fours.v[i] = p[i], fours.v[i + 1] = p[i + 2], fours.v[i + 2] = p[i + 1], fours.v[i + 3] = p[i + 3];
  }
  return fours;
}
inline void add_products(SignedSums& sums, const Fours& weights, const int8_t* x) {
  for (int i = 0; i < 64; i++) sums.v[i / 4] += int32_t{weights.v[i]} * x[i % 4];
}
inline F16 to_float(const SignedSums& sums) {
  return detail::each([&](int i) { return static_cast<float>(sums.v[i]); });
}

inline float reduce_add(F16 x) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) x.v[i] = x.v[i] + x.v[i + n];
  }
  return x.v[0];
}
inline float reduce_max(F16 x) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) x.v[i] = x.v[i] > x.v[i + n] ? x.v[i] : x.v[i + n];
  }
  return x.v[0];
}
