// Stand-in for the text MLX prepends to every custom kernel
// (mlx/backend/metal/kernels/utils.h), minus complex numbers.
typedef bfloat bfloat16_t;
typedef half float16_t;
inline uint16_t bfloat16_to_uint16(const bfloat16_t x) { return as_type<uint16_t>(x); }
inline bfloat16_t uint16_to_bfloat16(const uint16_t x) { return as_type<bfloat16_t>(x); }
template <typename U>
struct Limits {
  static constexpr U max = metal::numeric_limits<U>::max();
  static constexpr U min = metal::numeric_limits<U>::min();
  static constexpr U finite_max = metal::numeric_limits<U>::max();
  static constexpr U finite_min = metal::numeric_limits<U>::min();
};
#define MSL_FL(t)                                                          \
  template <>                                                              \
  struct Limits<t> {                                                       \
    static inline const t max = metal::numeric_limits<t>::infinity();      \
    static inline const t min = -metal::numeric_limits<t>::infinity();     \
    static inline const t finite_max = metal::numeric_limits<t>::max();    \
    static inline const t finite_min = metal::numeric_limits<t>::lowest(); \
  };
MSL_FL(float)
MSL_FL(half) MSL_FL(bfloat)
#define MLX_MTL_PRAGMA_UNROLL
    // Offset of a flat element number (or of a 3-D grid position) in a strided array; same contract
    // as MLX's helper.
    template <typename IdxT = int64_t>
    METAL_FUNC IdxT elem_to_loc(IdxT number, const int* extents, const int64_t* steps, int rank) {
  IdxT offset = 0;
  while (rank-- > 0) {
    const IdxT quotient = number / IdxT(extents[rank]);
    offset += (number - quotient * IdxT(extents[rank])) * IdxT(steps[rank]);
    number = quotient;
  }
  return offset;
}
template <typename IdxT = int64_t>
METAL_FUNC IdxT elem_to_loc(uint3 cell, const int* extents, const int64_t* steps, int rank) {
  const IdxT inner = IdxT(cell.x) * IdxT(steps[rank - 1]) + IdxT(cell.y) * IdxT(steps[rank - 2]);
  return inner + elem_to_loc<IdxT>(IdxT(cell.z), extents, steps, rank - 2);
}
template <typename T, typename U>
inline T ceildiv(T N, U M) {
  return (N + M - 1) / M;
}
inline float log1p(float x) { return ::log1pf(x); }
