// Metal's type traits, as_type and math functions. The overloads take exact types, so that calls
// that are ambiguous in Metal, such as max(int, uint), are ambiguous here.
#pragma once
#include "msl_types.h"

namespace metal {
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <class T>
inline constexpr bool is_floating_point_v =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T>
struct numeric_limits {
  static constexpr T max() { return std::numeric_limits<T>::max(); }
  static constexpr T min() { return std::numeric_limits<T>::min(); }
  static constexpr T lowest() { return std::numeric_limits<T>::lowest(); }
  static constexpr T infinity() { return std::numeric_limits<T>::infinity(); }
  static constexpr T quiet_NaN() { return std::numeric_limits<T>::quiet_NaN(); }
  static constexpr T epsilon() { return std::numeric_limits<T>::epsilon(); }
};
template <>
struct numeric_limits<half> {
  static constexpr half max() { return (half)65504.f; }
  static constexpr half min() { return (half)6.103515625e-05f; }
  static constexpr half lowest() { return (half)-65504.f; }
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half epsilon() { return (half)0.0009765625f; }
};
template <>
struct numeric_limits<bfloat> {
  static bfloat max() {
    bfloat b;
    b.bits = 0x7f7f;
    return b;
  }
  static bfloat min() {
    bfloat b;
    b.bits = 0x0080;
    return b;
  }
  static bfloat lowest() {
    bfloat b;
    b.bits = 0xff7f;
    return b;
  }
  static bfloat infinity() {
    bfloat b;
    b.bits = 0x7f80;
    return b;
  }
  static bfloat quiet_NaN() {
    bfloat b;
    b.bits = 0x7fc0;
    return b;
  }
};

// ---------------------------------------------------------------- as_type
template <class To, class From>
inline To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type size mismatch");
  To t;
  memcpy(&t, &f, sizeof(To));
  return t;
}

// ---------------------------------------------------------------- math
// Exact-type overload sets, so that mixed int/uint calls are ambiguous (as in MSL).
#define MSL_F1(name, expr)                             \
  inline float name(float x) { return expr; }          \
  inline half name(half h_) {                          \
    float x = (float)h_;                               \
    return (half)(expr);                               \
  }                                                    \
  inline bfloat name(bfloat b_) {                      \
    float x = (float)b_;                               \
    return bfloat(float(expr));                        \
  }                                                    \
  template <class T, int N>                            \
  inline vec<T, N> name(vec<T, N> v) {                 \
    for (int i = 0; i < N; i++) v.d[i] = name(v.d[i]); \
    return v;                                          \
  }
#define MSL_F2(name, expr)                                     \
  inline float name(float x, float y) { return expr; }         \
  inline half name(half a_, half b_) {                         \
    float x = (float)a_, y = (float)b_;                        \
    return (half)(expr);                                       \
  }                                                            \
  inline bfloat name(bfloat a_, bfloat b_) {                   \
    float x = (float)a_, y = (float)b_;                        \
    return bfloat(float(expr));                                \
  }                                                            \
  template <class T, int N>                                    \
  inline vec<T, N> name(vec<T, N> v, vec<T, N> w) {            \
    for (int i = 0; i < N; i++) v.d[i] = name(v.d[i], w.d[i]); \
    return v;                                                  \
  }
#define MSL_MATH_SET                                                                               \
  MSL_F1(exp, ::expf(x))                                                                           \
  MSL_F1(exp2, ::exp2f(x)) MSL_F1(exp10, ::powf(10.f, x)) MSL_F1(log, ::logf(x))                   \
      MSL_F1(log2, ::log2f(x)) MSL_F1(log10, ::log10f(x)) MSL_F1(sqrt, ::sqrtf(x))                 \
          MSL_F1(rsqrt, 1.0f / ::sqrtf(x)) MSL_F1(sin, ::sinf(x)) MSL_F1(cos, ::cosf(x))           \
              MSL_F1(tan, ::tanf(x)) MSL_F1(asin, ::asinf(x)) MSL_F1(acos, ::acosf(x)) MSL_F1(     \
                  atan, ::atanf(x)) MSL_F1(sinh, ::sinhf(x)) MSL_F1(cosh, ::coshf(x))              \
                  MSL_F1(tanh, ::tanhf(x)) MSL_F1(asinh, ::asinhf(x)) MSL_F1(acosh, ::acoshf(x))   \
                      MSL_F1(atanh, ::atanhf(x)) MSL_F1(floor, ::floorf(x))                        \
                          MSL_F1(ceil, ::ceilf(x)) MSL_F1(rint, ::nearbyintf(x))                   \
                              MSL_F1(round, ::roundf(x)) MSL_F1(trunc, ::truncf(x))                \
                                  MSL_F1(fabs, ::fabsf(x)) MSL_F1(fract, x - ::floorf(x))          \
                                      MSL_F1(sign, (x > 0) - (x < 0) + 0.0f)                       \
                                          MSL_F1(saturate, ::fminf(::fmaxf(x, 0.f), 1.f))          \
                                              MSL_F2(pow, ::powf(x, y)) MSL_F2(powr, ::powf(x, y)) \
                                                  MSL_F2(fmod, ::fmodf(x, y))                      \
                                                      MSL_F2(fmax, ::fmaxf(x, y))                  \
                                                          MSL_F2(fmin, ::fminf(x, y))              \
                                                              MSL_F2(atan2, ::atan2f(x, y))        \
                                                                  MSL_F2(divide, x / y)            \
                                                                      MSL_F2(fdim, ::fdimf(x, y))
