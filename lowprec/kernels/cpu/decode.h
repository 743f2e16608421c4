// From codes and scales back to values, row by row.
#pragma once

namespace lowprec::LOWPREC_ISA {

static LOWPREC_INLINE I load_codes(const Code8* p) { return load_bytes(&p->bits); }
static LOWPREC_INLINE I load_codes(const Code4* p) { return load_nibbles(&p->bits); }

struct ScaleTable {  // decode scales of all bytes
  float of[256 + kLanes];
  ScaleTable(Rule rule) {
    const Grid e4m3(Element{3, -6, 7, 0x7f, -1, false, 448.0f});
    for (int code = 0; code < 256; code += kLanes) {
      const I codes = splat(code) + lane_index();
      store(of + code, rule == Rule::kTwoLevel ? decode(e4m3, codes) : from_e8m0(codes).decode);
    }
  }
};

template <class Code, class Out>
static void decode_row(const DecodeJob& job, const Grid& grid, const ScaleTable& table, int64_t row) {
  const bool wide = job.rule == Rule::kFp32 || job.rule == Rule::kPow2;
  const int64_t first_scale = row / job.block_rows * job.scale_cols;
  const auto scale_at = [&](int64_t col) {
    if (job.rule == Rule::kGiven) return splat(1.0f);
    const int64_t index = first_scale + least(col, job.cols - 1) / job.block_cols;
    return splat(wide ? ((const float*)job.scales)[index] : table.of[((const uint8_t*)job.scales)[index]]);
  };
  const auto pair = [&](const Code* codes, Out* out, int64_t col) {
    F v0 = decode(grid, load_codes(codes)) * scale_at(col);
    F v1 = decode(grid, load_codes(at(codes, kLanes))) * scale_at(col + kLanes);
    if (sizeof(Out) == 2) v0 = round_number_to_bf16(v0), v1 = round_number_to_bf16(v1);
    store_pair(out, v0, v1);
  };
  const Code* codes = Rows<const Code>{(const Code*)job.codes, bytes<Code>(job.cols)}[row];
  Out* out = (Out*)job.out + row * job.cols;
  const int64_t whole = job.cols / (2 * kLanes) * (2 * kLanes);
  for (int64_t col = 0; col < whole; col += 2 * kLanes) pair(at(codes, col), out + col, col);
  if (whole == job.cols) return;
  Code padded[2 * kLanes] = {};
  Out aside[2 * kLanes];
  __builtin_memcpy(padded, at(codes, whole), bytes<Code>(job.cols - whole));
  pair(padded, aside, whole);
  __builtin_memcpy(out + whole, aside, bytes<Out>(job.cols - whole));
}

template <class Code, class Out>
static void decode_rows(const DecodeJob& job, int64_t first_row, int64_t last_row) {
  const Grid grid(job.element);
  const ScaleTable table(job.rule);
  for (int64_t row = first_row; row < last_row; row++) decode_row<Code, Out>(job, grid, table, row);
}

}  // namespace lowprec::LOWPREC_ISA
