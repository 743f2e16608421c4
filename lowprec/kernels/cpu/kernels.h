// The kernels of one instruction set, chosen by what a job says. Included by isa_*.cpp after their simd_*.h.
#pragma once
// clang-format off: each builds on the one before
#include "philox.h"
#include "grid.h"
#include "scale.h"
#include "emit.h"
#include "hadamard.h"
#include "tiles.h"
#include "codetile.h"
#include "columns.h"
#include "amax.h"
#include "decode.h"
#include "adamw.h"
// clang-format on

namespace lowprec::LOWPREC_ISA {

template <bool kStochastic, class In, class Out>
static void quantize_to(const Job& job, int64_t begin, int64_t end) {
  if (job.columns) return columns_range<kStochastic, In, Out>(job, begin, end);
  switch (job.block_cols) {
    case 16: return tiles_range<16, kStochastic, In, Out>(job, begin, end);
    case 32: return tiles_range<32, kStochastic, In, Out>(job, begin, end);
    case 64: return tiles_range<64, kStochastic, In, Out>(job, begin, end);
    default: return tiles_range<128, kStochastic, In, Out>(job, begin, end);
  }
}

template <bool kStochastic, class In>
static void quantize_from(const Job& job, int64_t begin, int64_t end) {
  switch (job.out_type) {
    case Type::kFloat: return quantize_to<kStochastic, In, float>(job, begin, end);
    case Type::kBf16: return quantize_to<kStochastic, In, Bf16>(job, begin, end);
    case Type::kCode8: return quantize_to<kStochastic, In, Code8>(job, begin, end);
    case Type::kCode4: return quantize_to<kStochastic, In, Code4>(job, begin, end);
  }
}

static void quantize(const Job& job, int64_t begin, int64_t end) {
  if (job.random.on)
    job.in == Type::kFloat ? quantize_from<true, float>(job, begin, end) : quantize_from<true, Bf16>(job, begin, end);
  else
    job.in == Type::kFloat ? quantize_from<false, float>(job, begin, end) : quantize_from<false, Bf16>(job, begin, end);
}

static int32_t amax(const Job& job, int64_t begin, int64_t end) {
  if (job.columns)
    return job.in == Type::kFloat ? amax_columns<float>(job, begin, end) : amax_columns<Bf16>(job, begin, end);
  return job.in == Type::kFloat ? amax_tiles<float>(job, begin, end) : amax_tiles<Bf16>(job, begin, end);
}

static int64_t items(const Job& job) { return job.columns ? Columns(job).items() : Tiles(job).items(); }

static void dequantize(const DecodeJob& job, int64_t first_row, int64_t last_row) {
  const bool wide = job.out_type == Type::kFloat;
  if (job.code_type == Type::kCode8)
    return wide ? decode_rows<Code8, float>(job, first_row, last_row) : decode_rows<Code8, Bf16>(job, first_row, last_row);
  return wide ? decode_rows<Code4, float>(job, first_row, last_row) : decode_rows<Code4, Bf16>(job, first_row, last_row);
}

}  // namespace lowprec::LOWPREC_ISA
