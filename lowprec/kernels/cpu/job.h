// What one kernel call has to do: plain data, shared by the operators (ops.cpp) and by the three instruction
// sets. No SIMD and no torch here: the files that are compiled for one instruction set must not instantiate
// code that another file may share.
#pragma once
#include <cstdint>

// Vectors must not pass through memory: what takes and returns them in inner loops is always inlined.
#define LOWPREC_INLINE inline __attribute__((always_inline))

namespace lowprec {

struct Bf16 {
  uint16_t bits;
};
struct Code8 {  // one element a byte
  uint8_t bits;
};
struct Code4 {  // two elements a byte, the even one in the low nibble
  uint8_t bits;
};

template <class T>
constexpr int64_t bytes(int64_t elements) {
  return elements * (int64_t)sizeof(T);
}
template <>
constexpr int64_t bytes<Code4>(int64_t elements) {
  return (elements + 1) / 2;
}

enum class Type : int32_t { kFloat, kBf16, kCode8, kCode4 };

// Rule by which a block's amax becomes its scale (lowprec/formats.py); kGiven: one scale for the tensor.
enum class Rule : int32_t { kGiven, kRceil, kFloor, kCeil, kEven, kTwoLevel, kFp32, kPow2 };

struct Element {           // sign, exponent and mantissa format, or two's complement fixed point (MX INT8)
  int32_t mantissa_bits;   // of the significand's fraction
  int32_t min_exponent;    // of the smallest normal binade
  int32_t sign_bit;        // position of the sign in a code
  int32_t nan_code;        // without sign; -1: the format has none
  int32_t inf_code;        // without sign; -1: the format has none
  bool twos_complement;
  float max;
};

struct Scale {
  Rule rule;
  int32_t max_exponent;  // floor(log2(element max)), for the OCP rules
  float element_max;
  float largest;         // an FP32 encode scale that overflows becomes this: the input dtype's largest number
  float encode, decode;  // kGiven: the scale and 1; kTwoLevel: S * (1/6) and 1 / S, S the tensor's encode scale
  float before;          // multiplies encode: 3/4 or 1
};

struct Random {  // Philox4x32-10; counter words: column / 16, row, row >> 32, step
  bool on;
  uint32_t key[2];
  uint32_t step;
  uint64_t first_row;
  uint32_t first_column;  // multiple of 16
};

template <class T>
struct Rows {  // the rows of a matrix, `stride` bytes apart
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return (T*)((char*)data + row * stride); }
};

struct Job {
  const void* x;  // [x_rows, x_cols], kFloat or kBf16
  void* out;      // values [rows, cols]; codes [rows, cols], of column blocks transposed: [cols, rows], unless upright
  void* scales;   // codes of the blocks' scales, of column blocks transposed, unless upright; null: not wanted
  int64_t x_rows, x_cols;
  int64_t rows, cols;  // of the result: rounded up to whole rotated groups
  int64_t scale_cols;  // of `scales` as it lies in memory
  Type in, out_type;
  bool columns;                    // blocks run down the columns: block_rows x 1
  bool upright;                    // codes and scales of such are wanted as the matrix lies
  int64_t block_rows, block_cols;  // that share a scale
  int32_t hadamard;                // 0: none; along the blocks
  const float* signs;              // [hadamard]: +-1 / sqrt(hadamard)
  Element element;
  Scale scale;
  Random random;
  int32_t* amax_seen;  // bits; raised to what is met, if the scale is given; null: not wanted
};

struct DecodeJob {
  const void* codes;  // [rows, cols]
  const void* scales;    // [ceil(rows / block_rows), scale_cols]; uint8, or float if rule is kFp32 or kPow2
  void* out;             // [rows, cols], kFloat or kBf16
  int64_t rows, cols, scale_cols;
  Type code_type, out_type;
  int64_t block_rows, block_cols;
  Element element;
  Rule rule;  // kGiven: scale 1
};

struct AdamJob;  // adamw_job.h

struct Kernels {  // one instruction set; work is numbered 0 .. items - 1, in independent items
  const char* name;
  int64_t (*items)(const Job&);
  void (*quantize)(const Job&, int64_t begin, int64_t end);
  int32_t (*amax)(const Job&, int64_t begin, int64_t end);  // bits of the (rotated) matrix's; NaN is the largest
  void (*dequantize)(const DecodeJob&, int64_t first_row, int64_t last_row);
  void (*adamw)(const AdamJob&, int64_t first_unit, int64_t last_unit);
  void (*adamw_maxima)(const AdamJob&, int64_t first_unit, int64_t last_unit, float* found);
};

const Kernels& kernels_in_use();  // ops.cpp

}  // namespace lowprec
