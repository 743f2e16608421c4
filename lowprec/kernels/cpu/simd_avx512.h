// AVX-512 (F, BW, DQ, VL) primitives: 16 lanes.
//
// Arithmetic uses the compiler's vector types, so that kernels read as formulas; only what those types cannot
// express is an intrinsic. The three simd_*.h files offer the same names; which one a translation unit
// includes decides its instruction set. AVX512_BF16 is not used: its conversions flush subnormals.
#pragma once
#include <immintrin.h>

#include "job.h"

namespace lowprec::LOWPREC_ISA {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

static LOWPREC_INLINE F splat(float v) { return (F)_mm512_set1_ps(v); }
static LOWPREC_INLINE I splat(int32_t v) { return (I)_mm512_set1_epi32(v); }
static LOWPREC_INLINE I lane_index() { return (I)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

static LOWPREC_INLINE F load(const float* p) { return (F)_mm512_loadu_ps(p); }
static LOWPREC_INLINE F load(const Bf16* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static LOWPREC_INLINE I load(const int32_t* p) { return (I)_mm512_loadu_si512(p); }
static LOWPREC_INLINE I load_bytes(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static LOWPREC_INLINE I load_nibbles(const uint8_t* p) {
  const __m128i two = _mm_loadl_epi64((const __m128i*)p), low = _mm_set1_epi8(0x0f);
  const __m128i one = _mm_unpacklo_epi8(_mm_and_si128(two, low), _mm_and_si128(_mm_srli_epi16(two, 4), low));
  return (I)_mm512_cvtepu8_epi32(one);
}
static LOWPREC_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, (__m512)v); }
static LOWPREC_INLINE void store_bytes(uint8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
static LOWPREC_INLINE void store_nibbles(uint8_t* p, I v) {  // lane 2i in the low nibble of byte i
  const __m512i both = _mm512_or_si512((__m512i)v, _mm512_srli_epi64((__m512i)v, 28));
  _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(both));
}
static LOWPREC_INLINE void load_nibbles(const uint8_t* p, I* v) {  // v[0] and v[1], neighbours
  v[0] = load_nibbles(p), v[1] = load_nibbles(p + kLanes / 2);
}
static LOWPREC_INLINE void store_nibbles(uint8_t* p, const I* v) { store_nibbles(p, v[0]), store_nibbles(p + kLanes / 2, v[1]); }
static LOWPREC_INLINE void store_pair(float* p, F a, F b) { store(p, a), store(p + 16, b); }
static LOWPREC_INLINE void store_pair(Bf16* p, F a, F b) {  // high halves: the caller has rounded
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                       21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, odd, (__m512i)b));
}

