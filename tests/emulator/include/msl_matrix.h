// 8 x 8 matrices that a simdgroup holds together, two neighbouring elements of a row in each lane.
// Which lane holds which is not documented by Apple; MLX's own kernels rely on the layout below.
#pragma once
#include "msl_simd.h"

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8 x 8 only");
  typedef vec<T, 2> storage_type;
  storage_type elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T value) {  // a diagonal matrix
    int row, column;
    place(row, column);
    elements.d[0] = row == column ? value : T(0);
    elements.d[1] = row == column + 1 ? value : T(0);
  }
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }

  // The row of this lane's elements and the column of the first.
  static void place(int& row, int& column) {
    int lane = emu::lane(), quad = lane / 4;
    row = (quad & 4) + (lane / 2) % 4;
    column = (quad & 2) * 2 + (lane % 2) * 2;
  }
  // The lane that holds an element; the inverse of `place`.
  static int owner(int row, int column) {
    return ((row & 4) << 2) + ((row & 3) << 1) + ((column & 4) << 1) + ((column >> 1) & 1);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> matrix;
  matrix.elements = vec<T, 2>(value);
  return matrix;
}

// All 32 lanes have to come.
inline void whole_simdgroup(const char* name, int line, int operation) {
  int nothing = 0;
  uint active;
  emu::exchange(&nothing, sizeof nothing, line, operation, &active);
  if (active != 0xffffffffu) emu::fail(name, line);
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong stride = 8,
                           ulong2 origin = ulong2(0), bool transpose = false, CALL_LINE) {
  whole_simdgroup("simdgroup_load with inactive lanes", line, LOAD);
  int row, column;
  matrix.place(row, column);
  for (int i = 0; i < 2; ++i) {
    ulong r = row, c = column + i;
    if (transpose) std::swap(r, c);
    matrix.elements.d[i] = from[(origin.y + r) * stride + origin.x + c];
  }
}

template <class T>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong stride = 8,
                            ulong2 origin = ulong2(0), bool transpose = false, CALL_LINE) {
  whole_simdgroup("simdgroup_store with inactive lanes", line, STORE);
  int row, column;
  matrix.place(row, column);
  for (int i = 0; i < 2; ++i) {
    ulong r = row, c = column + i;
    if (transpose) std::swap(r, c);
    to[(origin.y + r) * stride + origin.x + c] = matrix.elements.d[i];
  }
}

// d = a b + c, summed in float32 from k = 0 up.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<C, 8, 8>& c, CALL_LINE) {
  float mine[4] = {float(a.elements.d[0]), float(a.elements.d[1]), float(b.elements.d[0]),
                   float(b.elements.d[1])};
  uint active;
  const emu::Slot* slots = emu::exchange(mine, sizeof mine, line, MULTIPLY, &active);
  if (active != 0xffffffffu) emu::fail("simdgroup multiplication with inactive lanes", line);
  int row, column;
  d.place(row, column);
  float sums[2] = {float(c.elements.d[0]), float(c.elements.d[1])};
  for (int k = 0; k < 8; ++k) {
    const float* of_a = reinterpret_cast<const float*>(slots[d.owner(row, k)].bytes);
    const float* of_b = reinterpret_cast<const float*>(slots[d.owner(k, column)].bytes) + 2;
    sums[0] = ::fmaf(of_a[k & 1], of_b[0], sums[0]);
    sums[1] = ::fmaf(of_a[k & 1], of_b[1], sums[1]);
  }
  d.elements.d[0] = D(sums[0]);
  d.elements.d[1] = D(sums[1]);
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, CALL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), line);
}

}  // namespace metal
