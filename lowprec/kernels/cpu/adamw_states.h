// States of AdamW, a unit of 256 elements at a time: decoded into FP32 arrays that stay in the cache, encoded from them.
//
// A unit at the tensor's end may be shorter: its bytes go through a padded copy, and numbers past its end are 0.
#pragma once
#include "adamw_job.h"

namespace lowprec::LOWPREC_ISA {

struct Unit {
  int64_t index;  // in the fragment
  int count;      // of its elements: 256, or fewer at the tensor's end
  explicit Unit(const AdamJob& job, int64_t i)
      : index(i), count((int)(job.count - i * kUnit < kUnit ? job.count - i * kUnit : kUnit)) {}
  bool whole() const { return count == kUnit; }
};

// Memory of a unit: in place if it is whole, else a copy with zeros after it.
template <class T>
struct Window {
  T* data;
  T copy[kUnit];
  T* home;
  int items;
  Window(const void* base, const Unit& unit, int per = 1) : home((T*)base + unit.index * kUnit / per), items((unit.count + per - 1) / per) {
    data = home;
    if (unit.whole()) return;
    __builtin_memset(copy, 0, sizeof copy);
    __builtin_memcpy(copy, home, items * sizeof(T));
    data = copy;
  }
  void write_back() const {
    if (data == copy) __builtin_memcpy(home, copy, items * sizeof(T));
  }
};

static LOWPREC_INLINE Element e4m3_element() { return Element{3, -6, 7, 0x7f, -1, false, 448.0f}; }
static LOWPREC_INLINE Element half_element() { return Element{10, -14, 15, -1, -1, false, 65504.0f}; }

static LOWPREC_INLINE float largest_lane(F most) {  // of numbers that are not negative
  const int32_t bits = reduce_max((I)most);
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

struct Most {  // largest magnitudes of the two halves of a unit
  float halves[2];
  float all() const { return halves[0] > halves[1] ? halves[0] : halves[1]; }
};

static inline Most most_of(const float* x) {
  Most most;
  for (int half = 0; half < 2; half++) {
    F found = splat(0.0f);
    for (int i = 128 * half; i < 128 * half + 128; i += kLanes) found = max(found, absolute(load(x + i)));
    most.halves[half] = largest_lane(found);
  }
  return most;
}

static LOWPREC_INLINE float inverse_of(float scale) { return 1.0f / (scale > 0x1p-126f ? scale : 0x1p-126f); }

// Calls run(first, count, row, column) for each run of the unit's elements that lie in one row.
template <class Run>
static LOWPREC_INLINE void for_rows(const AdamJob& job, const Unit& unit, const Run& run) {
  const int64_t start = job.offset + unit.index * kUnit;
  int64_t row = start / job.row_length, column = start % job.row_length;
  for (int done = 0; done < unit.count;) {
    const int64_t left = job.row_length - column;
    const int count = left < unit.count - done ? (int)left : unit.count - done;
    run(done, count, row, column);
    done += count, row++, column = 0;
  }
}

// The smaller of each element's row's and column's number, or of inverse numbers the larger.
template <bool kInverse>
static inline void rank1_scales(const AdamJob& job, const Unit& unit, const float* rows, const float* columns, float* scales) {
  for_rows(job, unit, [&](int first, int count, int64_t row, int64_t column) {
    const float mine = rows[row];
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const F theirs = load(columns + column + i);
      store(scales + first + i, kInverse ? max(theirs, splat(mine)) : min(theirs, splat(mine)));
    }
    for (; i < count; i++) {
      const float theirs = columns[column + i];
      scales[first + i] = (kInverse ? theirs > mine : theirs < mine) ? theirs : mine;
    }
  });
  for (int i = unit.count; i < kUnit; i++) scales[i] = 0.0f;
}

static LOWPREC_INLINE void decode_nibbles(const uint8_t* codes, const float* values, float* out, int from, int to, F scale) {
  const Table16 table(values);
  for (int i = from; i < to; i += kLanes) store(out + i, table[load_nibbles(codes + i / 2)] * scale);
}

static inline void decode_state(const AdamJob& job, const Unit& unit, const State& state, float* out) {
  switch (state.store) {
    case Store::kFloat: {
      const Window<float> in(state.payload, unit);
      for (int i = 0; i < kUnit; i += kLanes) store(out + i, load(in.data + i));
      return;
    }
    case Store::kBf16: {
      const Window<Bf16> in(state.payload, unit);
      for (int i = 0; i < kUnit; i += kLanes) store(out + i, load(in.data + i));
      return;
    }
    case Store::kHalf: {
      const Window<Bf16> in(state.payload, unit);
      const Grid grid(half_element());
      const F scale = splat(state.scale);
      for (int i = 0; i < kUnit; i += kLanes) store(out + i, decode(grid, shift_right((I)load(in.data + i), 16)) * scale);
      return;
    }
    case Store::kByte:
    case Store::kByteBlock: {
      const Window<uint8_t> in(state.payload, unit);
      const Grid grid(e4m3_element());
      const F scale = splat(state.store == Store::kByte ? state.scale : state.scales[unit.index]);
      for (int i = 0; i < kUnit; i += kLanes) store(out + i, decode(grid, load_bytes(in.data + i)) * scale);
      break;
    }
    case Store::kBook8: {
      const uint8_t* codes = (const uint8_t*)state.payload + unit.index * kUnit;
      const float scale = state.scales[unit.index];
      for (int i = 0; i < unit.count; i++) out[i] = state.values[codes[i]] * scale;
      break;
    }
    case Store::kBook4: {
      const Window<uint8_t> in(state.payload, unit, 2);
      const float* scales = state.scales + 2 * unit.index;
      decode_nibbles(in.data, state.values, out, 0, 128, splat(scales[0]));
      decode_nibbles(in.data, state.values, out, 128, 256, splat(unit.count > 128 ? scales[1] : 0.0f));
      break;
    }
    case Store::kRank1: {
      const Window<uint8_t> in(state.payload, unit, 2);
      float scales[kUnit];
      rank1_scales<false>(job, unit, state.rows, state.columns, scales);
      const Table16 table(state.values);
      for (int i = 0; i < kUnit; i += kLanes) store(out + i, table[load_nibbles(in.data + i / 2)] * load(scales + i));
      break;
    }
  }
  for (int i = unit.count; i < kUnit; i++) out[i] = 0.0f;  // code 0 is not always 0
}

// Codes of a 16-entry codebook: how many of its 15 midpoints are below, by halving.
struct Search {
  F middle, quarter, three_quarters;
  float eighths[8], sixteenths[8];
  explicit Search(const float* limits) : middle(splat(limits[7])), quarter(splat(limits[3])), three_quarters(splat(limits[11])) {
    for (int i = 0; i < 8; i++) eighths[i] = limits[i < 4 ? 4 * i + 1 : 1], sixteenths[i] = limits[2 * i];
  }
  LOWPREC_INLINE I operator()(const Table8& third, const Table8& fourth, F x) const {
    const I first = x > middle;  // a mask is -1
    const I half = x > (first ? three_quarters : quarter);
    I code = (first + first + half);
    code = -code;
    code = code + code - (x > third[code]);
    return code + code - (x > fourth[code]);
  }
};

// The same for 1/16 .. 16/16: how many of 1 .. 15 are below 16 x - 1/2, which is exact where it matters.
static LOWPREC_INLINE I search_linear(F x) {
  const F place = x * splat(16.0f) - splat(0.5f);
  const I whole = truncate(place);
  return max(whole + (to_float(whole) >= place), splat(0));
}

// Codes of 128 numbers times their inverse scales.
template <class Inverse>
static LOWPREC_INLINE void encode_nibbles(const State& state, const float* x, const Inverse& inverse, uint8_t* codes) {
  I found[2];
  if (state.linear) {
    for (int64_t i = 0; i < 128; i += 2 * kLanes) {
      for (int j = 0; j < 2; j++) found[j] = search_linear(load(x + i + j * kLanes) * inverse(i + j * kLanes));
      store_nibbles(codes + i / 2, found);
    }
    return;
  }
  const Search search(state.limits);
  const Table8 third(search.eighths), fourth(search.sixteenths);
  for (int64_t i = 0; i < 128; i += 2 * kLanes) {
    for (int j = 0; j < 2; j++) found[j] = search(third, fourth, load(x + i + j * kLanes) * inverse(i + j * kLanes));
    store_nibbles(codes + i / 2, found);
  }
}

static inline void encode_book4(const State& state, const Unit& unit, const float* x, const Most& most, uint8_t* codes) {
  for (int block = 0; 128 * block < unit.count; block++) {
    state.scales[2 * unit.index + block] = most.halves[block];
    const F inverse = splat(inverse_of(most.halves[block]));
    encode_nibbles(state, x + 128 * block, [=](int64_t) { return inverse; }, codes + 64 * block);
  }
}

static inline void encode_book8(const State& state, const Unit& unit, const float* x, float scale) {
  uint8_t* codes = (uint8_t*)state.payload + unit.index * kUnit;
  state.scales[unit.index] = scale;
  const F inverse = splat(inverse_of(scale));
  float ratio[kUnit];
  for (int i = 0; i < kUnit; i += kLanes) store(ratio + i, load(x + i) * inverse);
  for (int i = 0; i < unit.count; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, ratio + i, sizeof bits);
    const uint8_t code = state.cells[bits >> 16];
    codes[i] = (uint8_t)(code + (ratio[i] > state.limits[code]));
  }
}

