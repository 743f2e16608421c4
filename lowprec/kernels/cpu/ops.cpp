// The torch operators, and the choice of the instruction set at run time.
//
//   operand(x, amax?, scale?, signs?, random?, spec, dtype) -> (values, scale, amax)
//   pack(x, amax?, scale?, signs?, random?, spec) -> (codes, block scales, scale, amax)
//   unpack(codes, block scales, spec, dtype) -> values
//   amax(x, signs?, axis) -> amax
//
// `spec` is a list of integers, in the order of `Spec` below (lowprec/kernels/support.py makes it); `random` is
// int64 [k0, k1, step, row, column]; `signs` float32 [hadamard], divided by sqrt(hadamard). `scale` and `amax` of the
// results are float32 scalars: what belongs after a GEMM, and the tensor's amax (0 where none is needed).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "job.h"
#include "ops.h"

namespace lowprec {

#if defined(__x86_64__)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx2")) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_portable);
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels = supported().front();
  return kernels;
}

std::string isas() {  // supported ones, the best first
  std::string names;
  for (const Kernels* kernels : supported()) names += (names.empty() ? "" : " ") + std::string(kernels->name);
  return names;
}

std::string isa() { return chosen().load()->name; }

void set_isa(const std::string& name) {  // for tests
  for (const Kernels* kernels : supported())
    if (name == kernels->name) return chosen().store(kernels);
  TORCH_CHECK(false, "instruction set ", name, " is not one of: ", isas());
}

struct Spec {  // in the order of the integers
  int64_t mantissa_bits, min_exponent, sign_bit, nan_code, inf_code, twos_complement, max_bits;
  int64_t rule, max_exponent, pow2, scale_max_bits, three_quarters;
  int64_t block_rows, block_cols, columns, hadamard;
};

Spec parse(at::IntArrayRef values) {
  TORCH_CHECK(values.size() * sizeof(int64_t) == sizeof(Spec), "spec has ", values.size(), " integers");
  Spec spec;
  std::copy(values.begin(), values.end(), (int64_t*)&spec);
  return spec;
}

float as_float(int64_t bits) { return std::bit_cast<float>((uint32_t)bits); }

Element element_of(const Spec& spec) {
  return {(int32_t)spec.mantissa_bits, (int32_t)spec.min_exponent, (int32_t)spec.sign_bit,   (int32_t)spec.nan_code,
          (int32_t)spec.inf_code,      spec.twos_complement != 0,  as_float(spec.max_bits)};
}

Type type_of(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "dtype is ", dtype, "; use float32 or bfloat16");
  return dtype == at::kFloat ? Type::kFloat : Type::kBf16;
}

int64_t round_up(int64_t n, int64_t to) { return to ? (n + to - 1) / to * to : n; }

Job job_of(const at::Tensor& x, const Spec& spec, const MaybeTensor& signs, const MaybeTensor& random) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.numel() > 0, "x must be a contiguous matrix that is not empty");
  Job job{};
  job.x = x.const_data_ptr();
  job.in = type_of(x.scalar_type());
  job.x_rows = x.size(0), job.x_cols = x.size(1);
  job.columns = spec.columns;
  job.rows = round_up(job.x_rows, spec.columns ? spec.hadamard : 0);
  job.cols = round_up(job.x_cols, spec.columns ? 0 : spec.hadamard);
  job.block_rows = spec.block_rows, job.block_cols = spec.block_cols;
  job.hadamard = (int32_t)spec.hadamard;
  if (spec.hadamard) {
    TORCH_CHECK(signs && signs->scalar_type() == at::kFloat && signs->numel() == spec.hadamard && signs->is_contiguous(),
                "signs must be float32 [hadamard]");
    job.signs = signs->const_data_ptr<float>();
  }
  job.element = element_of(spec);
  job.scale = {(Rule)spec.rule, (int32_t)spec.max_exponent, as_float(spec.max_bits),
               job.in == Type::kFloat ? std::numeric_limits<float>::max() : 0x1.fep127f,
               1.0f, 1.0f, spec.three_quarters ? 0.75f : 1.0f};
  if (random) {
    TORCH_CHECK(random->scalar_type() == at::kLong && random->numel() == 5 && random->is_contiguous(), "random");
    const int64_t* words = random->const_data_ptr<int64_t>();
    TORCH_CHECK(words[4] % 16 == 0, "the random column must be a multiple of 16, it is ", words[4]);
    job.random = {true, {(uint32_t)words[0], (uint32_t)words[1]}, (uint32_t)words[2], (uint64_t)words[3], (uint32_t)words[4]};
  }
  return job;
}

