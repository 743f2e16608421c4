// A linear with its three GEMMs and their quantizers as one differentiable operator: what lowprec/linear.py does step by
// step, without the time that Python takes between GEMMs, whose caches it finds cold.
//
//   weights(weight, inputs, specs) -> (w_fprop, w_fprop_scale, w_dgrad, w_dgrad_scale)
//   linear(x, weight, bias?, w_fprop, w_fprop_scale?, w_dgrad, w_dgrad_scale?, inputs, specs, shares, saves, wgrad_dtype,
//          ran) -> y
//
// x [..., in], weight [out, in], bias [out]: BF16, what gradients are for. w_fprop, w_dgrad [out, in]: the decoded
// weight, FP32, and the scalars that belong after its GEMMs, as `weights` gives them. specs: of the slots in the order of
// `Slot` (of fprop.b and dgrad.b for weights), one after the other; inputs: [signs?, random?] of each (ops.cpp).
// shares: in the order of `Share`, what of a matrix both of its GEMMs have in common. saves: what a backward will need of
// x (`Saves`). wgrad_dtype: of the weight's gradient. ran: int64 [3], counts the GEMMs.
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
enum Share { kSameAmaxOfX, kSameX, kSameAmaxOfDy, kSameDy };  // the same amax; the same numbers, where decoded
enum Saves { kNothing, kCodes, kValues };

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
  bool codes, bias;
};

MaybeTensor amax_if(bool same, const Task& of) { return same ? MaybeTensor(scalar(of.amax())) : std::nullopt; }

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                            const at::Tensor& w_fprop, const MaybeTensor& w_fprop_scale, const at::Tensor& w_dgrad,
                            const MaybeTensor& w_dgrad_scale, const MaybeTensors& inputs, at::IntArrayRef specs,
                            const std::vector<int64_t>& shares, int64_t saves, at::ScalarType wgrad_dtype,
                            const at::Tensor& ran) {
    TORCH_CHECK(specs.size() == kSlots * kIntegers && inputs.size() == 2 * kSlots, "specs or inputs of four slots");
    Slots slots{specs.vec(), inputs};
    const at::Tensor matrix = x.reshape({-1, x.size(-1)}).contiguous();
    Task left(matrix, slots.of(kFpropA), slots.spec(kFpropA));
    std::optional<Task> saved;
    at::Tensor values;
    const bool keeps = saves == kValues && shares[kSameX];
    if (saves != kNothing && !keeps) {
      saved.emplace(matrix, slots.of(kWgradB, amax_if(shares[kSameAmaxOfX], left)), slots.spec(kWgradB));
      saves == kCodes ? saved->write_codes() : saved->write_values(at::kFloat);
    }
    const at::Tensor y = multiply(matrix, left, saved ? &*saved : nullptr, w_fprop, true, factor_of(w_fprop_scale), bias,
                                  keeps ? &values : nullptr);
    ran.mutable_data_ptr<int64_t>()[0]++;
    std::vector<int64_t> shape = x.sizes().vec();
    if (saves != kNothing) {
      if (saved) values = saved->out();
      saves == kCodes ? ctx->save_for_backward({values, saved->scales()}) : ctx->save_for_backward({values});
      auto later = c10::make_intrusive<Backward>();
      later->slots = std::move(slots);
      later->shares = shares, later->x_shape = shape;
      later->w = w_dgrad, later->ran = ran;
      later->w_after = factor_of(w_dgrad_scale), later->x_after = (saved ? *saved : left).after();
      later->wgrad_dtype = wgrad_dtype, later->codes = saves == kCodes, later->bias = bias.has_value();
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

    Task left(dy, slots.of(kDgradA), slots.spec(kDgradA));
    std::optional<Task> other;
    at::Tensor values;
    if (!given.shares[kSameDy]) {
      other.emplace(dy, slots.of(kWgradA, amax_if(given.shares[kSameAmaxOfDy], left)), slots.spec(kWgradA));
      other->write_values(at::kFloat);
      values = other->out();
    }
    const at::Tensor dx = multiply(dy, left, other ? &*other : nullptr, given.w, false, given.w_after, std::nullopt,
                                   other ? nullptr : &values);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor x = given.codes
        ? unpack(saved[0], saved[1], slots.spec(kWgradB), given.x_shape.back(), at::kFloat) : saved[0];
    const float alpha = (other ? *other : left).after() * given.x_after;
    const at::Tensor dw = at::addmm(at::zeros({1}, x.options()), values.t(), x, 0, alpha);
    int64_t* counts = given.ran.mutable_data_ptr<int64_t>();
    counts[1]++, counts[2]++;

    variable_list found(kArguments);
    found[0] = dx.view(given.x_shape), found[1] = dw.to(given.wgrad_dtype);
    if (given.bias) found[2] = dy.sum(0, false, at::kFloat);
    return found;
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const at::Tensor& w_fprop,
                  const MaybeTensor& w_fprop_scale, const at::Tensor& w_dgrad, const MaybeTensor& w_dgrad_scale,
                  const MaybeTensors& inputs, at::IntArrayRef specs, at::IntArrayRef shares, int64_t saves,
                  at::ScalarType wgrad_dtype, const at::Tensor& ran) {
  return Linear::apply(x, weight, bias, w_fprop, w_fprop_scale, w_dgrad, w_dgrad_scale, inputs, specs, shares.vec(), saves,
                       wgrad_dtype, ran);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lowprec_cpu, m) {
  m.def("weights(Tensor weight, Tensor?[] inputs, int[] specs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor w_fprop, Tensor? w_fprop_scale, Tensor w_dgrad, "
        "Tensor? w_dgrad_scale, Tensor?[] inputs, int[] specs, int[] shares, int saves, ScalarType wgrad_dtype, Tensor ran) "
        "-> Tensor");
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) { m.impl("weights", &weights); }
TORCH_LIBRARY_IMPL(lowprec_cpu, CompositeImplicitAutograd, m) { m.impl("linear", &linear); }

}  // namespace lowprec
