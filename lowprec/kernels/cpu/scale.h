// Scales of blocks: from the maxima of kLanes blocks to what their elements are multiplied by before rounding
// (encode) and after it (decode), and the stored code. Rules and edge cases: lowprec/scales.py.
#pragma once

namespace lowprec::LOWPREC_ISA {

constexpr float kLargest = 3.4028234663852886e38f;
constexpr int32_t kInfinity = 0x7f800000;  // bits; NaN is above

struct BlockScale {
  F encode, decode;
  I code;  // E8M0 or E4M3 byte, or the bits of the FP32 decode scale
};

// E8M0: 2^(code - 127). Code 255 is NaN; the reciprocal of code 254 and the value of code 0 are subnormal.
static LOWPREC_INLINE BlockScale from_e8m0(I code) {
  const I subnormal = splat(0x00400000), nan = splat(0x7fc00000);
  const I decode = code == 0 ? subnormal : code << 23, encode = code == 254 ? subnormal : (254 - code) << 23;
  return {(F)(code == 255 ? nan : encode), (F)(code == 255 ? nan : decode), code};
}

// Biased exponent of the smallest power of two >= t, 255 above 2^127. Code 0 is 2^-127, itself an FP32 subnormal.
static LOWPREC_INLINE I round_up(F t) {
  const I field = shift_right((I)t, 23), fraction = (I)t & splat(0x7fffff);
  const I limit = field == 0 ? splat(0x400000) : splat(0);
  return field - (fraction > limit);  // a mask is -1
}

static LOWPREC_INLINE BlockScale e8m0(const Scale& scale, const Element& element, F amax) {
  I code;
  switch (scale.rule) {
    case Rule::kRceil:
      code = round_up(amax * splat(1.0f / scale.element_max));
      break;
    case Rule::kCeil:
      code = round_up(amax) - scale.max_exponent;
      break;
    case Rule::kEven:
      code = shift_right((I)amax + splat(1 << (22 - element.mantissa_bits)), 23) - scale.max_exponent;
      break;
    default:
      code = shift_right((I)amax, 23) - scale.max_exponent;
  }
  code = min(max(code, splat(0)), splat(254));
  code = (I)amax >= kInfinity ? splat(element.nan_code >= 0 ? 254 : 255) : code;
  BlockScale block = from_e8m0((I)amax > kInfinity ? splat(255) : code);
  block.encode = block.encode * splat(scale.before);
  return block;
}

// NVFP4: E4M3 scale in units of the tensor scale; a scale that underflows to 0 multiplies by the largest number.
static LOWPREC_INLINE BlockScale two_level(const Scale& scale, const Grid& e4m3, F amax) {
  const F decode = round_to_grid<false, Care::kAll>(e4m3, amax * splat(scale.encode), F{});
  const F encode = min(splat(kLargest), splat(1.0f) / (decode * splat(scale.decode)));
  return {encode, decode, code_on_grid<false>(e4m3, decode, F{})};
}

static LOWPREC_INLINE F floor_power(F scale) {  // largest power of two below, subnormal ones included
  const I small = scale < splat(0x1p-64f);
  const I power = (I)(small ? scale * splat(0x1p64f) : scale) & splat(kInfinity);
  return small ? (F)power * splat(0x1p-64f) : (F)power;
}

static LOWPREC_INLINE BlockScale from_fp32(const Scale& scale, F amax) {
  F encode = splat(scale.element_max) / amax;
  encode = (I)encode == kInfinity ? splat(scale.largest) : encode;
  if (scale.rule == Rule::kPow2) encode = encode == encode ? floor_power(encode) : encode;
  encode = amax == 0.0f ? splat(1.0f) : encode;
  const F decode = splat(1.0f) / encode;
  return {encode, decode, (I)decode};
}

static LOWPREC_INLINE float half_step(const Element& element) {  // below max
  int32_t bits;
  __builtin_memcpy(&bits, &element.max, sizeof bits);
  bits = (bits & 0x7f800000) - ((element.mantissa_bits + 1) << 23);
  float half;
  __builtin_memcpy(&half, &bits, sizeof half);
  return half;
}

// What is known about all blocks of a patch, lane by lane.
struct Doubts {
  I clean, fits;
  Doubts() : clean(splat(-1)), fits(splat(-1)) {}  // spelled out: GCC compiles an implicit one for another target
  LOWPREC_INLINE Care care() const {
    if (!all(clean)) return Care::kAll;
    return all(fits) ? Care::kNone : Care::kClamp;
  }
};

struct Scaler {
  Scale scale;
  Element element;
  I may_be_clean;    // 0: never, -1: it depends
  bool ignores_nan;  // in a block's amax: MX of elements that have a NaN of their own
  bool wide;         // scales are FP32
  bool power_of_two; // scales are, and elements are multiplied by nothing else
  float saturates;   // the first number that would round to nearest beyond the element's max
  float smallest_encode;
  Grid e4m3;
  explicit Scaler(const Job& job)
      : scale(job.scale),
        element(job.element),
        may_be_clean(splat(job.element.twos_complement ? 0 : -1)),
        ignores_nan(job.element.nan_code >= 0 && scale.rule >= Rule::kRceil && scale.rule <= Rule::kEven),
        wide(scale.rule == Rule::kFp32 || scale.rule == Rule::kPow2),
        power_of_two(scale.rule != Rule::kGiven && scale.rule != Rule::kTwoLevel && scale.rule != Rule::kFp32 &&
                     scale.before == 1.0f),
        saturates(job.element.max + half_step(job.element)),
        smallest_encode(job.in == Type::kBf16 ? 0x1p-16f : 2.0f),  // the smallest inputs are 2^-133, 2^-149
        e4m3(Element{3, -6, 7, 0x7f, -1, false, 448.0f}) {}