int64_t grain(const Job& job, int64_t items) {  // items that are worth a thread of their own
  return std::max<int64_t>(1, 32768 * items / (job.rows * job.cols));
}

void run(const Job& job) {
  const Kernels& kernels = *chosen().load();
  const int64_t items = kernels.items(job);
  at::parallel_for(0, items, grain(job, items), [&](int64_t begin, int64_t end) { kernels.quantize(job, begin, end); });
}

// Two jobs on one matrix: each 128 rows of it are read by both while they are in the cache.
void run_both(const Job& one, const Job& other) {
  const Kernels& kernels = *chosen().load();
  const int64_t parts = (one.x_rows + 127) / 128, ones = kernels.items(one), others = kernels.items(other);
  at::parallel_for(0, parts, grain(one, parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      kernels.quantize(one, ones * part / parts, ones * (part + 1) / parts);
      kernels.quantize(other, others * part / parts, others * (part + 1) / parts);
    }
  });
}

float amax_of(Job job) {
  const Kernels& kernels = *chosen().load();
  if (!job.hadamard) job.columns = false;
  if (!job.columns) job.block_rows = 1, job.block_cols = 128;
  else job.block_rows = 1, job.block_cols = 1;
  job.out_type = Type::kFloat;
  const int64_t items = kernels.items(job);
  const int32_t bits = at::parallel_reduce(
      0, items, grain(job, items), (int32_t)0,
      [&](int64_t begin, int64_t end, int32_t most) { return std::max(most, kernels.amax(job, begin, end)); },
      [](int32_t a, int32_t b) { return std::max(a, b); });
  return std::bit_cast<float>(bits);
}

float value_of(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.numel() == 1 && t.scalar_type() == at::kFloat, name, " must be one float32");
  return *t.const_data_ptr<float>();
}

// FP32 encode scale max / amax and its exceptions: lowprec/scales.py, amax_scale.
float encode_scale(float amax, const Job& job, bool pow2) {
  float scale = job.scale.element_max / amax;
  if (std::isinf(scale)) scale = job.scale.largest;
  if (pow2 && scale != 0 && !std::isnan(scale)) scale = std::ldexp(1.0f, std::ilogb(scale));
  return amax == 0 ? 1.0f : scale;
}

float range_of(const Spec& spec) { return as_float(spec.scale_max_bits) * as_float(spec.max_bits); }

// A quantization whose job is complete: tensor amax and tensor scale are found, where the format has them.
struct Work {
  Job job{};
  at::Tensor out, scales;
  TensorScale found;
  int32_t seen = 0;  // bits of the amax, where the job finds it in passing

  Work() = default;
  Work(const Work&) = delete;  // the job may point here

  void find_scale(const Spec& spec, const Inputs& inputs) {
    const auto tensor_amax = [&] { return inputs.amax ? value_of(*inputs.amax, "amax") : amax_of(job); };
    if (job.scale.rule == Rule::kTwoLevel) {
      found.amax = tensor_amax();
      const float range = range_of(spec);
      float encode = range / found.amax;
      if (encode > std::numeric_limits<float>::max()) encode = std::numeric_limits<float>::max();
      if (encode == 0) encode = 1;
      job.scale.encode = encode * (1.0f / job.scale.element_max);
      job.scale.decode = 1.0f / encode;
      found.after = found.amax / range;
    } else if (job.scale.rule == Rule::kGiven) {
      // delayed scaling: one pass does both
      if (inputs.scale && !inputs.amax && !job.columns && !job.hadamard)
        job.amax_seen = &seen;
      else
        found.amax = tensor_amax();
      job.scale.encode = inputs.scale ? value_of(*inputs.scale, "scale") : encode_scale(found.amax, job, spec.pow2);
      found.after = 1.0f / job.scale.encode;
    } else if (spec.three_quarters) {
      found.after = 4.0f / 3.0f;
    }
  }

