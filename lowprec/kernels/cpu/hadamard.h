// Random Hadamard rotation of groups of H along the quantization axis: x' = x diag(signs) H_H / sqrt(H).
//
// FP32 sums round, so the order of operations is part of the definition (lowprec/hadamard.py): signs / sqrt(H)
// first, then butterflies from the nearest to the farthest partner, then one rounding to the input's dtype.
#pragma once

namespace lowprec::LOWPREC_ISA {

static LOWPREC_INLINE void store_pair_as(float* out, F a, F b) { store_pair(out, a, b); }
static LOWPREC_INLINE void store_pair_as(Bf16* out, F a, F b) { store_pair(out, round_number_to_bf16(a), round_number_to_bf16(b)); }

// One butterfly of neighbours h lanes apart, within a vector.
template <int h>
static LOWPREC_INLINE F butterfly(F v) {
  const I second = (lane_index() & splat(h)) != 0;
  return swap<h>(v) + (F)((I)v ^ (second & splat((int32_t)0x80000000u)));
}

// Stages between vectors `stride` = 1, 2, ... of `count`.
template <int kCount>
static LOWPREC_INLINE void butterflies(F* v) {
#pragma GCC unroll 4
  for (int h = 1; h < kCount; h *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++)
      if (!(i & h)) {
        const F a = v[i], b = v[i + h];
        v[i] = a + b, v[i + h] = a - b;
      }
}

template <int H, class In>
static inline void rotate_columns_of(const Job& job, Rows<const In> x, int64_t rows, int64_t cols, In* out,
                                     int64_t ld_out) {
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    F v[2][H];
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 16
      for (int r = 0; r < H; r++)
        v[half][r] = (r < rows ? load(x[r] + c + half * kLanes) : splat(0.0f)) * splat(job.signs[r]);
      butterflies<H>(v[half]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < H; r++) store_pair_as(out + r * ld_out + c, v[0][r], v[1][r]);
  }
}

// Largest magnitude of the same numbers: rounding keeps the order, so only the maximum is rounded, by the caller.
template <int H, class In>
static inline I amax_rotated_of(const Job& job, Rows<const In> x, int64_t rows, int64_t cols, I most) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    F v[H];
#pragma GCC unroll 16
    for (int r = 0; r < H; r++) v[r] = (r < rows ? load(x[r] + c) : splat(0.0f)) * splat(job.signs[r]);
    butterflies<H>(v);
#pragma GCC unroll 16
    for (int r = 0; r < H; r++) most = amax_with_nan(v[r], most);
  }
  return most;
}

template <int H, class In>
static inline void rotate_row_of(const Job& job, const In* x, int64_t cols, In* out) {
  constexpr int kVectors = H > 2 * kLanes ? H / kLanes : 2;  // at least a pair, for the store
  for (int64_t c = 0; c < cols; c += kVectors * kLanes) {
    F v[kVectors];
    for (int i = 0; i < kVectors; i++) {
      float signs[kLanes];
      for (int lane = 0; lane < kLanes; lane++) signs[lane] = job.signs[(i * kLanes + lane) % H];
      v[i] = load(x + c + i * kLanes) * load(signs);
      if constexpr (H > 1 && kLanes > 1) v[i] = butterfly<1>(v[i]);
      if constexpr (H > 2 && kLanes > 2) v[i] = butterfly<2>(v[i]);
      if constexpr (H > 4 && kLanes > 4) v[i] = butterfly<4>(v[i]);
      if constexpr (H > 8 && kLanes > 8) v[i] = butterfly<8>(v[i]);
    }
    constexpr int kGroup = H > kLanes ? H / kLanes : 1;
    for (int i = 0; i < kVectors; i += kGroup) butterflies<kGroup>(v + i);
    for (int i = 0; i < kVectors; i += 2)
      store_pair_as(out + c + i * kLanes, v[i], v[i + 1]);
  }
}

// x [rows, cols] -> out [H, cols], rows below `rows` read as zero; cols a multiple of 2 kLanes.
template <class In>
static void rotate_columns(const Job& job, Rows<const In> x, int64_t rows, int64_t cols, In* out, int64_t ld_out) {
  switch (job.hadamard) {
    case 2: return rotate_columns_of<2>(job, x, rows, cols, out, ld_out);
    case 4: return rotate_columns_of<4>(job, x, rows, cols, out, ld_out);
    case 8: return rotate_columns_of<8>(job, x, rows, cols, out, ld_out);
    case 16: return rotate_columns_of<16>(job, x, rows, cols, out, ld_out);
    case 32: return rotate_columns_of<32>(job, x, rows, cols, out, ld_out);
    case 64: return rotate_columns_of<64>(job, x, rows, cols, out, ld_out);
    default: return rotate_columns_of<128>(job, x, rows, cols, out, ld_out);
  }
}

template <class In>
static I amax_rotated_columns(const Job& job, Rows<const In> x, int64_t rows, int64_t cols, I most) {
  switch (job.hadamard) {
    case 2: return amax_rotated_of<2>(job, x, rows, cols, most);
    case 4: return amax_rotated_of<4>(job, x, rows, cols, most);
    case 8: return amax_rotated_of<8>(job, x, rows, cols, most);
    case 16: return amax_rotated_of<16>(job, x, rows, cols, most);
    case 32: return amax_rotated_of<32>(job, x, rows, cols, most);
    case 64: return amax_rotated_of<64>(job, x, rows, cols, most);
    default: return amax_rotated_of<128>(job, x, rows, cols, most);
  }
}

// x [cols] -> out [cols]; cols a multiple of H and of 2 kLanes.
template <class In>
static void rotate_row(const Job& job, const In* x, int64_t cols, In* out) {
  switch (job.hadamard) {
    case 2: return rotate_row_of<2>(job, x, cols, out);
    case 4: return rotate_row_of<4>(job, x, cols, out);
    case 8: return rotate_row_of<8>(job, x, cols, out);
    case 16: return rotate_row_of<16>(job, x, cols, out);
    case 32: return rotate_row_of<32>(job, x, cols, out);
    case 64: return rotate_row_of<64>(job, x, cols, out);
    default: return rotate_row_of<128>(job, x, cols, out);
  }
}

}  // namespace lowprec::LOWPREC_ISA