MSL_MATH_SET
namespace precise {
MSL_MATH_SET
}
namespace fast {
MSL_MATH_SET
}
#undef MSL_F1
#undef MSL_F2
#define MSL_MM(T)                                                 \
  inline T max(T a, T b) { return a > b ? a : b; }                \
  inline T min(T a, T b) { return b < a ? b : a; }                \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); } \
  inline T abs(T a) { return a < T(0) ? T(-a) : a; }
typedef signed char schar_;
typedef long long llong_;
typedef unsigned long long ullong_;
MSL_MM(int)
MSL_MM(short) MSL_MM(char) MSL_MM(schar_) MSL_MM(long) MSL_MM(llong_)
#undef MSL_MM
#define MSL_MM(T)                                                 \
  inline T max(T a, T b) { return a > b ? a : b; }                \
  inline T min(T a, T b) { return b < a ? b : a; }                \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); } \
  inline T abs(T a) { return a; }
    MSL_MM(uint) MSL_MM(ushort) MSL_MM(uchar) MSL_MM(ulong) MSL_MM(ullong_) MSL_MM(bool)
#undef MSL_MM
        inline float max(float a, float b) {
  return ::fmaxf(a, b);
}
inline float min(float a, float b) { return ::fminf(a, b); }
inline half max(half a, half b) { return (half)::fmaxf(a, b); }
inline half min(half a, half b) { return (half)::fminf(a, b); }
inline bfloat max(bfloat a, bfloat b) { return bfloat(::fmaxf(a, b)); }
inline bfloat min(bfloat a, bfloat b) { return bfloat(::fminf(a, b)); }
inline float clamp(float x, float a, float b) { return ::fminf(::fmaxf(x, a), b); }
inline half clamp(half x, half a, half b) { return min(max(x, a), b); }
inline float abs(float a) { return ::fabsf(a); }
inline half abs(half a) { return (half)::fabsf((float)a); }
inline bfloat abs(bfloat a) { return bfloat(::fabsf((float)a)); }
template <class T, int N>
inline vec<T, N> max(vec<T, N> v, vec<T, N> w) {
  for (int i = 0; i < N; i++) v.d[i] = max(v.d[i], w.d[i]);
  return v;
}
template <class T, int N>
inline vec<T, N> min(vec<T, N> v, vec<T, N> w) {
  for (int i = 0; i < N; i++) v.d[i] = min(v.d[i], w.d[i]);
  return v;
}
template <class T, int N>
inline vec<T, N> abs(vec<T, N> v) {
  for (int i = 0; i < N; i++) v.d[i] = abs(v.d[i]);
  return v;
}
inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return (half)::fmaf(a, b, c); }
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return a;
}
inline float mix(float a, float b, float t) { return a + (b - a) * t; }
inline float ldexp(float x, int k) { return ::ldexpf(x, k); }
inline bool isnan(float x) { return x != x; }
inline bool isnan(half x) { return x != x; }
inline bool isnan(bfloat x) { return isnan((float)x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(half x) { return __builtin_isinf((float)x); }
inline bool isinf(bfloat x) { return __builtin_isinf((float)x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++)
    if (c.d[i]) a.d[i] = b.d[i];
  return a;
}
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline int popcount(int x) { return __builtin_popcount((uint)x); }
inline ulong popcount(ulong x) { return __builtin_popcountl(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline ulong ctz(ulong x) { return x ? __builtin_ctzl(x) : 64; }
inline uint reverse_bits(uint x) {
  uint r = 0;
  for (int i = 0; i < 32; i++) r |= ((x >> i) & 1u) << (31 - i);
  return r;
}
inline uint extract_bits(uint x, uint off, uint n) {
  return n ? (x >> off) & (n >= 32 ? ~0u : ((1u << n) - 1)) : 0;
}
inline int extract_bits(int x, uint off, uint n) {
  return n ? (int)((uint)x << (32 - off - n)) >> (32 - n) : 0;
}
inline uint rotate(uint x, uint k) {
  k &= 31;
  return k ? (x << k) | (x >> (32 - k)) : x;
}
inline uint mulhi(uint a, uint b) { return ((uint64_t)a * b) >> 32; }
}  // namespace metal