// max(a, b) and min(a, b) are b when either is NaN.
static LOWPREC_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
static LOWPREC_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
static LOWPREC_INLINE I max(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static LOWPREC_INLINE I min(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static LOWPREC_INLINE I truncate(F v) { return (I)_mm512_cvttps_epi32((__m512)v); }
static LOWPREC_INLINE F multiply_add(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// floor(t / step) * step: adding magic = 2^23 steps leaves whole steps.
static LOWPREC_INLINE F floor_steps(F t, F magic, F) {
  return (F)_mm512_add_round_ps((__m512)t, (__m512)magic, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC) - magic;
}
static LOWPREC_INLINE F to_float(I v) { return (F)_mm512_cvtepi32_ps((__m512i)v); }
static LOWPREC_INLINE I shift_right(I v, int n) { return (I)_mm512_srl_epi32((__m512i)v, _mm_cvtsi32_si128(n)); }
static LOWPREC_INLINE I shift_left(I v, int n) { return (I)_mm512_sll_epi32((__m512i)v, _mm_cvtsi32_si128(n)); }
static LOWPREC_INLINE bool all(I mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xffff; }
static LOWPREC_INLINE int32_t reduce_max(I v) { return _mm512_reduce_max_epi32((__m512i)v); }

template <int H>
static LOWPREC_INLINE F swap(F v) {  // lane i takes lane i ^ H
  return (F)_mm512_permutexvar_ps((__m512i)(lane_index() ^ H), (__m512)v);
}

static LOWPREC_INLINE I lane_max(const I* v) {  // lane i takes the maximum of v[i]: a transposition that keeps maxima
  __m512i a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    const __m512i x = (__m512i)v[2 * i], y = (__m512i)v[2 * i + 1];
    a[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  }
  for (int i = 0; i < 4; i++) {
    const __m512i x = a[2 * i], y = a[2 * i + 1];
    b[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  for (int i = 0; i < 2; i++) {
    const __m512i x = b[2 * i], y = b[2 * i + 1];
    c[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD));
  }
  return (I)_mm512_max_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xDD));
}

// 2 kLanes BF16 magnitudes side by side, maxima of such, and of the two in each lane (as FP32 bits).
static LOWPREC_INLINE I load_magnitudes(const Bf16* p) {
  return (I)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
}
static LOWPREC_INLINE I max_halves(I a, I b) { return (I)_mm512_max_epu16((__m512i)a, (__m512i)b); }
static LOWPREC_INLINE I pair_max(I v) { return max_halves(v, v << 16) & splat((int32_t)0xffff0000u); }

// lane_max of blocks of kLanes BF16 magnitudes, two in each of v[0] .. v[7].
static LOWPREC_INLINE I lane_max_of_halves(const I* v) {
  __m512i a[4], b[2];
  for (int i = 0; i < 4; i++) {  // 128-bit lanes: the blocks of v[2i], v[2i + 1]
    const __m512i x = (__m512i)max_halves(v[2 * i], v[2 * i] << 16), y = (__m512i)max_halves(v[2 * i + 1], v[2 * i + 1] << 16);
    a[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD));
  }
  for (int i = 0; i < 2; i++)
    b[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
  const __m512i c = _mm512_max_epi32(_mm512_unpacklo_epi64(b[0], b[1]), _mm512_unpackhi_epi64(b[0], b[1]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (I)_mm512_permutexvar_epi32(order, c) & splat((int32_t)0xffff0000u);
}

// Products 32 x 32 -> 64 bits of the low halves of 64-bit lanes; and the parts of even and odd lanes together.
static LOWPREC_INLINE I multiply_low(I a, uint32_t b) { return (I)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)b)); }
static LOWPREC_INLINE I high_word(I v) { return (I)_mm512_srli_epi64((__m512i)v, 32); }
static LOWPREC_INLINE I join(I even, I odd) {
  return (I)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, _mm512_slli_epi64((__m512i)odd, 32));
}

static LOWPREC_INLINE void store_by_lane(uint8_t* p, const I* w) {  // 16 bytes a lane: words w[0] .. w[3] of that lane
  const __m512i a = _mm512_unpacklo_epi32((__m512i)w[0], (__m512i)w[1]), b = _mm512_unpackhi_epi32((__m512i)w[0], (__m512i)w[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)w[2], (__m512i)w[3]), d = _mm512_unpackhi_epi32((__m512i)w[2], (__m512i)w[3]);
  const __m512i s[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                        _mm512_unpackhi_epi64(b, d)};  // s[j]: lanes j, 4 + j, 8 + j, 12 + j
  const __m512i t0 = _mm512_shuffle_i32x4(s[0], s[1], 0x44), t1 = _mm512_shuffle_i32x4(s[0], s[1], 0xEE);
  const __m512i t2 = _mm512_shuffle_i32x4(s[2], s[3], 0x44), t3 = _mm512_shuffle_i32x4(s[2], s[3], 0xEE);
  _mm512_storeu_si512(p, _mm512_shuffle_i32x4(t0, t2, 0x88)), _mm512_storeu_si512(p + 64, _mm512_shuffle_i32x4(t0, t2, 0xDD));
  _mm512_storeu_si512(p + 128, _mm512_shuffle_i32x4(t1, t3, 0x88));
  _mm512_storeu_si512(p + 192, _mm512_shuffle_i32x4(t1, t3, 0xDD));
}

static LOWPREC_INLINE F square_root(F v) { return (F)_mm512_sqrt_ps((__m512)v); }

// 8 numbers, looked up by lanes of 0 .. 7; 16 numbers by lanes of 0 .. 15.
struct Table16 {
  F all;
  explicit Table16(const float* p) : all(load(p)) {}
  LOWPREC_INLINE F operator[](I index) const { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)all); }
};
struct Table8 {
  F all;
  explicit Table8(const float* p) : all((F)_mm512_castps256_ps512(_mm256_loadu_ps(p))) {}
  LOWPREC_INLINE F operator[](I index) const { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)all); }
};

}  // namespace lowprec::LOWPREC_ISA
