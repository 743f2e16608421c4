// Blocks that run down the columns, B x 1: the copy of a matrix that is quantized along its rows' index (wgrad).
//
// Lanes are columns, so maxima, scales and rotations need no shuffles. A strip of B rows is read twice from the
// cache, once down the columns for the maxima, once along the rows for the result. Where codes are wanted transposed,
// those of a strip and of its scales are collected in a small tile, which is then turned and written in whole lines.
#pragma once

namespace lowprec::LOWPREC_ISA {

constexpr int64_t kStripRows = 128;  // the most
constexpr int64_t kStripCols = 1024;

struct Columns {
  Job job;
  Scaler scaler;
  Grid grid;
  int64_t group;  // rows that are rotated and scaled independently of others
  int64_t strip;  // rows of an item of work
  int64_t chunk;  // columns of an item of work
  int64_t chunks;
  CodeTile* tile = nullptr;  // where codes are wanted transposed

  explicit Columns(const Job& given) : job(given), scaler(given), grid(given.element) {
    const bool turned = !job.upright && (job.out_type == Type::kCode8 || job.out_type == Type::kCode4);
    group = job.block_rows > job.hadamard ? job.block_rows : job.hadamard;
    strip = turned ? kStripRows : group;
    chunk = turned ? kTileCols : least(kStripCols, kMostElements / group);
    chunks = (job.cols + chunk - 1) / chunk;
  }
  int64_t items() const { return (job.rows + strip - 1) / strip * chunks; }
};

// Maxima of 2 kLanes columns; NaN if there is one.
template <class In>
static inline void amax_pair(Rows<const In> x, int64_t rows, int64_t col, I most[2]) {
  if constexpr (sizeof(In) == 2) {
    I halves{};
    for (int64_t r = 0; r < rows; r++) halves = max_halves(load_magnitudes(x[r] + col), halves);
    Bf16 one_each[2 * kLanes];
    __builtin_memcpy(one_each, &halves, sizeof one_each);
    most[0] = (I)load(one_each), most[1] = (I)load(one_each + kLanes);
  } else {
    I first{}, second{};
    for (int64_t r = 0; r < rows; r++) {
      first = amax_with_nan(load(x[r] + col), first);
      second = amax_with_nan(load(x[r] + col + kLanes), second);
    }
    most[0] = first, most[1] = second;
  }
}

template <class In>
static void amax_pair_without_nan(Rows<const In> x, int64_t rows, int64_t col, I most[2]) {
  for (int half = 0; half < 2; half++) {
    most[half] = splat(-1);
    for (int64_t r = 0; r < rows; r++)
      most[half] = amax_without_nan(load(x[r] + col + half * kLanes), most[half], splat(-1));
    most[half] = or_nan(most[half]);
  }
}

// Scales of one block of each column.
template <class In>
static inline Care scale_columns(const Columns& plan, Rows<const In> x, int64_t rows, int64_t cols, int64_t row,
                                 int64_t col, bool stochastic, float* encodes, float* decodes) {
  const Scaler& scaler = plan.scaler;
  const bool wants_codes = plan.job.scales && scaler.scale.rule != Rule::kGiven;
  Doubts doubts;
  for (int64_t pair = 0; pair < cols; pair += 2 * kLanes) {
    I amax[2];
    amax_pair(x, rows, pair, amax);
    const I seen[2] = {amax[0], amax[1]};
    if (scaler.ignores_nan && !all((seen[0] <= kInfinity) & (seen[1] <= kInfinity)))
      amax_pair_without_nan(x, rows, pair, amax);
    for (int half = 0; half < 2; half++) {
      const int64_t c = pair + half * kLanes;
      const BlockScale scale = scaler(amax[half]);
      store(encodes + c, scale.encode), store(decodes + c, scale.decode);
      scaler.doubt(doubts, seen[half], scale, stochastic);
      if (wants_codes && plan.job.upright)
        scaler.store_codes(plan.job.scales, row / plan.job.block_rows * plan.job.scale_cols + col + c, scale.code,
                           (int)least(plan.job.cols - col - c, kLanes));
      else if (wants_codes)
        __builtin_memcpy(plan.tile->scales[row % plan.strip / plan.job.block_rows] + (col + c) % plan.chunk, &scale.code,
                         sizeof scale.code);
    }
  }
  return doubts.care();
}

template <class In, class Out>
static inline void round_columns(const Columns& plan, Rows<const In> x, Rows<Out> out, int64_t rows, int64_t cols,
                                 const float* decodes) {
  const RoundInPlace round(plan.grid);
  int32_t binades[kStripCols];
  for (int64_t c = 0; c < cols; c += kLanes)
    store((float*)binades + c, (F)plan.grid.smallest_binade * load(decodes + c));
  for (int64_t r = 0; r < rows; r++) {
    const In* from = x[r];
    Out* to = out[r];
    for (int64_t c = 0; c < cols; c += 2 * kLanes) {
      const F pair[2] = {load(from + c), load(from + c + kLanes)};
      const I smallest[2] = {load(binades + c), load(binades + c + kLanes)};
      emit_in_place(at(to, c), round, pair, smallest);
    }
  }
}

// One block of each of `cols` columns; cols is a multiple of 2 kLanes, at most kStripCols.
template <bool kStochastic, class In, class Out>
static void quantize_columns(const Columns& plan, Rows<const In> x, Rows<Out> out, int64_t rows, int64_t cols, int64_t row,
                             int64_t col) {
  float encodes[kStripCols], decodes[kStripCols];
  const Care care = scale_columns(plan, x, rows, cols, row, col, kStochastic, encodes, decodes);
  if constexpr (!kStochastic) {
    if (care == Care::kNone && plan.scaler.power_of_two) return round_columns(plan, x, out, rows, cols, decodes);
  }
  uint8_t random[kStochastic ? kStripCols + 16 * kLanes : 1];
  with_emit<kStochastic, Out>(plan.grid, care, plan.scaler.scale.rule == Rule::kTwoLevel, [&](auto emit) {
    for (int64_t r = 0; r < rows; r++) {
      const In* from = x[r];
      Out* to = out[r];
      if (kStochastic) random_bytes(random, plan.job.random, row + r, col / 16, (cols + 15) / 16, plan.job.cols / 16 + 16);
      for (int64_t c = 0; c < cols; c += 2 * kLanes) {
        const F pair[2] = {load(from + c), load(from + c + kLanes)};
        const F encode[2] = {load(encodes + c), load(encodes + c + kLanes)};
        const F decode[2] = {load(decodes + c), load(decodes + c + kLanes)};
        emit(at(to, c), pair, encode, decode, random + (kStochastic ? c : 0));
      }
    }
  });
}

// `rows` rows of the result, of which x holds `known`: rotated first if asked, then block after block.
template <bool kStochastic, class In, class Out>
static void quantize_strip(const Columns& plan, Rows<const In> x, Rows<Out> out, int64_t known, int64_t rows, int64_t cols,
                           int64_t row, int64_t col) {
  const int64_t B = plan.job.block_rows, H = plan.job.hadamard;
  const auto blocks = [&](Rows<const In> source, int64_t start, int64_t end) {
    for (int64_t r = start; r < end; r += B)
      quantize_columns<kStochastic>(plan, Rows<const In>{source[r - start], source.stride}, Rows<Out>{out[r], out.stride},
                                    least(end - r, B), cols, row + r, col);
  };
  if (!H) return blocks(x, 0, rows);
  In rotated[kMostElements];
  for (int64_t start = 0; start < rows; start += plan.group) {
    const int64_t end = least(start + plan.group, rows);  // whole rotated groups
    for (int64_t r = start; r < end; r += H)
      rotate_columns(plan.job, Rows<const In>{x[r], x.stride}, known - r, cols, rotated + (r - start) * cols, cols);
    blocks(Rows<const In>{rotated, bytes<In>(cols)}, start, end);
  }
}

template <bool kStochastic, class In, class Out>
static void columns_range(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t unit = least(2 * kLanes, 16) == 16 ? 2 * kLanes : 16;  // a counter's random bytes are not divided
  Columns plan(job);
  const Rows<const In> all_x{(const In*)job.x, bytes<In>(job.x_cols)};
  const Rows<Out> all_out{(Out*)job.out, bytes<Out>(job.cols)};
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / plan.chunks * plan.strip, col = item % plan.chunks * plan.chunk;
    const int64_t rows = least(job.rows - row, plan.strip), known = least(job.x_rows - row, rows);
    const int64_t width = least(job.cols - col, plan.chunk), whole = width / unit * unit;
    const Rows<const In> x{all_x[row] + col, all_x.stride};
    In padded[kStripRows * unit];  // the ragged end, padded with zeros
    const Rows<const In> rest{padded, bytes<In>(unit)};
    if (whole < width) {
      __builtin_memset(padded, 0, sizeof padded);
      for (int64_t r = 0; r < known; r++) __builtin_memcpy(padded + r * unit, x[r] + whole, bytes<In>(width - whole));
    }
    if (sizeof(Out) == 1 && !job.upright) {
      CodeTile tile{};
      plan.tile = &tile;
      const Rows<Code8> codes{(Code8*)tile.codes, kTileCols};
      if (whole) quantize_strip<kStochastic>(plan, x, codes, known, rows, whole, row, col);
      if (whole < width)
        quantize_strip<kStochastic>(plan, rest, Rows<Code8>{codes.data + whole, kTileCols}, known, rows, unit, row,
                                    col + whole);
      tile.write(job, rows, width, row, col);
      if (job.scales && job.scale.rule != Rule::kGiven) tile.write_scales(job, plan.scaler.wide, rows, width, row, col);
    } else {
      const Rows<Out> out{at(all_out[row], col), all_out.stride};
      if (whole) quantize_strip<kStochastic>(plan, x, out, known, rows, whole, row, col);
      if (whole == width) continue;
      Out aside[kStripRows * unit];
      const Rows<Out> aside_rows{aside, bytes<Out>(unit)};
      quantize_strip<kStochastic>(plan, rest, aside_rows, known, rows, unit, row, col + whole);
      for (int64_t r = 0; r < rows; r++) {
        if (width % 2) clear_last(aside_rows[r], width - whole);
        __builtin_memcpy(at(out[r], whole), aside_rows[r], bytes<Out>(width - whole));
      }
    }
  }
}

}  // namespace lowprec::LOWPREC_ISA