  Decoded decoded() {
    if (job.amax_seen) found.amax = std::bit_cast<float>(seen);
    return {out, found};
  }

  Packed packed() {
    if (job.amax_seen) found.amax = std::bit_cast<float>(seen);
    if (job.scale.rule == Rule::kGiven) *scales.mutable_data_ptr<float>() = found.after;
    return {out, scales, found};
  }
};

void prepare_operand(Work& work, const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec_values, at::ScalarType dtype) {
  const Spec spec = parse(spec_values);
  Job& job = work.job = job_of(x, spec, inputs.signs, inputs.random);
  work.out = at::empty({job.rows, job.cols}, x.options().dtype(dtype));
  job.out = work.out.mutable_data_ptr();
  job.out_type = type_of(dtype);
  work.find_scale(spec, inputs);
}

void prepare_packed(Work& work, const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec_values) {
  const Spec spec = parse(spec_values);
  Job& job = work.job = job_of(x, spec, inputs.signs, inputs.random);
  const bool pairs = spec.sign_bit == 3, given = (Rule)spec.rule == Rule::kGiven;
  const bool wide = given || (Rule)spec.rule == Rule::kFp32 || (Rule)spec.rule == Rule::kPow2;
  const int64_t lines = job.columns ? job.cols : job.rows, length = job.columns ? job.rows : job.cols;
  const int64_t block_lines = job.columns ? job.block_cols : job.block_rows;
  const int64_t block_length = job.columns ? job.block_rows : job.block_cols;
  work.out = at::empty({lines, pairs ? (length + 1) / 2 : length}, x.options().dtype(at::kByte));
  const int64_t scale_lines = given ? 1 : (lines + block_lines - 1) / block_lines;
  job.scale_cols = given ? 1 : (length + block_length - 1) / block_length;
  work.scales = at::empty({scale_lines, job.scale_cols}, x.options().dtype(wide ? at::kFloat : at::kByte));
  job.out = work.out.mutable_data_ptr();
  job.scales = work.scales.mutable_data_ptr();
  job.out_type = pairs ? Type::kCode4 : Type::kCode8;
  work.find_scale(spec, inputs);
}

}  // namespace

at::Tensor scalar(float value) {
  at::Tensor result = at::empty({}, at::kFloat);
  *result.mutable_data_ptr<float>() = value;
  return result;
}

Decoded quantize_operand(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec, at::ScalarType dtype) {
  Work work;
  prepare_operand(work, x, inputs, spec, dtype);
  run(work.job);
  return work.decoded();
}

Packed quantize_packed(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec) {
  Work work;
  prepare_packed(work, x, inputs, spec);
  run(work.job);
  return work.packed();
}

std::pair<Decoded, Packed> quantize_and_pack(const at::Tensor& x, const Quantizer& first, const Quantizer& second) {
  Work one, other;
  prepare_operand(one, x, first.inputs, first.spec, first.dtype);
  prepare_packed(other, x, second.inputs, second.spec);
  run_both(one.job, other.job);
  return {one.decoded(), other.packed()};
}

std::pair<Decoded, Decoded> quantize_twice(const at::Tensor& x, const Quantizer& first, const Quantizer& second) {
  Work one, other;
  prepare_operand(one, x, first.inputs, first.spec, first.dtype);
  prepare_operand(other, x, second.inputs, second.spec, second.dtype);
  run_both(one.job, other.job);
  return {one.decoded(), other.decoded()};
}

