// A linear with its three GEMMs and their quantizers as one differentiable operator: what lowprec/linear.py does step by
// step, without the time that Python takes between GEMMs, whose caches it finds cold.
//
//   weights(weight, inputs, specs) -> (w_fprop, w_fprop_scale, w_dgrad, w_dgrad_scale)
//   linear(x, weight, bias?, w_fprop, w_fprop_scale?, w_dgrad, w_dgrad_scale?, inputs, specs, shares, wgrad_dtype, saves,
//          ran) -> y
//
// x [..., in], weight [out, in], bias [out]: BF16, what gradients are for. w_fprop, w_dgrad [out, in]: the decoded
// weight, FP32, and the scalars that belong after its GEMMs, as `weights` gives them. specs: of the slots in the order of
// `Slot` (of fprop.b and dgrad.b for weights), one after the other; inputs: [signs?, random?] of each (ops.cpp). shares: whether wgrad.b is scaled by the amax that fprop.a finds,
// wgrad.a by that of dgrad.a, and whether wgrad.a is the same numbers as dgrad.a. saves: for a backward. ran: int64 [3],
// counts the GEMMs.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "product.h"

namespace lowprec {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensors = c10::List<std::optional<at::Tensor>>;

enum Slot { kFpropA, kWgradB, kDgradA, kWgradA, kSlots };
enum Share { kSameAmaxOfX, kSameAmaxOfDy, kSameDy };

constexpr int kArguments = 13;  // of the operator
constexpr int64_t kIntegers = sizeof(Spec) / sizeof(int64_t);

struct Slots {
  std::vector<int64_t> specs;
  MaybeTensors inputs;

