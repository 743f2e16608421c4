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

struct CodeTile {
  uint8_t codes[kTileRows * kTileCols];

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
    uint8_t* out = (uint8_t*)job.out + col * stride + (pairs ? row / 2 : row);
    for (int64_t c = 0; c < cols; c++) __builtin_memcpy(out + c * stride, turned + c * kTileRows, count);
  }
};

}  // namespace lowprec::LOWPREC_ISA