at::Tensor unpack(const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef spec_values, int64_t length,
                  at::ScalarType dtype) {
  const Spec spec = parse(spec_values);
  const bool pairs = spec.sign_bit == 3;
  TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == at::kByte &&
                  codes.size(1) == (pairs ? (length + 1) / 2 : length) && scales.dim() == 2 && scales.is_contiguous(),
              "codes and scales must be contiguous matrices that fit the spec");
  at::Tensor out = at::empty({codes.size(0), length}, codes.options().dtype(dtype));
  DecodeJob job{};
  job.codes = codes.const_data_ptr(), job.scales = scales.const_data_ptr(), job.out = out.mutable_data_ptr();
  job.rows = codes.size(0), job.cols = length, job.scale_cols = scales.size(1);
  job.code_type = pairs ? Type::kCode4 : Type::kCode8;
  job.out_type = type_of(dtype);
  // codes are kept with the quantization axis last
  job.block_rows = spec.columns ? spec.block_cols : spec.block_rows;
  job.block_cols = spec.columns ? spec.block_rows : spec.block_cols;
  job.element = element_of(spec);
  job.rule = (Rule)spec.rule;
  const bool wide = job.rule == Rule::kFp32 || job.rule == Rule::kPow2;
  TORCH_CHECK(job.rule == Rule::kGiven || (scales.scalar_type() == (wide ? at::kFloat : at::kByte) &&
                                           scales.size(0) >= (job.rows + job.block_rows - 1) / job.block_rows &&
                                           scales.size(1) >= (job.cols + job.block_cols - 1) / job.block_cols),
              "scales do not fit the codes");
  const Kernels& kernels = *chosen().load();
  at::parallel_for(0, job.rows, std::max<int64_t>(1, 32768 / length),
                   [&](int64_t begin, int64_t end) { kernels.dequantize(job, begin, end); });
  return out;
}

bool scales_after(at::IntArrayRef spec_values) {
  const Spec spec = parse(spec_values);
  return (Rule)spec.rule == Rule::kGiven || (Rule)spec.rule == Rule::kTwoLevel || spec.three_quarters;
}

float scale_after(const at::Tensor& scales, const MaybeTensor& amax, at::IntArrayRef spec_values) {
  const Spec spec = parse(spec_values);
  if ((Rule)spec.rule == Rule::kGiven) return value_of(scales, "scales");
  if ((Rule)spec.rule != Rule::kTwoLevel) return spec.three_quarters ? 4.0f / 3.0f : 1.0f;
  TORCH_CHECK(amax, "codes of two levels come with their amax");
  return value_of(*amax, "amax") / range_of(spec);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> operand(const at::Tensor& x, const MaybeTensor& amax,
                                                       const MaybeTensor& scale, const MaybeTensor& signs,
                                                       const MaybeTensor& random, at::IntArrayRef spec,
                                                       at::ScalarType dtype) {
  const Decoded made = quantize_operand(x, {amax, scale, signs, random}, spec, dtype);
  return {made.values, scalar(made.found.after), scalar(made.found.amax)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack(const at::Tensor& x, const MaybeTensor& amax,
                                                                const MaybeTensor& scale, const MaybeTensor& signs,
                                                                const MaybeTensor& random, at::IntArrayRef spec) {
  const Packed made = quantize_packed(x, {amax, scale, signs, random}, spec);
  return {made.codes, made.scales, scalar(made.found.after), scalar(made.found.amax)};
}

at::Tensor amax(const at::Tensor& x, const MaybeTensor& signs, int64_t axis) {
  Spec spec{};
  spec.columns = axis == 0;
  spec.hadamard = signs ? signs->numel() : 0;
  return scalar(amax_of(job_of(x, spec, signs, std::nullopt)));
}

}  // namespace

const Kernels& kernels_in_use() { return *chosen().load(); }

TORCH_LIBRARY(lowprec_cpu, m) {
  m.def("operand(Tensor x, Tensor? amax, Tensor? scale, Tensor? signs, Tensor? random, int[] spec, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("pack(Tensor x, Tensor? amax, Tensor? scale, Tensor? signs, Tensor? random, int[] spec) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("unpack(Tensor codes, Tensor scales, int[] spec, SymInt length, ScalarType dtype) -> Tensor");
  m.def("amax(Tensor x, Tensor? signs, int axis) -> Tensor");
  m.def("isas() -> str", &isas);
  m.def("isa() -> str", &isa);
  m.def("set_isa(str name) -> ()", &set_isa);
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) {
  m.impl("operand", &operand);
  m.impl("pack", &pack);
  m.impl("unpack", &unpack);
  m.impl("amax", &amax);
}

}  // namespace lowprec
