// From codes and scales back to values, row by row.
#pragma once

namespace lowprec::LOWPREC_ISA {

static LOWPREC_INLINE I load_codes(const Code8* p) { return load_bytes(&p->bits); }
static LOWPREC_INLINE I load_codes(const Code4* p) { return load_nibbles(&p->bits); }

struct Numbers {  // of all 4-bit codes
  float of[16];
  explicit Numbers(const Grid& grid) {
    for (int code = 0; code < 16; code += kLanes) store(of + code, decode(grid, splat(code) + lane_index()));
  }
};

template <class Code>
struct Decoder {
  Grid grid;
  explicit Decoder(const Grid& g) : grid(g) {}
  LOWPREC_INLINE F operator()(const Code* codes) const { return decode(grid, load_codes(codes)); }
};
template <>
struct Decoder<Code4> {  // of sixteen numbers
  Numbers numbers;
  Table16 table;
  explicit Decoder(const Grid& g) : numbers(g), table(numbers.of) {}
  Decoder(const Decoder&) = delete;  // the table may point to the numbers
  LOWPREC_INLINE F operator()(const Code4* codes) const { return table[load_codes(codes)]; }
};

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

// Columns [first, last) of a row; scale_at(col) are the scales of kLanes of them, also of some beyond the last.
template <class Code, class Out, class Scale>
static LOWPREC_INLINE void decode_line(const DecodeJob& job, const Decoder<Code>& numbers, int64_t row, int64_t first,
                                       int64_t last, const Scale& scale_at) {
  const auto pair = [&](const Code* codes, Out* out, int64_t col) {
    F v0 = numbers(codes) * scale_at(col);
    F v1 = numbers(at(codes, kLanes)) * scale_at(col + kLanes);
    if (sizeof(Out) == 2) v0 = round_number_to_bf16(v0), v1 = round_number_to_bf16(v1);
    store_pair(out, v0, v1);
  };
  const Code* codes = Rows<const Code>{(const Code*)job.codes, bytes<Code>(job.cols)}[row];
  Out* out = (Out*)job.out + row * job.cols;
  const int64_t whole = first + (last - first) / (2 * kLanes) * (2 * kLanes);
  for (int64_t col = first; col < whole; col += 2 * kLanes) pair(at(codes, col), out + col, col);
  if (whole == last) return;
  Code padded[2 * kLanes] = {};
  Out aside[2 * kLanes];
  __builtin_memcpy(padded, at(codes, whole), bytes<Code>(last - whole));
  pair(padded, aside, whole);
  __builtin_memcpy(out + whole, aside, bytes<Out>(last - whole));
}

// Blocks of one column: the scales of a line of blocks are decoded once for all of its rows.
template <class Code, class Out>
static void decode_columns(const DecodeJob& job, const Decoder<Code>& numbers, const ScaleTable& table,
                           int64_t first_row, int64_t last_row) {
  const bool wide = job.rule == Rule::kFp32 || job.rule == Rule::kPow2;
  float scales[kStripCols + 2 * kLanes] = {};
  for (int64_t first = 0; first < job.cols; first += kStripCols) {
    const int64_t last = least(first + kStripCols, job.cols);
    for (int64_t row = first_row; row < last_row; row++) {
      const int64_t line = row / job.block_rows * job.scale_cols;
      if (row == first_row || row % job.block_rows == 0)
        for (int64_t col = first; col < last; col++)
          scales[col - first] =
              wide ? ((const float*)job.scales)[line + col] : table.of[((const uint8_t*)job.scales)[line + col]];
      decode_line<Code, Out>(job, numbers, row, first, last, [&](int64_t col) { return load(scales + col - first); });
    }
  }
}

template <class Code, class Out>
static void decode_row(const DecodeJob& job, const Decoder<Code>& numbers, const ScaleTable& table, int64_t row) {
  const bool wide = job.rule == Rule::kFp32 || job.rule == Rule::kPow2;
  const int64_t first_scale = row / job.block_rows * job.scale_cols;
  decode_line<Code, Out>(job, numbers, row, 0, job.cols, [&](int64_t col) {
    if (job.rule == Rule::kGiven) return splat(1.0f);
    const int64_t index = first_scale + least(col, job.cols - 1) / job.block_cols;
    return splat(wide ? ((const float*)job.scales)[index] : table.of[((const uint8_t*)job.scales)[index]]);
  });
}

template <class Code, class Out>
static void decode_rows(const DecodeJob& job, int64_t first_row, int64_t last_row) {
  const Decoder<Code> numbers{Grid(job.element)};
  const ScaleTable table(job.rule);
  if (job.block_cols == 1 && job.rule != Rule::kGiven)
    return decode_columns<Code, Out>(job, numbers, table, first_row, last_row);
  for (int64_t row = first_row; row < last_row; row++) decode_row<Code, Out>(job, numbers, table, row);
}

}  // namespace lowprec::LOWPREC_ISA
