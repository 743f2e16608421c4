// The AdamW step of lowprec/adamw.py, in units of 256 elements: decode, update, round the weight, encode.
#pragma once
#include "adamw_states.h"

namespace lowprec::LOWPREC_ISA {

struct Arrays {  // of one unit, FP32; past its end 0
  float m[kUnit], v[kUnit], weight[kUnit], next[kUnit], change[kUnit], low[kUnit], next_low[kUnit];
  uint8_t random[2 * kUnit + 16 * kLanes];
};

struct Step {  // the numbers of a step in every lane
  F grad_scale, one_minus_beta1, beta2, one_minus_beta2, minus_step, root_correction, eps, keep, decay;
  explicit Step(const AdamJob& job)
      : grad_scale(splat(job.grad_scale)),
        one_minus_beta1(splat(job.one_minus_beta1)),
        beta2(splat(job.beta2)),
        one_minus_beta2(splat(job.one_minus_beta2)),
        minus_step(splat(job.minus_step)),
        root_correction(splat(job.root_correction)),
        eps(splat(job.eps)),
        keep(splat(job.keep)),
        decay(splat(job.decay)) {}
  LOWPREC_INLINE F change(F m, F v) const { return m * minus_step / (square_root(v) * root_correction + eps); }
};

struct FromFloats {
  const float* x;
  LOWPREC_INLINE void operator()(int64_t i, F* two) const { two[0] = load(x + i), two[1] = load(x + i + kLanes); }
};
struct FromNibbles {
  const uint8_t* codes;
  Table16 table;
  F scale;
  LOWPREC_INLINE void operator()(int64_t i, F* two) const {
    I code[2];
    load_nibbles(codes + i / 2, code);
    two[0] = table[code[0]] * scale, two[1] = table[code[1]] * scale;
  }
};

// One half of a unit: m and v from old_m and old_v; next = keep weight + change, change = change - decay weight.
template <bool kChange, class In, class M, class V>
static LOWPREC_INLINE void advance(const Step& step, int half, const In* grad, const M& old_m, const V& old_v, float* m, float* v,
                                   const float* weight, float* next, float* change, Most* most) {
  F most_m = splat(0.0f), most_v = splat(0.0f);
  for (int64_t first = 128 * half; first < 128 * half + 128; first += 2 * kLanes) {
    F olds[2], squares[2];
    old_m(first, olds), old_v(first, squares);
    for (int j = 0; j < 2; j++) {
      const int64_t i = first + j * kLanes;
      const F g = load(grad + i) * step.grad_scale, old = olds[j], w = load(weight + i);
      const F mean = old + (g - old) * step.one_minus_beta1;
      const F square = squares[j] * step.beta2 + g * step.one_minus_beta2 * g;
      const F moved = step.change(mean, square);
      most_m = max(most_m, absolute(mean)), most_v = max(most_v, square);
      store(m + i, mean), store(v + i, square);
      store(next + i, w * step.keep + moved);
      if (kChange) store(change + i, moved - w * step.decay);
    }
  }
  most[0].halves[half] = largest_lane(most_m), most[1].halves[half] = largest_lane(most_v);
}

template <class In>
static inline void advance_unit(const AdamJob& job, const Unit& unit, float* m, float* v, const float* weight, float* next,
                                float* change, Most* most) {
  const Window<In> grad(job.grad, unit);
  const Step step(job);
  for (int half = 0; half < 2; half++) {
    if (change)
      advance<true>(step, half, grad.data, FromFloats{m}, FromFloats{v}, m, v, weight, next, change, most);
    else
      advance<false>(step, half, grad.data, FromFloats{m}, FromFloats{v}, m, v, weight, next, change, most);
  }
}

// The same of a whole unit whose moments both have 4 bits: decoded on the way.
template <class In>
static inline void advance_nibbles(const AdamJob& job, const Unit& unit, float* m, float* v, const float* weight, float* next,
                                   Most* most) {
  const In* grad = (const In*)job.grad + unit.index * kUnit;
  const Step step(job);
  for (int half = 0; half < 2; half++) {
    const auto from = [&](const State& state) {
      return FromNibbles{(const uint8_t*)state.payload + unit.index * kUnit / 2, Table16(state.values),
                         splat(state.scales[2 * unit.index + half])};
    };
    advance<false>(step, half, grad, from(job.exp_avg), from(job.exp_avg_sq), m, v, weight, next, nullptr, most);
  }
}

static LOWPREC_INLINE F stochastic_bf16(F value, I random) {
  const I bits = (I)value, magnitude = bits & splat(0x7fffffff);
  const I rounded = min((magnitude + random) & splat((int32_t)0xffff0000u), splat(0x7f7f0000)) | sign(value);
  return magnitude >= splat(0x7f800000) ? round_to_bf16(value) : (F)rounded;
}

// BF16 arithmetic: every operation is rounded; numbers are finite, or what processors make of Inf. See lowprec/compensated.py.
struct Pair {
  F high, low;
};
static LOWPREC_INLINE F bf16(F v) { return (F)((I)round_number_to_bf16(v) & splat((int32_t)0xffff0000u)); }
static LOWPREC_INLINE Pair fast_two_sum(F a, F b) {
  const F total = bf16(a + b);
  return {total, bf16(b - bf16(total - a))};
}
static LOWPREC_INLINE Pair two_sum(F a, F b) {
  const F total = bf16(a + b), b_part = bf16(total - a), a_part = bf16(total - b_part);
  return {total, bf16(bf16(a - a_part) + bf16(b - b_part))};
}
static LOWPREC_INLINE Pair grow(Pair pair, F value) {
  const Pair sum = two_sum(pair.high, value);
  return fast_two_sum(sum.high, bf16(pair.low + sum.low));
}
static LOWPREC_INLINE Pair scale_pair(Pair pair, F high, F low) {
  const F exact = pair.high * high, product = bf16(exact), error = bf16(exact - product);
  return fast_two_sum(product, bf16(bf16(error + bf16(pair.high * low)) + bf16(pair.low * high)));
}

template <class In>
static inline void collage_moments(const AdamJob& job, const Unit& unit, Arrays& a) {
  const Step step(job);
  const Window<In> grad(job.grad, unit);
  const bool plus = job.write == Write::kCollagePlus;
  if (plus) decode_state(job, unit, State{Store::kBf16, job.exp_avg_sq_low}, a.low);
  const F beta1 = splat(job.beta1), beta2_high = splat(job.beta2_high), beta2_low = splat(job.beta2_low);
  for (int i = 0; i < kUnit; i += kLanes) {
    const F g = load(grad.data + i) * step.grad_scale, old = load(a.v + i);
    const F m = bf16(bf16(load(a.m + i) * beta1) + bf16(g * step.one_minus_beta1));
    const F added = bf16(bf16(g * g) * step.one_minus_beta2);
    F v = bf16(bf16(old * step.beta2) + added);
    if (plus) {
      const Pair pair = grow(scale_pair({old, load(a.low + i)}, beta2_high, beta2_low), added);
      v = pair.high;
      store(a.low + i, pair.low);
    }
    store(a.m + i, m), store(a.v + i, v);
    store(a.change + i, step.change(m, v) - load(a.weight + i) * step.decay);
  }
  if (plus) store_halves(job.exp_avg_sq_low, unit, a.low, [](F v) { return v; });
}

// Rounds a.next, or adds a.change, into the weight, as the rule says; a.next becomes what is stored.
static inline void write_weight(const AdamJob& job, const Unit& unit, Arrays& a) {
  if (job.write == Write::kNearest) {
    encode_state(job, unit, job.weight, a.next, Most{});
    if (job.tally) {  // the new scale is the one to read with
      State stored = job.weight;
      stored.scale = stored.next_scale;
      decode_state(job, unit, stored, a.next);
    }
    return;
  }
  if (job.write == Write::kStochastic) {
    random_bytes(a.random, job.random, unit.index, 0, kUnit / 8, kUnit / 8);
    for (int i = 0; i < kUnit; i += kLanes)
      store(a.next + i, stochastic_bf16(load(a.next + i), shift_right((I)load((const Bf16*)a.random + i), 16)));
  } else {
    const Window<Bf16> low(job.low, unit);
    for (int i = 0; i < kUnit; i += kLanes) {
      const F old = load(low.data + i), w = load(a.weight + i), u = bf16(load(a.change + i));
      F next, next_low;
      if (job.write == Write::kKahan) {
        const F wanted = bf16(u - old);
        next = bf16(w + wanted), next_low = bf16(bf16(next - w) - wanted);
      } else {
        const Pair pair = grow({w, old}, u);
        next = pair.high, next_low = pair.low;
      }
      store(a.low + i, old), store(a.next_low + i, next_low), store(a.next + i, next);
    }
    store_halves(job.low, unit, a.next_low, [](F v) { return v; });
  }
  store_halves(job.weight.payload, unit, a.next, [](F v) { return v; });
}

static inline void tally_unit(const AdamJob& job, const Unit& unit, const Arrays& a) {
  double along = 0, squares = 0, lost = 0;
  const bool kahan = job.write == Write::kKahan, pair = job.write >= Write::kCollageLight;
  for (int i = 0; i < unit.count; i++) {
    double before = a.weight[i], after = a.next[i];
    if (kahan) before -= a.low[i], after -= a.next_low[i];
    if (pair) before += a.low[i], after += a.next_low[i];
    const double wanted = a.change[i], applied = after - before;
    along += wanted * applied, squares += wanted * wanted;
    lost += applied == 0 && wanted != 0;
  }
  double* sums = job.tally + 3 * unit.index;
  sums[0] = along, sums[1] = squares, sums[2] = lost;
}

// The memory of an FP32 state itself, or an array that it was decoded into.
static LOWPREC_INLINE float* in_place_or(const AdamJob& job, const Unit& unit, const State& state, float* array) {
  if (state.store == Store::kFloat && unit.whole()) return (float*)state.payload + unit.index * kUnit;
  decode_state(job, unit, state, array);
  return array;
}

static void adamw(const AdamJob& job, int64_t first_unit, int64_t last_unit) {
  Arrays a;
  for (int64_t index = first_unit; index < last_unit; index++) {
    const Unit unit(job, index);
    if (job.write >= Write::kCollageLight) {
      decode_state(job, unit, job.exp_avg, a.m), decode_state(job, unit, job.exp_avg_sq, a.v);
      decode_state(job, unit, job.weight, a.weight);
      if (job.grad_store == Store::kFloat)
        collage_moments<float>(job, unit, a);
      else
        collage_moments<Bf16>(job, unit, a);
      encode_state(job, unit, job.exp_avg, a.m, Most{}), encode_state(job, unit, job.exp_avg_sq, a.v, Most{});
      write_weight(job, unit, a);
      if (job.tally) tally_unit(job, unit, a);
      continue;
    }
    const bool direct = job.weight.store == Store::kFloat && unit.whole() && !job.tally;
    float* change = job.tally || job.write == Write::kKahan ? a.change : nullptr;
    const bool nibbles = job.exp_avg.store == Store::kBook4 && job.exp_avg_sq.store == Store::kBook4 && unit.whole() && !change;
    float* m = nibbles ? a.m : in_place_or(job, unit, job.exp_avg, a.m);
    float* v = nibbles ? a.v : in_place_or(job, unit, job.exp_avg_sq, a.v);
    float* weight = direct ? in_place_or(job, unit, job.weight, a.weight) : a.weight;
    if (!direct) decode_state(job, unit, job.weight, a.weight);
    float* next = direct ? weight : a.next;
    Most most[2];
    if (job.grad_store == Store::kFloat)
      nibbles ? advance_nibbles<float>(job, unit, m, v, weight, next, most)
              : advance_unit<float>(job, unit, m, v, weight, next, change, most);
    else
      nibbles ? advance_nibbles<Bf16>(job, unit, m, v, weight, next, most)
              : advance_unit<Bf16>(job, unit, m, v, weight, next, change, most);
    if (!direct) write_weight(job, unit, a);
    if (m == a.m) encode_state(job, unit, job.exp_avg, m, most[0]);
    if (v == a.v) encode_state(job, unit, job.exp_avg_sq, v, most[1]);
    if (job.tally) tally_unit(job, unit, a);
  }
}

// The first stage: the same numbers, of which only maxima are kept.
static void adamw_maxima(const AdamJob& job, int64_t first_unit, int64_t last_unit, float* found) {
  Arrays a;
  for (int64_t index = first_unit; index < last_unit; index++) {
    const Unit unit(job, index);
    decode_state(job, unit, job.exp_avg, a.m), decode_state(job, unit, job.exp_avg_sq, a.v);
    decode_state(job, unit, job.weight, a.weight);
    Most most[2];
    if (job.grad_store == Store::kFloat)
      advance_unit<float>(job, unit, a.m, a.v, a.weight, a.next, nullptr, most);
    else
      advance_unit<Bf16>(job, unit, a.m, a.v, a.weight, a.next, nullptr, most);
    for (int i = unit.count; i < kUnit; i++) a.next[i] = 0.0f;  // eps may be 0
    find_maxima(job, unit, job.exp_avg, a.m, found);
    find_maxima(job, unit, job.exp_avg_sq, a.v, found);
    find_maxima(job, unit, job.weight, a.next, found);
  }
}

}  // namespace lowprec::LOWPREC_ISA
