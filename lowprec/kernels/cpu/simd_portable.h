// Portable primitives: 4 lanes, in the compiler's own vector types (SSE2, NEON, ... whatever the machine has at
// least). See simd_avx512.h.
#pragma once
#include <cstring>

#include "job.h"

namespace lowprec::LOWPREC_ISA {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

static LOWPREC_INLINE F splat(float v) { return F{v, v, v, v}; }
static LOWPREC_INLINE I splat(int32_t v) { return I{v, v, v, v}; }
static LOWPREC_INLINE I lane_index() { return I{0, 1, 2, 3}; }

static LOWPREC_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static LOWPREC_INLINE I load(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static LOWPREC_INLINE F load(const Bf16* p) { return (F)(I{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16); }
static LOWPREC_INLINE I load_bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
static LOWPREC_INLINE I load_nibbles(const uint8_t* p) { return I{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}; }
static LOWPREC_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
static LOWPREC_INLINE void store_bytes(uint8_t* p, I v) {
  for (int i = 0; i < kLanes; i++) p[i] = (uint8_t)v[i];
}
static LOWPREC_INLINE void store_nibbles(uint8_t* p, I v) {  // lane 2i in the low nibble of byte i
  p[0] = (uint8_t)(v[0] | v[1] << 4);
  p[1] = (uint8_t)(v[2] | v[3] << 4);
}
static LOWPREC_INLINE void load_nibbles(const uint8_t* p, I* v) {  // v[0] and v[1], neighbours
  v[0] = load_nibbles(p), v[1] = load_nibbles(p + kLanes / 2);
}
static LOWPREC_INLINE void store_nibbles(uint8_t* p, const I* v) { store_nibbles(p, v[0]), store_nibbles(p + kLanes / 2, v[1]); }
static LOWPREC_INLINE void store_pair(float* p, F a, F b) { store(p, a), store(p + 4, b); }
static LOWPREC_INLINE void store_pair(Bf16* p, F a, F b) {  // high halves: the caller has rounded
  for (int i = 0; i < kLanes; i++) {
    p[i].bits = (uint16_t)((U)a >> 16)[i];
    p[i + kLanes].bits = (uint16_t)((U)b >> 16)[i];
  }
}

// max(a, b) and min(a, b) are b when either is NaN.
static LOWPREC_INLINE F max(F a, F b) { return a > b ? a : b; }
static LOWPREC_INLINE F min(F a, F b) { return a < b ? a : b; }
static LOWPREC_INLINE I max(I a, I b) { return a > b ? a : b; }
static LOWPREC_INLINE I min(I a, I b) { return a < b ? a : b; }
static LOWPREC_INLINE I truncate(F v) { return __builtin_convertvector(v, I); }
static LOWPREC_INLINE F multiply_add(F a, F b, F c) { return a * b + c; }
// floor(t / step) * step: adding magic = 2^23 steps leaves whole steps, rounded to nearest.
static LOWPREC_INLINE F floor_steps(F t, F magic, F step) {
  const F rounded = (t + magic) - magic;
  return rounded > t ? rounded - step : rounded;
}
static LOWPREC_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
static LOWPREC_INLINE I shift_right(I v, int n) { return (I)((U)v >> n); }
static LOWPREC_INLINE I shift_left(I v, int n) { return v << n; }
static LOWPREC_INLINE bool all(I mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }
static LOWPREC_INLINE int32_t reduce_max(I v) {
  int32_t m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}

template <int H>
static LOWPREC_INLINE F swap(F v) {  // lane i takes lane i ^ H
  return F{v[0 ^ H], v[1 ^ H], v[2 ^ H], v[3 ^ H]};
}

static LOWPREC_INLINE I lane_max(const I* v) {  // lane i takes the maximum of v[i]
  return I{reduce_max(v[0]), reduce_max(v[1]), reduce_max(v[2]), reduce_max(v[3])};
}

// 2 kLanes BF16 magnitudes side by side, maxima of such, and of the two in each lane (as FP32 bits).
typedef int16_t Halves __attribute__((vector_size(16)));
static LOWPREC_INLINE I load_magnitudes(const Bf16* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v & splat(0x7fff7fff);
}
static LOWPREC_INLINE I max_halves(I a, I b) { return (I)((Halves)a > (Halves)b ? (Halves)a : (Halves)b); }
static LOWPREC_INLINE I pair_max(I v) {
  const I even = v << 16, odd = v & splat((int32_t)0xffff0000u);  // not a 16-bit shift: byte order stays out of it
  return max(even, odd);
}
I lane_max_of_halves(const I* v);  // of blocks of kLanes: there are none that short, so it has no body

// Products 32 x 32 -> 64 bits of the low halves of 64-bit lanes; and the parts of even and odd lanes together.
typedef uint64_t Wide __attribute__((vector_size(16)));
static LOWPREC_INLINE I multiply_low(I a, uint32_t b) { return (I)(((Wide)a & 0xffffffffu) * (uint64_t)b); }
static LOWPREC_INLINE I high_word(I v) { return (I)((Wide)v >> 32); }
static LOWPREC_INLINE I join(I even, I odd) { return (I)(((Wide)even & 0xffffffffu) | (Wide)odd << 32); }

static LOWPREC_INLINE void store_by_lane(uint8_t* p, const I* w) {  // 16 bytes a lane: words w[0] .. w[3] of that lane
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < 4; j++)
      for (int byte = 0; byte < 4; byte++) p[16 * i + 4 * j + byte] = (uint8_t)((uint32_t)w[j][i] >> (8 * byte));
}

static LOWPREC_INLINE F square_root(F v) {
  return F{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
}

// 8 numbers, looked up by lanes of 0 .. 7; 16 numbers by lanes of 0 .. 15.
struct Table16 {
  const float* all;
  explicit Table16(const float* p) : all(p) {}
  LOWPREC_INLINE F operator[](I i) const { return F{all[i[0]], all[i[1]], all[i[2]], all[i[3]]}; }
};
typedef Table16 Table8;

}  // namespace lowprec::LOWPREC_ISA