  at::IntArrayRef spec(int slot) const { return at::IntArrayRef(specs).slice(slot * kIntegers, kIntegers); }
  Inputs of(int slot, const MaybeTensor& amax = std::nullopt) const {
    return {amax, std::nullopt, inputs.get(2 * slot), inputs.get(2 * slot + 1)};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> weights(const at::Tensor& weight, const MaybeTensors& inputs,
                                                                   at::IntArrayRef specs) {
  TORCH_CHECK(specs.size() == 2 * kIntegers && inputs.size() == 4, "specs or inputs of two slots");
  const Slots slots{specs.vec(), inputs};
  Task fprop(weight, slots.of(0), slots.spec(0)), dgrad(weight, slots.of(1), slots.spec(1));
  fprop.write_values(at::kFloat), dgrad.write_values(at::kFloat);
  run_together(fprop, &dgrad);
  return {fprop.out(), scalar(fprop.after()), dgrad.out(), scalar(dgrad.after())};
}

float factor_of(const MaybeTensor& scale) { return scale ? value_of(*scale, "scale") : 1.0f; }

// What a backward needs beside the packed x; the weight's copy is everyone's of this step, so no saved tensor.
struct Backward : torch::CustomClassHolder {
  Slots slots;
  std::vector<int64_t> shares, x_shape;
  at::Tensor w, ran;
  float w_after, x_after;
  at::ScalarType wgrad_dtype;
  bool bias;
};

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                            const at::Tensor& w_fprop, const MaybeTensor& w_fprop_scale, const at::Tensor& w_dgrad,
                            const MaybeTensor& w_dgrad_scale, const MaybeTensors& inputs, at::IntArrayRef specs,
                            const std::vector<int64_t>& shares, at::ScalarType wgrad_dtype, bool saves,
                            const at::Tensor& ran) {
    TORCH_CHECK(specs.size() == kSlots * kIntegers && inputs.size() == 2 * kSlots, "specs or inputs of four slots");
    Slots slots{specs.vec(), inputs};
    const at::Tensor matrix = x.reshape({-1, x.size(-1)}).contiguous();
    Task left(matrix, slots.of(kFpropA), slots.spec(kFpropA));
    std::optional<Task> saved;
    if (saves) {
      const MaybeTensor amax = shares[kSameAmaxOfX] ? MaybeTensor(scalar(left.amax())) : std::nullopt;
      saved.emplace(matrix, slots.of(kWgradB, amax), slots.spec(kWgradB));
      saved->write_codes();
    }
    const at::Tensor y = multiply(matrix, left, saved ? &*saved : nullptr, w_fprop, true, factor_of(w_fprop_scale),
                                       bias, nullptr);
    ran.mutable_data_ptr<int64_t>()[0]++;
    std::vector<int64_t> shape = x.sizes().vec();
    if (saves) {
      ctx->save_for_backward({saved->out(), saved->scales()});
      auto later = c10::make_intrusive<Backward>();
      later->slots = std::move(slots);
      later->shares = shares, later->x_shape = shape;
      later->w = w_dgrad, later->ran = ran;
      later->w_after = factor_of(w_dgrad_scale), later->x_after = saved->after();
      later->wgrad_dtype = wgrad_dtype, later->bias = bias.has_value();
      ctx->saved_data["later"] = c10::IValue::make_capsule(std::move(later));
    }
    shape.back() = y.size(1);
    return y.view(shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto held = ctx->saved_data["later"].toCapsule();
    const Backward& given = static_cast<const Backward&>(*held);
    const Slots& slots = given.slots;
    const at::Tensor dy = gradients[0].reshape({-1, gradients[0].size(-1)}).contiguous();
    variable_list found(kArguments);

    Task left(dy, slots.of(kDgradA), slots.spec(kDgradA));
    std::optional<Task> other;
    at::Tensor values;
    if (!given.shares[kSameDy]) {
      const MaybeTensor amax = given.shares[kSameAmaxOfDy] ? MaybeTensor(scalar(left.amax())) : std::nullopt;
      other.emplace(dy, slots.of(kWgradA, amax), slots.spec(kWgradA));
      other->write_values(at::kFloat);
      values = other->out();
    }
    const at::Tensor dx = multiply(dy, left, other ? &*other : nullptr, given.w, false, given.w_after, std::nullopt,
                                        other ? nullptr : &values);
    const variable_list packed = ctx->get_saved_variables();
    const at::Tensor x = unpack(packed[0], packed[1], slots.spec(kWgradB), given.x_shape.back(), at::kFloat);
    const float alpha = (other ? other->after() : left.after()) * given.x_after;
    const at::Tensor dw = at::addmm(at::zeros({1}, x.options()), values.t(), x, 0, alpha);
    found[0] = dx.view(given.x_shape), found[1] = dw.to(given.wgrad_dtype);
    if (given.bias) found[2] = dy.sum(0, false, at::kFloat);
    int64_t* counts = given.ran.mutable_data_ptr<int64_t>();
    counts[1]++, counts[2]++;
    return found;
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const at::Tensor& w_fprop,
                  const MaybeTensor& w_fprop_scale, const at::Tensor& w_dgrad, const MaybeTensor& w_dgrad_scale,
                  const MaybeTensors& inputs, at::IntArrayRef specs, at::IntArrayRef shares, at::ScalarType wgrad_dtype,
                  bool saves, const at::Tensor& ran) {
  return Linear::apply(x, weight, bias, w_fprop, w_fprop_scale, w_dgrad, w_dgrad_scale, inputs, specs, shares.vec(),
                       wgrad_dtype, saves, ran);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lowprec_cpu, m) {
  m.def("weights(Tensor weight, Tensor?[] inputs, int[] specs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor w_fprop, Tensor? w_fprop_scale, Tensor w_dgrad, "
        "Tensor? w_dgrad_scale, Tensor?[] inputs, int[] specs, int[] shares, ScalarType wgrad_dtype, bool saves, Tensor ran) "
        "-> Tensor");
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) { m.impl("weights", &weights); }
TORCH_LIBRARY_IMPL(lowprec_cpu, AutogradCPU, m) { m.impl("linear", &linear); }

}  // namespace lowprec
