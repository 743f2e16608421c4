// What one AdamW step of one fragment has to do: plain data, shared by adamw_ops.cpp and by the instruction sets.
// lowprec/adamw.py is the formula, lowprec/codecs.py what the states are stored as.
#pragma once
#include "job.h"

namespace lowprec {

constexpr int64_t kUnit = 256;  // elements of a unit of work: the largest block, and a row of random bits

// kFloat, kBf16; kHalf, kByte: FP16 and E4M3 with one power-of-two scale; kByteBlock: E4M3 with a scale of 256;
// kBook8: codes of 256; kBook4: codes of 128, two a byte; kRank1: as kBook4, with scales of rows and columns.
enum class Store : int32_t { kFloat, kBf16, kHalf, kByte, kByteBlock, kBook8, kBook4, kRank1 };
enum class Write : int32_t { kNearest, kStochastic, kKahan, kCollageLight, kCollagePlus };

struct State {
  Store store;
  void* payload;        // [count], or [ceil(count / 2)] bytes of two codes, the even one in the low nibble
  float* scales;        // of blocks: read, then written
  float scale;          // of the tensor, as it was
  float next_scale;     // and as it will be
  const float* rows;    // kRank1: maxima of all rows and columns, as they were; as they will be:
  const float* columns;
  const float* next_rows;     // their inverses
  const float* next_columns;
  bool linear;          // the codebook is 1/16 .. 16/16
  const float* values;  // codebook [16 or 256]
  const float* limits;  // [16 or 256]: midpoints between neighbours, then Inf
  const uint8_t* cells;  // [65536], kBook8: code of the smallest number whose upper 16 bits are the index
  int64_t found_at;     // where its maxima are among those of adamw_maxima
};

struct AdamJob {
  int64_t count, offset;  // of the fragment, in the tensor
  int64_t row_length;     // columns of the tensor
  int64_t row_count;
  const void* grad;       // [count], kFloat or kBf16
  Store grad_store;
  State exp_avg, exp_avg_sq, weight;
  Write write;
  Bf16* low;              // Kahan's compensation, Collage's low part
  Bf16* exp_avg_sq_low;   // Collage-plus
  Random random;          // of the weight; first_row: offset / 256
  // grad, m and v, the change, the weight, Collage
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, minus_step, root_correction, eps, keep, decay, beta1;
  float beta2_high, beta2_low;
  double* tally;  // [units, 3]: intended x applied, intended^2, lost; null: not wanted
};

}  // namespace lowprec
