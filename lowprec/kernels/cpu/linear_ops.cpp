// The GEMMs of a low-precision linear with their quantizers, in one call each way: what lowprec/linear.py does step by
// step. Between GEMMs the caches are the matrices', and code that runs there is several times slower than alone.
//
//   linear_forward(x, inputs, spec, w, w_scale?, bias?, saved inputs, saved spec, decoded, gemm)
//       -> (y, amax, codes, block scales, amax of the codes)
//   linear_backward(dy, inputs, spec, w, w_scale?, wgrad inputs, wgrad spec, codes, scales, saved amax?, saved spec, length,
//       decoded, gemm, dw_dtype) -> (dx, dw, amax of dgrad, amax of wgrad)
//
// inputs: [scale?, signs?, random?] of a quantizer, specs and the rest as in ops.cpp; w: the decoded weight, w_scale what
// belongs after its GEMM; decoded: dtypes of the operands; gemm: of products of BF16 operands.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "ops.h"

namespace lowprec {
namespace {

using MaybeTensors = c10::List<std::optional<at::Tensor>>;

Inputs inputs_of(const MaybeTensors& given) {
  TORCH_CHECK(given.size() == 3, "inputs are scale, signs, random");
  return {std::nullopt, given.get(0), given.get(1), given.get(2)};
}

std::optional<float> times(std::optional<float> a, std::optional<float> b) {
  if (a && b) return *a * *b;
  return a ? a : b;
}
std::optional<float> after(const TensorScale& found, at::IntArrayRef spec) {
  return scales_after(spec) ? std::optional(found.after) : std::nullopt;
}
std::optional<float> value_of(const MaybeTensor& scale) {
  return scale ? std::optional(*scale->const_data_ptr<float>()) : std::nullopt;
}

// lowprec/linear.py, `multiply`: scale and bias meet the FP32 accumulator, one rounding.
at::Tensor product(const at::Tensor& left, const at::Tensor& right, std::optional<float> alpha, const MaybeTensor& bias,
                   at::ScalarType gemm, at::ScalarType out) {
  const bool exact = left.scalar_type() == at::kBFloat16 && right.scalar_type() == at::kBFloat16;
  if (exact && gemm == at::kBFloat16 && out == at::kBFloat16) {
    if (!alpha && !bias) return at::mm(left, right);
    const at::Tensor added = bias ? *bias : at::zeros({1}, left.options());
    return at::addmm(added, left, right, bias ? 1 : 0, alpha.value_or(1.0f));
  }
  const at::Tensor a = left.to(at::kFloat), b = right.to(at::kFloat);
  at::Tensor made = alpha ? at::addmm(at::zeros({1}, a.options()), a, b, 0, *alpha) : at::mm(a, b);
  if (bias) made.add_(*bias);
  return made.to(out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward(
    const at::Tensor& x, const MaybeTensors& inputs, at::IntArrayRef spec, const at::Tensor& w, const MaybeTensor& w_scale,
    const MaybeTensor& bias, const MaybeTensors& saved_inputs, at::IntArrayRef saved_spec, at::ScalarType decoded,
    at::ScalarType gemm) {
  const auto [a, saved] =
      quantize_and_pack(x, {inputs_of(inputs), spec, decoded}, {inputs_of(saved_inputs), saved_spec, decoded});
  const at::Tensor y =
      product(a.values, w.t(), times(after(a.found, spec), value_of(w_scale)), bias, gemm, x.scalar_type());
  return {y, scalar(a.found.amax), saved.codes, saved.scales, scalar(saved.found.amax)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& dy, const MaybeTensors& inputs, at::IntArrayRef spec, const at::Tensor& w, const MaybeTensor& w_scale,
    const MaybeTensors& wgrad_inputs, at::IntArrayRef wgrad_spec, const at::Tensor& codes, const at::Tensor& scales,
    const MaybeTensor& saved_amax, at::IntArrayRef saved_spec, int64_t length, at::ArrayRef<at::ScalarType> decoded,
    at::ScalarType gemm, at::ScalarType dw_dtype) {
  TORCH_CHECK(decoded.size() == 3, "decoded: of dgrad.a, wgrad.a, wgrad.b");
  const auto [a, b] =
      quantize_twice(dy, {inputs_of(inputs), spec, decoded[0]}, {inputs_of(wgrad_inputs), wgrad_spec, decoded[1]});
  const at::Tensor dx =
      product(a.values, w, times(after(a.found, spec), value_of(w_scale)), std::nullopt, gemm, dy.scalar_type());
  const at::Tensor x = unpack(codes, scales, saved_spec, length, decoded[2]);
  const std::optional<float> x_scale =
      scales_after(saved_spec) ? std::optional(scale_after(scales, saved_amax, saved_spec)) : std::nullopt;
  const at::Tensor dw =
      product(b.values.t(), x.t(), times(after(b.found, wgrad_spec), x_scale), std::nullopt, gemm, dw_dtype);
  return {dx, dw, scalar(a.found.amax), scalar(b.found.amax)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lowprec_cpu, m) {
  m.def("linear_forward(Tensor x, Tensor?[] inputs, int[] spec, Tensor w, Tensor? w_scale, Tensor? bias, "
        "Tensor?[] saved_inputs, int[] saved_spec, ScalarType decoded, ScalarType gemm) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_backward(Tensor dy, Tensor?[] inputs, int[] spec, Tensor w, Tensor? w_scale, Tensor?[] wgrad_inputs, "
        "int[] wgrad_spec, Tensor codes, Tensor scales, Tensor? saved_amax, int[] saved_spec, int length, "
        "ScalarType[] decoded, ScalarType gemm, ScalarType dw_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace lowprec