  LOWPREC_INLINE BlockScale operator()(I amax) const {
    switch (scale.rule) {
      case Rule::kGiven:
        return {splat(scale.encode), splat(scale.decode), (I)splat(scale.decode)};
      case Rule::kTwoLevel:
        return two_level(scale, e4m3, (F)amax);
      case Rule::kFp32:
      case Rule::kPow2:
        return from_fp32(scale, (F)amax);
      default:
        return e8m0(scale, element, (F)amax);
    }
  }

  // Adds what these blocks might need. seen: their maxima, NaN if there is one; 0 if they were not looked at.
  // Clean blocks hold numbers only, have no -0 of two's complement, and their products with the scale are exact in
  // BF16 and so far from both ends of FP32 that no intermediate number of the rounding leaves it.
  LOWPREC_INLINE void doubt(Doubts& doubts, I seen, const BlockScale& block, bool stochastic) const {
    I clean = (seen < kInfinity) & may_be_clean;
    switch (scale.rule) {
      case Rule::kGiven:  // no amax is known; nearest rounding keeps a NaN by itself
        clean &= splat(!stochastic && element.nan_code >= 0 ? -1 : 0);
        doubts.fits = I{};
        break;
      case Rule::kTwoLevel:  // not so small that a product could vanish, which turns -0 into 0 (Emit)
        clean &= block.encode >= splat(smallest_encode);
        break;
      case Rule::kFp32:
        clean = I{};
        break;
      case Rule::kPow2:
        clean &= ((I)block.decode > splat(20 << 23)) & ((I)block.decode < splat(200 << 23));
        break;
      default:
        clean &= ((block.code > 20) & (block.code < 200)) | (seen == 0);
    }
    doubts.clean &= clean;
    const F largest = (F)seen * block.encode;
    doubts.fits &= stochastic ? largest <= splat(element.max) : largest < splat(saturates);
  }

  void store_codes(void* scales, int64_t index, I codes, int count) const {
    int32_t each[kLanes];
    __builtin_memcpy(each, &codes, sizeof each);
    for (int i = 0; i < count; i++) {
      if (wide)
        ((int32_t*)scales)[index + i] = each[i];
      else
        ((uint8_t*)scales)[index + i] = (uint8_t)each[i];
    }
  }
};

// Maximum of magnitudes as integers: the order is that of the numbers, and NaN, above them all, is not lost.
static LOWPREC_INLINE I amax_with_nan(F v, I most) { return max((I)absolute(v), most); }
// The same without NaN, of the lanes that count; start from -1, which stays if there is nothing else, and is then read as a NaN.
static LOWPREC_INLINE I amax_without_nan(F v, I most, I counts) {
  const I magnitude = (I)absolute(v);
  return max((magnitude <= kInfinity) & counts ? magnitude : splat(-1), most);
}
static LOWPREC_INLINE I or_nan(I amax) { return amax < 0 ? splat(0x7fc00000) : amax; }

}  // namespace lowprec::LOWPREC_ISA
