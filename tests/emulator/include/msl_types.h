// MSL's scalar and vector types, as C++20. `half` is the compiler's; `bfloat` converts only where
// Metal lets it, so that an implicit float -> bfloat does not compile here either.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

// ---------------------------------------------------------------- half/bfloat
typedef _Float16 half;

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  static uint16_t rne(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 0x40;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  // MSL 3.1: neither float nor half converts implicitly to bfloat.
  explicit bfloat(float f) : bits(rne(f)) {}
  explicit bfloat(double f) : bits(rne((float)f)) {}
  explicit bfloat(half f) : bits(rne((float)f)) {}
  // integers are accepted by Apple's compiler in initialisation from constants
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>
  explicit bfloat(I i) : bits(rne((float)i)) {}
  operator float() const {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  bfloat& operator+=(bfloat o) { return *this = bfloat((float)*this + (float)o); }
  bfloat& operator-=(bfloat o) { return *this = bfloat((float)*this - (float)o); }
  bfloat& operator*=(bfloat o) { return *this = bfloat((float)*this * (float)o); }
  bfloat& operator/=(bfloat o) { return *this = bfloat((float)*this / (float)o); }
};
#define MSL_BF_OP(op)                                                                    \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); } \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                    \
  inline bfloat operator op(bfloat a, I b) {                                             \
    return bfloat((float)a op(float) b);                                                 \
  }                                                                                      \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>, class = void>      \
  inline bfloat operator op(I a, bfloat b) {                                             \
    return bfloat((float)a op(float) b);                                                 \
  }
MSL_BF_OP(+)
MSL_BF_OP(-) MSL_BF_OP(*) MSL_BF_OP(/)
#undef MSL_BF_OP
    inline bfloat operator-(bfloat a) {
  a.bits ^= 0x8000;
  return a;
}
inline half operator""h(long double v) { return (half)v; }
inline half operator""h(unsigned long long v) { return (half)v; }
inline bfloat operator"" bf(long double v) { return bfloat((float)v); }

// ---------------------------------------------------------------- vectors
namespace metal {
template <class T, int N>
struct vec;
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    T d[2];
  };
  vec() = default;
  vec(T a) : d{a, a} {}
  vec(T a, T b) : d{a, b} {}
  template <class U>
  explicit vec(vec<U, 2> o) : d{T(o.d[0]), T(o.d[1])} {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    vec<T, 2> xy;
    T d[3];
  };
  vec() = default;
  vec(T a) : d{a, a, a} {}
  vec(T a, T b_, T c) : d{a, b_, c} {}
  vec(vec<T, 2> a, T c) : d{a.x, a.y, c} {}
  template <class U>
  explicit vec(vec<U, 3> o) : d{T(o.d[0]), T(o.d[1]), T(o.d[2])} {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    struct {
      vec<T, 2> xy, zw;
    };
    struct {
      vec<T, 2> lo, hi;
    };
    T d[4];
  };
  vec() = default;
  vec(T s) : d{s, s, s, s} {}
  vec(T a_, T b_, T c, T e) : d{a_, b_, c, e} {}
  vec(vec<T, 2> p, vec<T, 2> q) : d{p.x, p.y, q.x, q.y} {}
  vec(vec<T, 2> p, T c, T e) : d{p.x, p.y, c, e} {}
  vec(vec<T, 3> p, T e) : d{p.x, p.y, p.z, e} {}
  template <class U>
  explicit vec(vec<U, 4> o) : d{T(o.d[0]), T(o.d[1]), T(o.d[2]), T(o.d[3])} {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};
template <class T, int N>
using packed_vec_t = vec<T, N>;
#define MSL_VOP(op)                                                                       \
  template <class T, int N>                                                               \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                                \
    vec<T, N> r;                                                                          \
    for (int i = 0; i < N; i++) r.d[i] = T(a.d[i] op b.d[i]);                             \
    return r;                                                                             \
  }                                                                                       \
  template <class T, int N, class S,                                                      \
            class = std::enable_if_t<std::is_arithmetic_v<S> || std::is_same_v<S, half>>> \
  inline vec<T, N> operator op(vec<T, N> a, S b) {                                        \
    return a op vec<T, N>(T(b));                                                          \
  }                                                                                       \
  template <class T, int N, class S,                                                      \
            class = std::enable_if_t<std::is_arithmetic_v<S> || std::is_same_v<S, half>>> \
  inline vec<T, N> operator op(S a, vec<T, N> b) {                                        \
    return vec<T, N>(T(a)) op b;                                                          \
  }                                                                                       \
  template <class T, int N>                                                               \
  inline vec<T, N>& operator op## = (vec<T, N> & a, vec<T, N> b) {                        \
    return a = a op b;                                                                    \
  }                                                                                       \
  template <class T, int N, class S,                                                      \
            class = std::enable_if_t<std::is_arithmetic_v<S> || std::is_same_v<S, half>>> \
  inline vec<T, N>& operator op## = (vec<T, N> & a, S b) {                                \
    return a = a op vec<T, N>(T(b));                                                      \
  }
MSL_VOP(+)
MSL_VOP(-) MSL_VOP(*) MSL_VOP(/) MSL_VOP(%) MSL_VOP(&) MSL_VOP(|) MSL_VOP(^) MSL_VOP(<<) MSL_VOP(>>)
#undef MSL_VOP
#define MSL_VCMP(op)                                          \
  template <class T, int N>                                   \
  inline vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) { \
    vec<bool, N> r;                                           \
    for (int i = 0; i < N; i++) r.d[i] = a.d[i] op b.d[i];    \
    return r;                                                 \
  }                                                           \
  template <class T, int N>                                   \
  inline vec<bool, N> operator op(vec<T, N> a, T b) {         \
    return a op vec<T, N>(b);                                 \
  }
    MSL_VCMP(<) MSL_VCMP(>) MSL_VCMP(<=) MSL_VCMP(>=) MSL_VCMP(==) MSL_VCMP(!=)
#undef MSL_VCMP
        template <class T, int N>
        inline vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.d[i] = -a.d[i];
  return a;
}
template <class T, int N>
inline vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.d[i] = ~a.d[i];
  return a;
}
template <int N>
inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a.d[i];
  return r;
}
template <int N>
inline bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a.d[i];
  return r;
}
inline bool any(bool b) { return b; }
inline bool all(bool b) { return b; }
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T r = a.d[0] * b.d[0];
  for (int i = 1; i < N; i++) r = T(r + a.d[i] * b.d[i]);
  return r;
}
template <class T, int N>
inline T length(vec<T, N> a) {
  return T(std::sqrt((float)dot(a, a)));
}

#define MSL_VT(t, n)               \
  typedef vec<t, 2> n##2;          \
  typedef vec<t, 3> n##3;          \
  typedef vec<t, 4> n##4;          \
  typedef vec<t, 2> packed_##n##2; \
  typedef vec<t, 4> packed_##n##4;
MSL_VT(float, float)
MSL_VT(half, half) MSL_VT(bfloat, bfloat) MSL_VT(int, int) MSL_VT(uint, uint) MSL_VT(short, short)
    MSL_VT(ushort, ushort) MSL_VT(char, char) MSL_VT(uchar, uchar) MSL_VT(long, long)
        MSL_VT(ulong, ulong) MSL_VT(bool, bool)
#undef MSL_VT
}  // namespace metal
