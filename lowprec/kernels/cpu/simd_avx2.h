// AVX2 primitives: 8 lanes. See simd_avx512.h.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "job.h"

namespace lowprec::LOWPREC_ISA {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));

static LOWPREC_INLINE F splat(float v) { return (F)_mm256_set1_ps(v); }
static LOWPREC_INLINE I splat(int32_t v) { return (I)_mm256_set1_epi32(v); }
static LOWPREC_INLINE I lane_index() { return (I)_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

static LOWPREC_INLINE F load(const float* p) { return (F)_mm256_loadu_ps(p); }
static LOWPREC_INLINE F load(const Bf16* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static LOWPREC_INLINE I load(const int32_t* p) { return (I)_mm256_loadu_si256((const __m256i*)p); }
static LOWPREC_INLINE I load_bytes(const uint8_t* p) { return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static LOWPREC_INLINE I load_nibbles(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m128i two = _mm_cvtsi32_si128(four), low = _mm_set1_epi8(0x0f);
  const __m128i one = _mm_unpacklo_epi8(_mm_and_si128(two, low), _mm_and_si128(_mm_srli_epi16(two, 4), low));
  return (I)_mm256_cvtepu8_epi32(one);
}
static LOWPREC_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, (__m256)v); }
static LOWPREC_INLINE void store_bytes(uint8_t* p, I v) {
  const __m128i first = _mm_set1_epi32(0x0c080400);
  const __m256i s = _mm256_shuffle_epi8((__m256i)v, _mm256_broadcastsi128_si256(first));
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
}
static LOWPREC_INLINE void store_nibbles(uint8_t* p, I v) {  // lane 2i in the low nibble of byte i
  const __m256i both = _mm256_or_si256((__m256i)v, _mm256_srli_epi64((__m256i)v, 28));
  const __m256i s = _mm256_shuffle_epi8(both, _mm256_set1_epi16(0x0800));
  const int32_t four = _mm_cvtsi128_si32(_mm_unpacklo_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
  std::memcpy(p, &four, 4);
}
static LOWPREC_INLINE void load_nibbles(const uint8_t* p, I* v) {  // v[0] and v[1], neighbours
  const __m128i two = _mm_loadl_epi64((const __m128i*)p), low = _mm_set1_epi8(0x0f);
  const __m128i one = _mm_unpacklo_epi8(_mm_and_si128(two, low), _mm_and_si128(_mm_srli_epi16(two, 4), low));
  v[0] = (I)_mm256_cvtepu8_epi32(one), v[1] = (I)_mm256_cvtepu8_epi32(_mm_srli_si128(one, 8));
}
static LOWPREC_INLINE void store_nibbles(uint8_t* p, const I* v) {
  const __m256i s = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v[0], (__m256i)v[1]), 0xD8);
  const __m256i both = _mm256_madd_epi16(s, _mm256_set1_epi32(0x00100001));  // even + 16 odd
  const __m256i bytes = _mm256_shuffle_epi8(both, _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
static LOWPREC_INLINE void store_pair(float* p, F a, F b) { store(p, a), store(p + 8, b); }
static LOWPREC_INLINE void store_pair(Bf16* p, F a, F b) {  // high halves: the caller has rounded
  const __m256i s = _mm256_packus_epi32(_mm256_srli_epi32((__m256i)a, 16), _mm256_srli_epi32((__m256i)b, 16));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(s, 0xD8));
}

// max(a, b) and min(a, b) are b when either is NaN.
static LOWPREC_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
static LOWPREC_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
static LOWPREC_INLINE I max(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static LOWPREC_INLINE I min(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static LOWPREC_INLINE I truncate(F v) { return (I)_mm256_cvttps_epi32((__m256)v); }
static LOWPREC_INLINE F multiply_add(F a, F b, F c) { return a * b + c; }  // AVX2 alone has no fused one
// floor(t / step) * step: adding magic = 2^23 steps leaves whole steps, rounded to nearest.
static LOWPREC_INLINE F floor_steps(F t, F magic, F step) {
  const F rounded = (t + magic) - magic;
  return rounded > t ? rounded - step : rounded;
}
static LOWPREC_INLINE F to_float(I v) { return (F)_mm256_cvtepi32_ps((__m256i)v); }
static LOWPREC_INLINE I shift_right(I v, int n) { return (I)_mm256_srl_epi32((__m256i)v, _mm_cvtsi32_si128(n)); }
static LOWPREC_INLINE I shift_left(I v, int n) { return (I)_mm256_sll_epi32((__m256i)v, _mm_cvtsi32_si128(n)); }
static LOWPREC_INLINE bool all(I mask) { return _mm256_movemask_ps((__m256)mask) == 0xff; }
static LOWPREC_INLINE int32_t reduce_max(I v) {
  int32_t m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}

template <int H>
static LOWPREC_INLINE F swap(F v) {  // lane i takes lane i ^ H
  return (F)_mm256_permutevar8x32_ps((__m256)v, (__m256i)(lane_index() ^ H));
}

static LOWPREC_INLINE I lane_max(const I* v) {  // lane i takes the maximum of v[i]: a transposition that keeps maxima
  __m256i a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const __m256i x = (__m256i)v[2 * i], y = (__m256i)v[2 * i + 1];
    a[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
  }
  for (int i = 0; i < 2; i++) {
    const __m256i x = a[2 * i], y = a[2 * i + 1];
    b[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
  }
  return (I)_mm256_max_epi32(_mm256_permute2x128_si256(b[0], b[1], 0x20), _mm256_permute2x128_si256(b[0], b[1], 0x31));
}

// 2 kLanes BF16 magnitudes side by side, maxima of such, and of the two in each lane (as FP32 bits).
static LOWPREC_INLINE I load_magnitudes(const Bf16* p) {
  return (I)_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi16(0x7fff));
}
static LOWPREC_INLINE I max_halves(I a, I b) { return (I)_mm256_max_epu16((__m256i)a, (__m256i)b); }
static LOWPREC_INLINE I pair_max(I v) { return max_halves(v, v << 16) & splat((int32_t)0xffff0000u); }
I lane_max_of_halves(const I* v);  // of blocks of kLanes: there are none that short, so it has no body

// Products 32 x 32 -> 64 bits of the low halves of 64-bit lanes; and the parts of even and odd lanes together.
static LOWPREC_INLINE I multiply_low(I a, uint32_t b) { return (I)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b)); }
static LOWPREC_INLINE I high_word(I v) { return (I)_mm256_srli_epi64((__m256i)v, 32); }
static LOWPREC_INLINE I join(I even, I odd) {
  return (I)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
}

static LOWPREC_INLINE void store_by_lane(uint8_t* p, const I* w) {  // 16 bytes a lane: words w[0] .. w[3] of that lane
  const __m256i a = _mm256_unpacklo_epi32((__m256i)w[0], (__m256i)w[1]), b = _mm256_unpackhi_epi32((__m256i)w[0], (__m256i)w[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)w[2], (__m256i)w[3]), d = _mm256_unpackhi_epi32((__m256i)w[2], (__m256i)w[3]);
  const __m256i s[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                        _mm256_unpackhi_epi64(b, d)};  // s[j]: lanes j and 4 + j
  for (int i = 0; i < 2; i++) {
    _mm256_storeu_si256((__m256i*)(p + 32 * i), _mm256_permute2x128_si256(s[2 * i], s[2 * i + 1], 0x20));
    _mm256_storeu_si256((__m256i*)(p + 64 + 32 * i), _mm256_permute2x128_si256(s[2 * i], s[2 * i + 1], 0x31));
  }
}

static LOWPREC_INLINE F square_root(F v) { return (F)_mm256_sqrt_ps((__m256)v); }

// 8 numbers, looked up by lanes of 0 .. 7; 16 numbers by lanes of 0 .. 15.
struct Table8 {
  F all;
  explicit Table8(const float* p) : all(load(p)) {}
  LOWPREC_INLINE F operator[](I index) const { return (F)_mm256_permutevar8x32_ps((__m256)all, (__m256i)index); }
};
struct Table16 {
  Table8 low, high;
  explicit Table16(const float* p) : low(p), high(p + 8) {}
  LOWPREC_INLINE F operator[](I index) const {  // the blend goes by sign bits
    return (F)_mm256_blendv_ps((__m256)low[index], (__m256)high[index], (__m256)(index << 28));
  }
};

}  // namespace lowprec::LOWPREC_ISA
