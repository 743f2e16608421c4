// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), one counter a lane.
//
// A counter yields the 16 random bytes of 16 neighbours in a row; see lowprec/philox.py for the key and the
// counter's words. The bytes are stored in the elements' order, so rounding reads them like data.
#pragma once

namespace lowprec::LOWPREC_ISA {

// Counters of the even or of the odd lanes, each in the low half of 64 bits: 32-bit products come as 64 bits, and
// are best left there until the last round. What the high halves hold does not matter.
static LOWPREC_INLINE void philox_half(I c[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const I p0 = multiply_low(c[0], 0xD2511F53u), p1 = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = high_word(p1) ^ c[1] ^ splat((int32_t)k0);
    c[2] = high_word(p0) ^ c[3] ^ splat((int32_t)k1);
    c[1] = p1, c[3] = p0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

static LOWPREC_INLINE void philox(I c[4], uint32_t k0, uint32_t k1) {
  I even[4], odd[4];
  for (int i = 0; i < 4; i++) even[i] = c[i], odd[i] = high_word(c[i]);
  philox_half(even, k0, k1);
  philox_half(odd, k0, k1);
  for (int i = 0; i < 4; i++) c[i] = join(even[i], odd[i]);
}

// Random bytes of `count` units of 16 elements, from unit `unit` of row `row` on, going on in the next row
// after `units_per_row`. Writes up to kLanes - 1 units too many.
static inline void random_bytes(uint8_t* out, const Random& random, int64_t row, int64_t unit, int64_t count,
                                int64_t units_per_row) {
  for (int64_t done = 0; done < count; done += kLanes, out += 16 * kLanes) {
    const uint64_t global_row = random.first_row + (uint64_t)row;
    I c[4] = {splat((int32_t)(random.first_column / 16 + (uint32_t)unit)) + lane_index(),
              splat((int32_t)(uint32_t)global_row), splat((int32_t)(uint32_t)(global_row >> 32)),
              splat((int32_t)random.step)};
    const int64_t wanted = count - done < kLanes ? count - done : kLanes;
    if (unit + wanted > units_per_row) {  // lanes of several rows
      for (int64_t lane = 0, r = row, u = unit; lane < wanted; lane++) {
        const uint64_t global = random.first_row + (uint64_t)r;
        c[0][lane] = (int32_t)(random.first_column / 16 + (uint32_t)u);
        c[1][lane] = (int32_t)(uint32_t)global, c[2][lane] = (int32_t)(uint32_t)(global >> 32);
        if (++u == units_per_row) u = 0, r++;
      }
    }
    philox(c, random.key[0], random.key[1]);
    store_by_lane(out, c);
    unit += kLanes;
    if (unit >= units_per_row) row += unit / units_per_row, unit %= units_per_row;
  }
}

}  // namespace lowprec::LOWPREC_ISA
