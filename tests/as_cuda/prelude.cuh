// The words of Metal that the kernels use, in CUDA. A simdgroup is a warp of 32 lanes.

#define device
#define thread
#define constant
#define threadgroup
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

typedef unsigned int uint;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;

// Types of 16 bits, which compute in float32.
struct float16_t {
  unsigned short bits;
  float16_t() = default;
  explicit float16_t(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

struct bfloat16_t {
  unsigned short bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  operator float() const { return __uint_as_float(uint(bits) << 16); }
};

namespace metal {

namespace mem_flags {
constexpr int mem_threadgroup = 1;
constexpr int mem_device = 2;
}  // namespace mem_flags

inline void threadgroup_barrier(int) { __syncthreads(); }

namespace precise {
inline float exp(float x) { return expf(x); }
inline float exp2(float x) { return exp2f(x); }
inline float log(float x) { return logf(x); }
inline float cos(float x) { return cosf(x); }
inline float sin(float x) { return sinf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
}  // namespace precise

constexpr unsigned ALL = 0xffffffffu;

template <typename V>
inline V simd_shuffle_xor(V value, int other) {
  return __shfl_xor_sync(ALL, value, other);
}

#define SIMD_JOIN(name, joined)                          \
  template <typename V>                                  \
  inline V name(V a) {                                   \
    for (int other = 16; other > 0; other /= 2) {        \
      const V b = simd_shuffle_xor(a, other);            \
      a = joined;                                        \
    }                                                    \
    return a;                                            \
  }
SIMD_JOIN(simd_sum, a + b)
SIMD_JOIN(simd_max, max(a, b))
SIMD_JOIN(simd_min, min(a, b))

inline bool simd_any(bool value) { return __any_sync(ALL, value); }

// An 8 x 8 matrix: each lane holds two neighbours of a row, where Metal's lanes hold them.
inline int matrix_row(int lane) { return ((lane >> 2) & 4) + ((lane >> 1) & 3); }
inline int matrix_column(int lane) { return ((lane >> 1) & 4) + (lane & 1) * 2; }
inline int matrix_lane(int row, int column) {
  return ((row & 3) << 1) | ((row & 4) << 2) | ((column & 4) << 1) | ((column >> 1) & 1);
}
inline int own_lane() {
  return int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) & 31;
}

template <typename V, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  V element[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(V value) : element{value, value} {}
  V* thread_elements() { return element; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, simdgroup_float8x8& a, simdgroup_float8x8& b, simdgroup_float8x8& c) {
  const int row = matrix_row(own_lane());
  const int column = matrix_column(own_lane());
  float sums[2] = {c.element[0], c.element[1]};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float left = __shfl_sync(ALL, a.element[k & 1], matrix_lane(row, k));
    const int from = matrix_lane(k, column);
    sums[0] = fmaf(left, __shfl_sync(ALL, b.element[0], from), sums[0]);
    sums[1] = fmaf(left, __shfl_sync(ALL, b.element[1], from), sums[1]);
  }
  d.element[0] = sums[0];
  d.element[1] = sums[1];
}

template <typename V>
inline void simdgroup_load(simdgroup_float8x8& m, const V* from, int stride) {
  const V* place = from + matrix_row(own_lane()) * stride + matrix_column(own_lane());
  m.element[0] = place[0];
  m.element[1] = place[1];
}

template <typename V>
inline void simdgroup_store(simdgroup_float8x8& m, V* to, int stride) {
  V* place = to + matrix_row(own_lane()) * stride + matrix_column(own_lane());
  place[0] = m.element[0];
  place[1] = m.element[1];
}

}  // namespace metal
