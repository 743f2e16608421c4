// Largest magnitude of a matrix, or of the rotated matrix that is going to be quantized.
#pragma once

namespace lowprec::LOWPREC_ISA {

template <class In>
static inline I amax_of(const In* x, int64_t count, I most) {  // count: a multiple of 2 kLanes
  if constexpr (sizeof(In) == 2) {
    I halves{};
    for (int64_t i = 0; i < count; i += 2 * kLanes) halves = max_halves(load_magnitudes(x + i), halves);
    return max(pair_max(halves), most);
  } else {
    I other = most;
    for (int64_t i = 0; i < count; i += 2 * kLanes) {
      most = amax_with_nan(load(x + i), most);
      other = amax_with_nan(load(x + i + kLanes), other);
    }
    return max(most, other);
  }
}

// Patches of the rows: one long row where none is ragged.
template <class In>
static int32_t amax_tiles(const Job& given, int64_t begin, int64_t end) {
  const Tiles plan(given);
  const Job& job = plan.job;
  I most = splat(0);
  const auto patch = [&](const In* x, int64_t cols) {
    if (!job.hadamard) return amax_of(x, cols, most);
    In rotated[kMostElements];
    rotate_row(job, x, cols, rotated);
    return amax_of(rotated, cols, most);
  };
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / plan.chunks, col = item % plan.chunks * plan.chunk;
    const int64_t known = least(job.x_cols - col, plan.chunk), whole = known / plan.unit * plan.unit;
    const In* x = (const In*)job.x + row * job.x_cols + col;
    most = patch(x, whole);
    if (whole == known) continue;
    In padded[128] = {};
    __builtin_memcpy(padded, x + whole, bytes<In>(known - whole));
    most = patch(padded, plan.unit);
  }
  return reduce_max(most);
}

// Strips of the rotated columns.
template <class In>
static int32_t amax_columns(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t unit = 2 * kLanes;
  const Columns plan(job);
  const int64_t H = job.hadamard, stride = bytes<In>(job.x_cols);
  I most = splat(0);
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / plan.chunks * plan.strip, col = item % plan.chunks * plan.chunk;
    const int64_t rows = least(job.x_rows - row, H);
    const int64_t width = least(job.cols - col, plan.chunk), whole = width / unit * unit;
    const Rows<const In> x{(const In*)job.x + row * job.x_cols + col, stride};
    most = amax_rotated_columns(job, x, rows, whole, most);
    if (whole == width) continue;
    In padded[kStripRows * unit] = {};
    for (int64_t r = 0; r < rows; r++) __builtin_memcpy(padded + r * unit, x[r] + whole, bytes<In>(width - whole));
    most = amax_rotated_columns(job, Rows<const In>{padded, bytes<In>(unit)}, rows, unit, most);
  }
  const F rounded = sizeof(In) == 2 ? round_number_to_bf16((F)most) : (F)most;
  return reduce_max(sizeof(In) == 2 ? (I)rounded & splat((int32_t)0xffff0000u) : (I)rounded);
}

}  // namespace lowprec::LOWPREC_ISA
