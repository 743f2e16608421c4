// Blocks that lie along the rows: R x C with C a multiple of 16 (1 x 32, 1 x 16, 16 x 16, 1 x 128, ...), and the
// whole tensor with a given scale.
//
// One pass in the first-level cache: the maxima of kLanes blocks side by side become one vector, so that a
// scale costs 1 / kLanes of its arithmetic; then the same elements are read again, rounded and written.
// Blocks of one row do not care where a row ends, if no block is ragged: the matrix is then one long row.
#pragma once

namespace lowprec::LOWPREC_ISA {

constexpr int64_t kMostElements = 32768;  // of a patch, so that a rotated copy stays in the second-level cache

static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Tiles {
  Job job;
  Scaler scaler;
  Grid grid;
  int64_t random_cols;  // of the matrix before it became one long row
  int64_t unit;         // columns: what a patch's width must be a multiple of
  int64_t chunk;        // columns of an item of work; its rows are a block's
  int64_t chunks;       // side by side

  explicit Tiles(const Job& given) : job(given), scaler(given), grid(given.element), random_cols(given.cols) {
    if (job.block_rows == 1 && job.x_cols == job.cols && job.cols % job.block_cols == 0 && job.cols % 16 == 0) {
      job.cols = job.x_cols = job.rows * job.cols;
      job.scale_cols = job.cols / job.block_cols;
      job.rows = job.x_rows = 1;
    }
    unit = 2 * kLanes > job.hadamard ? 2 * kLanes : job.hadamard;
    if (job.block_cols > unit) unit = job.block_cols;
    chunk = least(kMostElements / job.block_rows, 2048) / unit * unit;
    if (chunk == 0) chunk = unit;
    chunks = (job.cols + chunk - 1) / chunk;
  }
  int64_t items() const { return (job.rows + job.block_rows - 1) / job.block_rows * chunks; }
};

static inline void raise_to(int32_t* most, int32_t value) {
  int32_t old = __atomic_load_n(most, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(most, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Maximum of C columns, in as many lanes as it comes.
template <int C>
static LOWPREC_INLINE I amax_lanes(const float* x, I most) {
#pragma GCC unroll 8
  for (int k = 0; k < C; k += kLanes) most = amax_with_nan(load(x + k), most);
  return most;
}
template <int C>
static LOWPREC_INLINE I amax_lanes(const Bf16* x, I most) {
#pragma GCC unroll 8
  for (int k = 0; k < C; k += 2 * kLanes) most = max_halves(load_magnitudes(x + k), most);
  return most;
}

// Maxima of kLanes blocks side by side; NaN if there is one. A vector of BF16 may hold two blocks (kPairs).
template <int C, class In>
static LOWPREC_INLINE I amax_tiles(Rows<const In> x, int64_t rows) {
  constexpr bool kPairs = sizeof(In) == 2 && C < 2 * kLanes;
  constexpr int kWidth = kPairs ? 2 * C : C, kCount = kPairs ? kLanes / 2 : kLanes;
  I maxima[kCount];
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) maxima[t] = amax_lanes<kWidth>(x.data + t * kWidth, I{});
  for (int64_t r = 1; r < rows; r++)
#pragma GCC unroll 16
    for (int t = 0; t < kCount; t++) maxima[t] = amax_lanes<kWidth>(x[r] + t * kWidth, maxima[t]);
  if constexpr (kPairs) return lane_max_of_halves(maxima);
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) maxima[t] = sizeof(In) == 2 ? pair_max(maxima[t]) : maxima[t];
  return lane_max(maxima);
}

// The same of fewer blocks.
template <int C, class In>
static I amax_few_tiles(Rows<const In> x, int64_t rows, int tiles) {
  int32_t most[kLanes] = {};
  for (int t = 0; t < tiles; t++) {
    I lanes{};
    for (int64_t r = 0; r < rows; r++)
      for (int k = 0; k < C; k += kLanes) lanes = amax_with_nan(load(x[r] + t * C + k), lanes);
    most[t] = reduce_max(lanes);
  }
  return load(most);
}

// The same without NaN, of the first `known` columns, the others being padding.
template <int C, class In>
static I amax_tiles_without_nan(Rows<const In> x, int64_t rows, int tiles, int64_t known) {
  I maxima[kLanes] = {};
  for (int t = 0; t < tiles; t++) {
    I most = splat(-1);
    for (int64_t r = 0; r < rows; r++)
      for (int k = 0; k < C; k += kLanes)
        most = amax_without_nan(load(x[r] + t * C + k), most, lane_index() + splat(t * C + k) < splat((int32_t)known));
    maxima[t] = most;
  }
  return or_nan(lane_max(maxima));
}

constexpr int kMostTiles = 128;  // side by side in a patch: 2048 / 16

struct Scales {
  float encode[kMostTiles + 16], decode[kMostTiles + 16];
};

// Scales of the blocks of a patch. Many at once, so that the processor overlaps their long chains of operations.
template <int C, class In>
static inline Care scale_tiles(const Tiles& plan, Rows<const In> x, int64_t rows, int64_t cols, int64_t row, int64_t col,
                               bool stochastic, Scales& scales) {
  const Job& job = plan.job;
  const Scaler& scaler = plan.scaler;
  const bool given = scaler.scale.rule == Rule::kGiven;
  const int all_tiles = (int)((cols + C - 1) / C);
  Doubts doubts;
  for (int first = 0; first < all_tiles; first += kLanes) {
    const int tiles = all_tiles - first < kLanes ? all_tiles - first : kLanes;
    const Rows<const In> from{x.data + first * C, x.stride};
    I seen{};
    if (!given || job.amax_seen)
      seen = tiles == kLanes ? amax_tiles<C>(from, rows) : amax_few_tiles<C>(from, rows, tiles);
    if (given && job.amax_seen) raise_to(job.amax_seen, reduce_max(seen));
    I amax = seen;
    if (scaler.ignores_nan && !all(seen <= kInfinity))
      amax = amax_tiles_without_nan<C>(from, rows, tiles, job.cols - col - first * C);
    const BlockScale scale = scaler(amax);
    store(scales.encode + first, scale.encode), store(scales.decode + first, scale.decode);
    scaler.doubt(doubts, seen, scale, stochastic);
    if (job.scales && !given)
      scaler.store_codes(job.scales, row / job.block_rows * job.scale_cols + col / C + first, scale.code,
                         (int)least(job.scale_cols - col / C - first, tiles));
  }
  return doubts.care();
}

template <int C, class In, class Out>
static inline void round_tiles(const Tiles& plan, Rows<const In> x, Rows<Out> out, int64_t rows, int64_t cols,
                               const Scales& scales) {
  const RoundInPlace round(plan.grid);
  int32_t binades[kMostTiles + 16];
  for (int64_t t = 0; t * C < cols; t += kLanes)
    store((float*)binades + t, (F)plan.grid.smallest_binade * load(scales.decode + t));
  for (int64_t r = 0; r < rows; r++) {
    const In* from = x[r];
    Out* to = out[r];
    for (int64_t c = 0; c < cols; c += 2 * kLanes) {
      const F pair[2] = {load(from + c), load(from + c + kLanes)};
      const I smallest[2] = {splat(binades[c / C]), splat(binades[(c + kLanes) / C])};
      emit_in_place(at(to, c), round, pair, smallest);
    }
  }
}

// Up to kMostTiles blocks side by side. `cols` is a multiple of 2 kLanes; row and col place them in the matrix.
template <int C, bool kStochastic, class In, class Out>
static void quantize_tiles(const Tiles& plan, Rows<const In> x, Rows<Out> out, int64_t rows, int64_t cols, int64_t row,
                           int64_t col) {
  Scales scales;
  const Care care = scale_tiles<C>(plan, x, rows, cols, row, col, kStochastic, scales);
  if constexpr (!kStochastic) {
    if (care == Care::kNone && plan.scaler.power_of_two) return round_tiles<C>(plan, x, out, rows, cols, scales);
  }
  uint8_t random[kStochastic ? kMostTiles * 16 + 16 * kLanes : 1];
  with_emit<kStochastic, Out>(plan.grid, care, plan.scaler.scale.rule == Rule::kTwoLevel, [&](auto emit) {
    for (int64_t r = 0; r < rows; r++) {
      const In* from = x[r];
      Out* to = out[r];
      if (kStochastic)
        random_bytes(random, plan.job.random, row + r + col / plan.random_cols, col % plan.random_cols / 16,
                     (cols + 15) / 16, (plan.random_cols + 15) / 16);
      for (int64_t c = 0; c < cols; c += 2 * kLanes) {
        const int64_t a = c / C, b = (c + kLanes) / C;
        const F pair[2] = {load(from + c), load(from + c + kLanes)};
        const F encode[2] = {splat(scales.encode[a]), splat(scales.encode[b])};
        const F decode[2] = {splat(scales.decode[a]), splat(scales.decode[b])};
        emit(at(to, c), pair, encode, decode, random + (kStochastic ? c : 0));
      }
    }
  });
}

// A patch whose width is a multiple of plan.unit, at most 2048: rotated first if asked.
template <int C, bool kStochastic, class In, class Out>
static void quantize_patch(const Tiles& plan, Rows<const In> x, Rows<Out> out, int64_t rows, int64_t cols, int64_t row,
                           int64_t col) {
  if (!plan.job.hadamard) return quantize_tiles<C, kStochastic>(plan, x, out, rows, cols, row, col);
  In rotated[kMostElements];
  for (int64_t r = 0; r < rows; r++) rotate_row(plan.job, x[r], cols, rotated + r * cols);
  quantize_tiles<C, kStochastic>(plan, Rows<const In>{rotated, bytes<In>(cols)}, out, rows, cols, row, col);
}

// An odd row of 4-bit codes ends in an empty nibble, even where padding became a NaN.
template <class Out>
static inline void clear_last(Out*, int64_t) {}
static inline void clear_last(Code4* out, int64_t count) { out[count / 2].bits &= 15; }

template <int C, bool kStochastic, class In, class Out>
static void tiles_range(const Job& given, int64_t begin, int64_t end) {
  const Tiles plan(given);
  const Job& job = plan.job;
  const Rows<const In> all_x{(const In*)job.x, bytes<In>(job.x_cols)};
  const Rows<Out> all_out{(Out*)job.out, bytes<Out>(job.cols)};
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / plan.chunks * job.block_rows, col = item % plan.chunks * plan.chunk;
    const int64_t rows = least(job.rows - row, job.block_rows), width = least(job.cols - col, plan.chunk);
    const int64_t known = least(job.x_cols - col, width), whole = known / plan.unit * plan.unit;
    const Rows<const In> x{all_x[row] + col, all_x.stride};
    const Rows<Out> out{at(all_out[row], col), all_out.stride};
    if (whole) quantize_patch<C, kStochastic>(plan, x, out, rows, whole, row, col);
    if (whole == width) continue;
    // the ragged end: padded with zeros, quantized aside, and as much copied back as the result has columns
    In padded[128 * 128] = {};
    Out aside[128 * 128];
    const Rows<Out> aside_rows{aside, bytes<Out>(plan.unit)};
    for (int64_t r = 0; r < rows; r++) __builtin_memcpy(padded + r * plan.unit, x[r] + whole, bytes<In>(known - whole));
    quantize_patch<C, kStochastic>(plan, Rows<const In>{padded, bytes<In>(plan.unit)}, aside_rows, rows, plan.unit, row,
                                   col + whole);
    for (int64_t r = 0; r < rows; r++) {
      if (width % 2) clear_last(aside_rows[r], width - whole);
      __builtin_memcpy(at(out[r], whole), aside_rows[r], bytes<Out>(width - whole));
    }
  }
}

}  // namespace lowprec::LOWPREC_ISA
