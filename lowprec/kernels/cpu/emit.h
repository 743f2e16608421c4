// The innermost step: two vectors of neighbours are scaled, rounded and written, as values or as codes.
#pragma once

namespace lowprec::LOWPREC_ISA {

template <class T>
static LOWPREC_INLINE T* at(T* base, int64_t index) {  // index is even
  return base + index;
}
static LOWPREC_INLINE Code4* at(Code4* base, int64_t index) { return base + index / 2; }
static LOWPREC_INLINE const Code4* at(const Code4* base, int64_t index) { return base + index / 2; }

static LOWPREC_INLINE F random_floats(const uint8_t* bytes) { return to_float(load_bytes(bytes)); }

// kTwoLevel: -0 becomes 0 before rounding, as in lowprec/reference.py; a fused 0 does the same as long as no product is
// rounded to 0. Codes have only the careful form.
template <bool kStochastic, Care kCare, bool kTwoLevel>
struct Emit {
  Grid grid;  // a copy: its vectors stay in registers, whatever the kernel writes to

  static LOWPREC_INLINE F scaled(F x, F encode) {
    if (!kTwoLevel) return x * encode;
    return kCare == Care::kAll ? x * encode + splat(0.0f) : multiply_add(x, encode, splat(0.0f));
  }

  template <class Out>
  LOWPREC_INLINE void operator()(Out* out, const F x[2], const F encode[2], const F decode[2], const uint8_t* random) const {
    F y[2];
    for (int i = 0; i < 2; i++) {
      const F u = kStochastic ? random_floats(random + i * kLanes) : F{};
      y[i] = round_to_grid<kStochastic, kCare>(grid, scaled(x[i], encode[i]), u) * decode[i];
      if (kCare == Care::kAll && sizeof(Out) == 2) y[i] = round_to_bf16(y[i]);
    }
    store_pair(out, y[0], y[1]);
  }
  LOWPREC_INLINE I code(F x, F encode, const uint8_t* random) const {
    return code_on_grid<kStochastic>(grid, scaled(x, encode), kStochastic ? random_floats(random) : F{});
  }
  LOWPREC_INLINE void operator()(Code8* out, const F x[2], const F encode[2], const F*, const uint8_t* random) const {
    for (int i = 0; i < 2; i++) store_bytes(&out->bits + i * kLanes, code(x[i], encode[i], random + i * kLanes));
  }
  LOWPREC_INLINE void operator()(Code4* out, const F x[2], const F encode[2], const F*, const uint8_t* random) const {
    for (int i = 0; i < 2; i++) store_nibbles(&out->bits + i * kLanes / 2, code(x[i], encode[i], random + i * kLanes));
  }
};

// The same step for numbers that are rounded in place.
template <class Out>
static LOWPREC_INLINE void emit_in_place(Out* out, const RoundInPlace& round, const F x[2], const I smallest[2]) {
  store_pair(out, round(x[0], smallest[0]), round(x[1], smallest[1]));
}
static LOWPREC_INLINE void emit_in_place(Code8* out, const RoundInPlace& round, const F x[2], const I smallest[2]) {
  for (int i = 0; i < 2; i++) store_bytes(&out->bits + i * kLanes, round.code(x[i], smallest[i]));
}
static LOWPREC_INLINE void emit_in_place(Code4* out, const RoundInPlace& round, const F x[2], const I smallest[2]) {
  for (int i = 0; i < 2; i++) store_nibbles(&out->bits + i * kLanes / 2, round.code(x[i], smallest[i]));
}
// Calls run(emit) with the cheapest form that is right.
template <bool kStochastic, class Out, class Run>
static LOWPREC_INLINE void with_emit(const Grid& grid, Care care, bool two_level, const Run& run) {
  if (two_level) {
    if (sizeof(Out) > 1 && care == Care::kNone) return run(Emit<kStochastic, Care::kNone, true>{grid});
    if (sizeof(Out) > 1 && care == Care::kClamp) return run(Emit<kStochastic, Care::kClamp, true>{grid});
    return run(Emit<kStochastic, Care::kAll, true>{grid});
  }
  if (sizeof(Out) > 1 && care != Care::kAll) return run(Emit<kStochastic, Care::kClamp, false>{grid});
  return run(Emit<kStochastic, Care::kAll, false>{grid});
}

}  // namespace lowprec::LOWPREC_ISA