template <class Round>  // to BF16 or to codes of 16 bits, in the high halves
static LOWPREC_INLINE void store_halves(void* payload, const Unit& unit, const float* x, const Round& round) {
  Window<Bf16> out(payload, unit);
  for (int i = 0; i < kUnit; i += 2 * kLanes) store_pair(out.data + i, round(load(x + i)), round(load(x + i + kLanes)));
  out.write_back();
}

static inline void encode_state(const AdamJob& job, const Unit& unit, const State& state, const float* x, const Most& most) {
  switch (state.store) {
    case Store::kFloat: {
      float* out = (float*)state.payload + unit.index * kUnit;
      for (int i = 0; i < unit.count; i++) out[i] = x[i];
      return;
    }
    case Store::kBf16:
      return store_halves(state.payload, unit, x, [](F v) { return round_to_bf16(v); });
    case Store::kHalf: {
      const Grid grid(half_element());
      const F encode = splat(1.0f / state.next_scale);
      return store_halves(state.payload, unit, x, [&](F v) { return (F)(code_on_grid<false>(grid, v * encode, F{}) << 16); });
    }
    case Store::kByte:
    case Store::kByteBlock: {
      Window<uint8_t> out(state.payload, unit);
      const Grid grid(e4m3_element());
      float scale = state.next_scale;
      if (state.store == Store::kByteBlock) {
        scale = (most.all() > 1e-12f ? most.all() : 1e-12f) / 448.0f;
        state.scales[unit.index] = scale;
      }
      const F encode = splat(1.0f / scale);
      for (int i = 0; i < kUnit; i += kLanes)
        store_bytes(out.data + i, code_on_grid<false>(grid, load(x + i) * encode, F{}));
      return out.write_back();
    }
    case Store::kBook8:
      return encode_book8(state, unit, x, most.all());
    case Store::kBook4: {
      Window<uint8_t> out(state.payload, unit, 2);
      encode_book4(state, unit, x, most, out.data);
      return out.write_back();
    }
    case Store::kRank1: {
      Window<uint8_t> out(state.payload, unit, 2);
      float inverses[kUnit];
      rank1_scales<true>(job, unit, state.next_rows, state.next_columns, inverses);
      for (int half = 0; half < 2; half++)
        encode_nibbles(state, x + 128 * half, [&](int64_t i) { return load(inverses + 128 * half + i); }, out.data + 64 * half);
      return out.write_back();
    }
  }
}

// Raises the maxima that the state's scales need.
static inline void find_maxima(const AdamJob& job, const Unit& unit, const State& state, const float* x, float* found) {
  float* mine = found + state.found_at;
  if (state.store == Store::kHalf || state.store == Store::kByte) {
    const float most = most_of(x).all();
    *mine = most > *mine ? most : *mine;
  } else if (state.store == Store::kRank1) {
    float* columns = mine + job.row_count;
    for_rows(job, unit, [&](int first, int count, int64_t row, int64_t column) {
      float most = mine[row];
      for (int i = 0; i < count; i++) {
        const float v = __builtin_fabsf(x[first + i]);
        most = v > most ? v : most;
        columns[column + i] = v > columns[column + i] ? v : columns[column + i];
      }
      mine[row] = most;
    });
  }
}

}  // namespace lowprec::LOWPREC_ISA
