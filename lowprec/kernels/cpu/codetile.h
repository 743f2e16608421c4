// A small tile of codes in the matrix's own orientation, which is written transposed: as codes of column blocks are
// kept, so that a GEMM's reduction axis comes last.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lowprec::LOWPREC_ISA {

constexpr int64_t kTileRows = 128;  // a whole line of memory for 4-bit codes, two for 8-bit ones
constexpr int64_t kTileCols = 256;  // as many as a vector of counters has random bytes for

static inline void transpose_16x16(const uint8_t* in, int64_t ld, uint8_t* out, int64_t ld_out) {
#if defined(__SSE2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i*)(in + i * ld));
  // interleaving rows i and i + 8 moves one bit of the row index into the column index; there are four
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 8; i++) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 16; i++) a[i] = b[i];
  }
  for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i*)(out + i * ld_out), a[i]);
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j * ld_out + i] = in[i * ld + j];
#endif
}

// `lines` lines of `count` bytes each, which were turned into lines of `ld`.
template <int64_t kCount>
static inline void copy_lines(uint8_t* out, int64_t stride, const uint8_t* turned, int64_t ld, int64_t lines, int64_t count) {
  for (int64_t c = 0; c < lines; c++) __builtin_memcpy(out + c * stride, turned + c * ld, kCount ? kCount : count);
}
static inline void write_lines(uint8_t* out, int64_t stride, const uint8_t* turned, int64_t ld, int64_t lines, int64_t count) {
  switch (count) {  // whole tiles of 8-bit and of 4-bit codes, and of scales of 16 and of 32 rows
    case 128: return copy_lines<128>(out, stride, turned, ld, lines, count);
    case 64: return copy_lines<64>(out, stride, turned, ld, lines, count);
    case 8: return copy_lines<8>(out, stride, turned, ld, lines, count);
    case 4: return copy_lines<4>(out, stride, turned, ld, lines, count);
    default: return copy_lines<0>(out, stride, turned, ld, lines, count);
  }
}

struct CodeTile {
  uint8_t codes[kTileRows * kTileCols];
  int32_t scales[kTileRows / 16][kTileCols];  // codes of blocks' scales; a block has 16 rows or more

  // The first `rows` rows and `cols` columns go to (row, col) of the result, [cols, rows] in memory.
  void write(const Job& job, int64_t rows, int64_t cols, int64_t row, int64_t col) {
    const bool pairs = job.out_type == Type::kCode4;
    const int64_t count = pairs ? (rows + 1) / 2 : rows, stride = pairs ? (job.rows + 1) / 2 : job.rows;
    if (pairs)
      for (int64_t r = 0; r < count; r++)
        for (int64_t c = 0; c < kTileCols; c++)
          codes[r * kTileCols + c] =
              (uint8_t)(codes[2 * r * kTileCols + c] | codes[(2 * r + 1) * kTileCols + c] << 4);
    uint8_t turned[kTileCols * kTileRows];
    for (int64_t r = 0; r < count; r += 16)
      for (int64_t c = 0; c < kTileCols; c += 16)
        transpose_16x16(codes + r * kTileCols + c, kTileCols, turned + c * kTileRows + r, kTileRows);
    write_lines((uint8_t*)job.out + col * stride + (pairs ? row / 2 : row), stride, turned, kTileRows, cols, count);
  }

  // As `write`. Scales of a column lie side by side: written block after block, two threads would contend for each line.
  void write_scales(const Job& job, bool wide, int64_t rows, int64_t cols, int64_t row, int64_t col) const {
    const int64_t count = (rows + job.block_rows - 1) / job.block_rows, first = col * job.scale_cols + row / job.block_rows;
    if (wide) {
      for (int64_t c = 0; c < cols; c++)
        for (int64_t b = 0; b < count; b++) ((int32_t*)job.scales)[first + c * job.scale_cols + b] = scales[b][c];
      return;
    }
    uint8_t narrow[16 * kTileCols] = {}, turned[kTileCols * 16];
    for (int64_t b = 0; b < count; b++)
      for (int64_t c = 0; c < kTileCols; c++) narrow[b * kTileCols + c] = (uint8_t)scales[b][c];
    for (int64_t c = 0; c < kTileCols; c += 16) transpose_16x16(narrow + c, kTileCols, turned + c * 16, 16);
    write_lines((uint8_t*)job.scales + first, job.scale_cols, turned, 16, cols, count);
  }
};

}  // namespace lowprec::LOWPREC_ISA
