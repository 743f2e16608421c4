// Rounding to the grid of an element format, and its codes.
//
// For |v| in the binade [2^e, 2^(e+1)) (e at least the format's smallest normal exponent) the grid's step is
// 2^(e - mantissa bits). Nearest-even: adding magic = 2^(e + 23 - mantissa bits), whose last bit is worth one
// step, makes the FPU round |v| to whole steps, ties to even. Stochastic: floor(|v| / step + u / 256), which adds
// u / 256 steps to |v| and lets the FPU round down. Both
// give n, the number of steps; a carry into the next binade needs no care, neither in the value n * step nor
// in the code, which is n + (binade index << mantissa bits).
#pragma once

namespace lowprec::LOWPREC_ISA {

static LOWPREC_INLINE F absolute(F v) { return (F)((I)v & splat(0x7fffffff)); }
static LOWPREC_INLINE I sign(F v) { return (I)v & splat((int32_t)0x80000000u); }

// BF16 in the high half (ties to even), as store_pair wants it; v no NaN but one that came from BF16, or of the
// processor: other NaNs could overflow.
static LOWPREC_INLINE F round_number_to_bf16(F v) {
  const I bits = (I)v;
  return (F)(bits + splat(0x7fff) + (shift_right(bits, 16) & splat(1)));
}
static LOWPREC_INLINE F round_to_bf16(F v) { return v == v ? round_number_to_bf16(v) : (F)((I)v | splat(0x00400000)); }

// How much can happen to the numbers of some blocks.
enum class Care {
  kAll,    // NaN; products with the scale that BF16 must round
  kClamp,  // numbers beyond the format's max, which saturate
  kNone,   // nothing
};

struct Grid {
  I smallest_binade, to_magic, to_step;
  F max;
  Element element;
  explicit Grid(const Element& e)
      : smallest_binade(splat((127 + e.min_exponent) << 23)),
        to_magic(splat((23 - e.mantissa_bits) << 23)),
        to_step(splat(e.mantissa_bits << 23)),
        max(splat(e.max)),
        element(e) {}
};

// A NaN stays one if the format has it (under kClamp: when rounding to nearest), and becomes +max if not.
// random: 0 .. 255 as floats for stochastic rounding; ignored otherwise.
template <bool kStochastic, Care kCare>
static LOWPREC_INLINE F round_to_grid(const Grid& grid, F v, F random) {
  constexpr bool kClean = kCare != Care::kAll;
  if (!kClean && grid.element.nan_code < 0) v = v == v ? v : grid.max;
  const F a = kCare == Care::kNone ? absolute(v) : min(grid.max, absolute(v));  // saturates; keeps NaN
  const I binade = max((I)a & splat(0x7f800000), grid.smallest_binade);
  const F magic = (F)(binade + grid.to_magic);
  F rounded;
  if (kStochastic) {
    const F step256 = (F)(binade - grid.to_step - splat(8 << 23)), step = (F)(binade - grid.to_step);
    rounded = floor_steps(multiply_add(random, step256, a), magic, step);  // the product is exact
    if (!kClean) rounded = v == v ? rounded : v;
  } else {
    rounded = (a + magic) - magic;
  }
  const F result = (F)((I)rounded | sign(v));
  return !kClean && grid.element.twos_complement ? result + splat(0.0f) : result;  // which has no -0
}

// The code of the same number; always careful.
template <bool kStochastic>
static LOWPREC_INLINE I code_on_grid(const Grid& grid, F v, F random) {
  const I is_nan = v != v;
  const F a = min(grid.max, is_nan ? grid.max : absolute(v));
  const I binade = max((I)a & splat(0x7f800000), grid.smallest_binade);
  I steps;
  if (kStochastic) {
    const F inverse_step = (F)(splat(0x7f000000) - (binade - grid.to_step));
    steps = truncate(multiply_add(random, splat(0x1p-8f), a * inverse_step));
  } else {
    const F magic = (F)(binade + grid.to_magic);
    steps = (I)(a + magic) - (I)magic;
  }
  const int shift = 23 - grid.element.mantissa_bits;
  const I magnitude = steps + shift_right(binade - grid.smallest_binade, shift);
  const I negative = ((I)v < 0) & ~is_nan;
  if (grid.element.twos_complement) return ((magnitude ^ negative) - negative) & splat(0xff);
  const I code = magnitude | (negative & splat(1 << grid.element.sign_bit));
  return grid.element.nan_code >= 0 ? (is_nan ? splat(grid.element.nan_code) : code) : code;
}

// Rounding to nearest of unscaled numbers whose block's scale is a power of two: the grid is moved to them instead.
// smallest_binade: the grid's, times the scale. Nothing may saturate. The 1.5 in magic serves both signs.
struct RoundInPlace {
  I to_magic;
  int shift, sign_bit;
  explicit RoundInPlace(const Grid& grid)
      : to_magic(grid.to_magic + splat(1 << 22)), shift(23 - grid.element.mantissa_bits), sign_bit(grid.element.sign_bit) {}

  static LOWPREC_INLINE I binade_of(F v, I smallest_binade) { return max((I)v & splat(0x7f800000), smallest_binade); }
  LOWPREC_INLINE F operator()(F v, I smallest_binade) const {
    const F magic = (F)(binade_of(v, smallest_binade) + to_magic);
    return (F)((I)((v + magic) - magic) | sign(v));
  }
  LOWPREC_INLINE I code(F v, I smallest_binade) const {  // sign and magnitude
    const I binade = binade_of(v, smallest_binade), magic = binade + to_magic;
    const I steps = (I)(v + (F)magic) - magic;  // with v's sign
    const I magnitude = max(steps, -steps) + shift_right(binade - smallest_binade, shift);
    return magnitude | shift_left(shift_right((I)v, 31), sign_bit);
  }
};

static LOWPREC_INLINE F decode(const Grid& grid, I code) {
  const Element& e = grid.element;
  const F smallest_step = (F)(grid.smallest_binade - grid.to_step);
  if (e.twos_complement) return to_float((code << 24) >> 24) * smallest_step;
  const I magnitude = code & splat((1 << e.sign_bit) - 1);
  const I normal = shift_left(magnitude, 23 - e.mantissa_bits) + splat((126 + e.min_exponent) << 23);
  F v = magnitude < splat(1 << e.mantissa_bits) ? to_float(magnitude) * smallest_step : (F)normal;
  if (e.nan_code >= 0) {
    const int first_nan = e.inf_code >= 0 ? e.inf_code + 1 : e.nan_code;
    v = magnitude >= splat(first_nan) ? splat(__builtin_nanf("")) : v;
    v = magnitude == splat(e.inf_code) ? splat(__builtin_inff()) : v;
  }
  return (F)((I)v | shift_left(shift_right(code, e.sign_bit), 31));
}

}  // namespace lowprec::LOWPREC_ISA
