// Quantizers of tensors, of which the operators are made: those of one matrix (ops.cpp) and of a linear (linear_ops.cpp).
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "job.h"

namespace lowprec {

using MaybeTensor = std::optional<at::Tensor>;

struct Spec {  // in the order of the integers
  int64_t mantissa_bits, min_exponent, sign_bit, nan_code, inf_code, twos_complement, max_bits;
  int64_t rule, max_exponent, pow2, scale_max_bits, three_quarters;
  int64_t block_rows, block_cols, columns, hadamard, upright;
};

struct Inputs {  // of a quantizer, beside its spec
  MaybeTensor amax, scale, signs, random;
};

// A matrix on its way through a quantizer: made, told what to write, and run, at once or rows by rows.
class Task {
 public:
  static constexpr int64_t kRows = 128;  // blocks, rotated groups and items of work do not cross a multiple of it

  Task(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec_values);  // finds the tensor's scale
  Task(const Task&) = delete;  // jobs point into it

  void write_values(at::ScalarType dtype);
  void write_codes();  // and scales
  void run() const;
  // On this thread alone, rows from a multiple of kRows on. values: where to write them instead of out(); codes must
  // lie as x does.
  void run_rows(int64_t first, int64_t count, float* values = nullptr) const;

  int64_t rows() const { return job_.x_rows; }
  int64_t cols() const { return job_.cols; }
  const at::Tensor& out() const { return out_; }
  const at::Tensor& scales() const { return scales_; }
  float after() const { return after_; }  // what belongs after a GEMM
  float amax() const;                     // the tensor's; 0 where none is needed; under delayed scaling after the run

 private:
  void find_scale(const Inputs& inputs);

  Spec spec_;
  Job job_;
  at::Tensor out_, scales_;
  float after_ = 1.0f, amax_ = 0.0f;
  int32_t seen_ = 0;
};

void run_together(const Task& one, const Task* other);  // of the same matrix; other: null or another one

Spec parse(at::IntArrayRef values);
Job job_of(const at::Tensor& x, const Spec& spec, const MaybeTensor& signs, const MaybeTensor& random);
Type type_of(at::ScalarType dtype);
float amax_of(Job job);
at::Tensor unpack(const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef spec_values, int64_t length,
                  at::ScalarType dtype);  // the values of packed codes
at::Tensor scalar(float value);
float value_of(const at::Tensor& scalar, const char* name);

}  // namespace lowprec
