// Metal's library as declarations only, for clang: address spaces are real here and nothing runs.
#pragma once
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;
inline half operator""h(long double);
inline bfloat operator""bf(long double);

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define VECTORS(type)      \
  typedef vec<type, 2> type##2; \
  typedef vec<type, 3> type##3; \
  typedef vec<type, 4> type##4;
VECTORS(float) VECTORS(half) VECTORS(bfloat) VECTORS(int) VECTORS(uint) VECTORS(short)
VECTORS(ushort) VECTORS(char) VECTORS(uchar) VECTORS(long) VECTORS(ulong)
#undef VECTORS

template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y>
struct conditional {
  typedef X type;
};
template <class X, class Y>
struct conditional<false, X, Y> {
  typedef Y type;
};
template <bool B, class X, class Y>
using conditional_t = typename conditional<B, X, Y>::type;
template <class T>
struct numeric_limits {
  static constexpr T max();
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T infinity();
};
template <class To, class From>
To as_type(From);

#define UNARY(name)   \
  float name(float);  \
  half name(half);    \
  bfloat name(bfloat);
#define BINARY(name)         \
  float name(float, float);  \
  half name(half, half);     \
  bfloat name(bfloat, bfloat);
#define FUNCTIONS                                                                             \
  UNARY(exp) UNARY(exp2) UNARY(exp10) UNARY(log) UNARY(log2) UNARY(log10) UNARY(sqrt)         \
  UNARY(rsqrt) UNARY(sin) UNARY(cos) UNARY(tan) UNARY(asin) UNARY(acos) UNARY(atan)           \
  UNARY(sinh) UNARY(cosh) UNARY(tanh) UNARY(floor) UNARY(ceil) UNARY(rint) UNARY(round)       \
  UNARY(trunc) UNARY(fabs) UNARY(fract) UNARY(sign) UNARY(saturate) BINARY(pow) BINARY(fmod)  \
  BINARY(fmax) BINARY(fmin) BINARY(atan2) BINARY(divide)
FUNCTIONS
namespace precise {
FUNCTIONS
}
namespace fast {
FUNCTIONS
}
#define COMPARISONS(type)       \
  type max(type, type);         \
  type min(type, type);         \
  type clamp(type, type, type); \
  type abs(type);
COMPARISONS(int) COMPARISONS(uint) COMPARISONS(short) COMPARISONS(ushort) COMPARISONS(char)
COMPARISONS(uchar) COMPARISONS(long) COMPARISONS(ulong) COMPARISONS(float) COMPARISONS(half)
COMPARISONS(bfloat)
#undef COMPARISONS
float fma(float, float, float);
half fma(half, half, half);
bool isnan(float);
bool isnan(half);
bool isinf(float);
bool isinf(half);
template <class T>
T select(T, T, bool);
uint popcount(uint);
int popcount(int);
ulong popcount(ulong);
uint clz(uint);
uint ctz(uint);
ulong ctz(ulong);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define ONE(name)   \
  template <class T> \
  T name(T);
ONE(simd_sum) ONE(simd_product) ONE(simd_max) ONE(simd_min) ONE(simd_and) ONE(simd_or)
ONE(simd_xor) ONE(simd_prefix_inclusive_sum) ONE(simd_prefix_exclusive_sum)
ONE(simd_broadcast_first) ONE(quad_sum) ONE(quad_max)
#undef ONE
#define BY(name)     \
  template <class T> \
  T name(T, ushort);
BY(simd_broadcast) BY(simd_shuffle) BY(simd_shuffle_xor) BY(simd_shuffle_down)
BY(simd_shuffle_up) BY(simd_shuffle_rotate_down) BY(simd_shuffle_rotate_up) BY(quad_shuffle_xor)
#undef BY
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  explicit operator vote_t() const;
  bool any() const;
  bool all() const;
};
simd_vote simd_ballot(bool);

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  typedef vec<T, 2> storage_type;
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  storage_type& thread_elements();
  const storage_type& thread_elements() const;
};
template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
#define TRANSFER(space)                                                                          \
  template <class T>                                                                             \
  void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, ulong2 = 0,         \
                      bool = false);                                                             \
  template <class T>                                                                             \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = 0, bool = false);
TRANSFER(device) TRANSFER(threadgroup)
#undef TRANSFER
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                        simdgroup_matrix<B, 8, 8>);

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define ATOMICS(space)                                                                  \
  template <class T>                                                                    \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                \
  template <class T, class U>                                                           \
  void atomic_store_explicit(volatile space atomic<T>*, U, memory_order);               \
  template <class T, class U>                                                           \
  T atomic_fetch_add_explicit(volatile space atomic<T>*, U, memory_order);              \
  template <class T, class U>                                                           \
  T atomic_fetch_max_explicit(volatile space atomic<T>*, U, memory_order);              \
  template <class T, class U>                                                           \
  T atomic_fetch_min_explicit(volatile space atomic<T>*, U, memory_order);              \
  template <class T, class U>                                                           \
  T atomic_fetch_or_explicit(volatile space atomic<T>*, U, memory_order);
ATOMICS(device) ATOMICS(threadgroup)
#undef ATOMICS

}  // namespace metal
using namespace metal;

// The helpers that MLX puts before every kernel.
template <class U>
struct Limits {
  static const constant U max, min, finite_max, finite_min;
};
template <typename IdxT = int64_t>
IdxT elem_to_loc(IdxT element, constant const int* shape, constant const int64_t* strides, int ndim);
template <typename T, typename U>
inline T ceildiv(T number, U by) {
  return (number + by - 1) / by;
}
