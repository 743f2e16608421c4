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
  int64_t block_rows, block_cols, columns, hadamard, upright;
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

using MaybeTensor = std::optional<at::Tensor>;

Job job_of(const at::Tensor& x, const Spec& spec, const MaybeTensor& signs, const MaybeTensor& random) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.numel() > 0, "x must be a contiguous matrix that is not empty");
  Job job{};
  job.x = x.const_data_ptr();
  job.in = type_of(x.scalar_type());
  job.x_rows = x.size(0), job.x_cols = x.size(1);
  job.columns = spec.columns, job.upright = spec.upright;
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

at::Tensor scalar(float value) {
  at::Tensor result = at::empty({}, at::kFloat);
  *result.mutable_data_ptr<float>() = value;
  return result;
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

struct TensorScale {
  float after = 1.0f, amax = 0.0f;
};

// Runs a job whose out is set: tensor amax and tensor scale first, where the format has them.
TensorScale quantize(Job& job, const Spec& spec, const MaybeTensor& amax, const MaybeTensor& scale) {
  TensorScale result;
  const auto tensor_amax = [&] { return amax ? value_of(*amax, "amax") : amax_of(job); };
  if (job.scale.rule == Rule::kTwoLevel) {
    result.amax = tensor_amax();
    const float range = as_float(spec.scale_max_bits) * job.scale.element_max;
    float encode = range / result.amax;
    if (encode > std::numeric_limits<float>::max()) encode = std::numeric_limits<float>::max();
    if (encode == 0) encode = 1;
    job.scale.encode = encode * (1.0f / job.scale.element_max);
    job.scale.decode = 1.0f / encode;
    result.after = result.amax / range;
  } else if (job.scale.rule == Rule::kGiven) {
    int32_t seen = 0;
    const bool in_passing = scale && !amax && !job.columns && !job.hadamard;  // delayed scaling: one pass does both
    if (in_passing)
      job.amax_seen = &seen;
    else
      result.amax = tensor_amax();
    job.scale.encode = scale ? value_of(*scale, "scale") : encode_scale(result.amax, job, spec.pow2);
    result.after = 1.0f / job.scale.encode;
    run(job);
    if (job.amax_seen) result.amax = std::bit_cast<float>(seen);
    return result;
  } else if (spec.three_quarters) {
    result.after = 4.0f / 3.0f;
  }
  run(job);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> operand(const at::Tensor& x, const MaybeTensor& amax,
                                                       const MaybeTensor& scale, const MaybeTensor& signs,
                                                       const MaybeTensor& random, at::IntArrayRef spec_values,
                                                       at::ScalarType dtype) {
  const Spec spec = parse(spec_values);
  Job job = job_of(x, spec, signs, random);
  at::Tensor out = at::empty({job.rows, job.cols}, x.options().dtype(dtype));
  job.out = out.mutable_data_ptr();
  job.out_type = type_of(dtype);
  const TensorScale found = quantize(job, spec, amax, scale);
  return {out, scalar(found.after), scalar(found.amax)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack(const at::Tensor& x, const MaybeTensor& amax,
                                                                const MaybeTensor& scale, const MaybeTensor& signs,
                                                                const MaybeTensor& random, at::IntArrayRef spec_values) {
  const Spec spec = parse(spec_values);
  Job job = job_of(x, spec, signs, random);
  const bool pairs = spec.sign_bit == 3, given = (Rule)spec.rule == Rule::kGiven;
  const bool wide = given || (Rule)spec.rule == Rule::kFp32 || (Rule)spec.rule == Rule::kPow2;
  const bool turned = job.columns && !job.upright;
  const int64_t lines = turned ? job.cols : job.rows, length = turned ? job.rows : job.cols;
  const int64_t block_lines = turned ? job.block_cols : job.block_rows;
  const int64_t block_length = turned ? job.block_rows : job.block_cols;
  at::Tensor codes = at::empty({lines, pairs ? (length + 1) / 2 : length}, x.options().dtype(at::kByte));
  const int64_t scale_lines = given ? 1 : (lines + block_lines - 1) / block_lines;
  job.scale_cols = given ? 1 : (length + block_length - 1) / block_length;
  at::Tensor scales = at::empty({scale_lines, job.scale_cols}, x.options().dtype(wide ? at::kFloat : at::kByte));
  job.out = codes.mutable_data_ptr();
  job.scales = scales.mutable_data_ptr();
  job.out_type = pairs ? Type::kCode4 : Type::kCode8;
  const TensorScale found = quantize(job, spec, amax, scale);
  if (given) *scales.mutable_data_ptr<float>() = found.after;
  return {codes, scales, scalar(found.after), scalar(found.amax)};
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
  const bool turned = spec.columns && !spec.upright;  // codes are kept with the quantization axis last
  job.block_rows = turned ? spec.block_cols : spec.block_rows;
  job.block_cols = turned ? spec.block_rows : spec.block_cols;
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
