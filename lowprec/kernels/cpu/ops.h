// The quantizers as functions on tensors: ops.cpp registers them, linear_ops.cpp composes them.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace lowprec {

using MaybeTensor = std::optional<at::Tensor>;

struct Inputs {  // of a quantizer, beside its spec; see ops.cpp
  MaybeTensor amax, scale, signs, random;
};

struct Quantizer {
  Inputs inputs;
  at::IntArrayRef spec;
  at::ScalarType dtype;  // of the decoded operand
};

struct TensorScale {
  float after = 1.0f, amax = 0.0f;  // what belongs after a GEMM; the tensor's amax, 0 where none is needed
};

struct Decoded {
  at::Tensor values;
  TensorScale found;
};

struct Packed {
  at::Tensor codes, scales;
  TensorScale found;
};

Decoded quantize_operand(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec, at::ScalarType dtype);
Packed quantize_packed(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec);
// The same of one matrix with two quantizers, in one pass over it.
std::pair<Decoded, Packed> quantize_and_pack(const at::Tensor& x, const Quantizer& first, const Quantizer& second);
std::pair<Decoded, Decoded> quantize_twice(const at::Tensor& x, const Quantizer& first, const Quantizer& second);
at::Tensor unpack(const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef spec, int64_t length, at::ScalarType dtype);

bool scales_after(at::IntArrayRef spec);  // whether `after` is more than 1
float scale_after(const at::Tensor& scales, const MaybeTensor& amax, at::IntArrayRef spec);  // of packed codes

at::Tensor scalar(float value);

}  // namespace lowprec
