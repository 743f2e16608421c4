// A matrix on its way through a quantizer: what the operators' arguments say becomes a job for the kernels.
#include "task.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace lowprec {

Spec parse(at::IntArrayRef values) {
  TORCH_CHECK(values.size() * sizeof(int64_t) == sizeof(Spec), "spec has ", values.size(), " integers");
  Spec spec;
  std::copy(values.begin(), values.end(), (int64_t*)&spec);
  return spec;
}

static float as_float(int64_t bits) { return std::bit_cast<float>((uint32_t)bits); }

static Element element_of(const Spec& spec) {
  return {(int32_t)spec.mantissa_bits, (int32_t)spec.min_exponent, (int32_t)spec.sign_bit,   (int32_t)spec.nan_code,
          (int32_t)spec.inf_code,      spec.twos_complement != 0,  as_float(spec.max_bits)};
}

Type type_of(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "dtype is ", dtype, "; use float32 or bfloat16");
  return dtype == at::kFloat ? Type::kFloat : Type::kBf16;
}

static int64_t round_up(int64_t n, int64_t to) { return to ? (n + to - 1) / to * to : n; }

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

static bool has_wide_scales(const Spec& spec) { return (Rule)spec.rule == Rule::kFp32 || (Rule)spec.rule == Rule::kPow2; }

static int64_t row_bytes(const Job& job) {  // of what is written
  switch (job.out_type) {
    case Type::kFloat: return bytes<float>(job.cols);
    case Type::kBf16: return bytes<Bf16>(job.cols);
    case Type::kCode8: return bytes<Code8>(job.cols);
    default: return bytes<Code4>(job.cols);
  }
}

static int64_t grain(const Job& job, int64_t items) {  // items that are worth a thread of their own
  return std::max<int64_t>(1, 32768 * items / (job.rows * job.cols));
}

float amax_of(Job job) {
  const Kernels& kernels = kernels_in_use();
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
static float encode_scale(float amax, const Job& job, bool pow2) {
  float scale = job.scale.element_max / amax;
  if (std::isinf(scale)) scale = job.scale.largest;
  if (pow2 && scale != 0 && !std::isnan(scale)) scale = std::ldexp(1.0f, std::ilogb(scale));
  return amax == 0 ? 1.0f : scale;
}

Task::Task(const at::Tensor& x, const Inputs& inputs, at::IntArrayRef spec_values)
    : spec_(parse(spec_values)), job_(job_of(x, spec_, inputs.signs, inputs.random)) {
  find_scale(inputs);
}

void Task::find_scale(const Inputs& inputs) {
  const auto tensor_amax = [&] { return inputs.amax ? value_of(*inputs.amax, "amax") : amax_of(job_); };
  Scale& scale = job_.scale;
  if (scale.rule == Rule::kTwoLevel) {
    amax_ = tensor_amax();
    const float range = as_float(spec_.scale_max_bits) * scale.element_max;
    float encode = range / amax_;
    if (encode > std::numeric_limits<float>::max()) encode = std::numeric_limits<float>::max();
    if (encode == 0) encode = 1;
    scale.encode = encode * (1.0f / scale.element_max);
    scale.decode = 1.0f / encode;
    after_ = amax_ / range;
  } else if (scale.rule == Rule::kGiven) {
    if (inputs.scale && !inputs.amax && !job_.columns && !job_.hadamard)
      job_.amax_seen = &seen_;  // delayed scaling: one pass does both
    else
      amax_ = tensor_amax();
    scale.encode = inputs.scale ? value_of(*inputs.scale, "scale") : encode_scale(amax_, job_, spec_.pow2);
    after_ = 1.0f / scale.encode;
  } else if (spec_.three_quarters) {
    after_ = 4.0f / 3.0f;
  }
}

void Task::write_values(at::ScalarType dtype) {
  out_ = at::empty({job_.rows, job_.cols}, at::TensorOptions(dtype));
  job_.out = out_.mutable_data_ptr();
  job_.out_type = type_of(dtype);
}

void Task::write_codes() {
  const bool pairs = spec_.sign_bit == 3, given = job_.scale.rule == Rule::kGiven;
  const bool turned = job_.columns && !job_.upright;
  const int64_t lines = turned ? job_.cols : job_.rows, length = turned ? job_.rows : job_.cols;
  const int64_t block_lines = turned ? job_.block_cols : job_.block_rows;
  const int64_t block_length = turned ? job_.block_rows : job_.block_cols;
  out_ = at::empty({lines, pairs ? (length + 1) / 2 : length}, at::kByte);
  const int64_t scale_lines = given ? 1 : (lines + block_lines - 1) / block_lines;
  job_.scale_cols = given ? 1 : (length + block_length - 1) / block_length;
  scales_ = at::empty({scale_lines, job_.scale_cols}, given || has_wide_scales(spec_) ? at::kFloat : at::kByte);
  job_.out = out_.mutable_data_ptr();
  job_.scales = scales_.mutable_data_ptr();
  job_.out_type = pairs ? Type::kCode4 : Type::kCode8;
  if (given) *scales_.mutable_data_ptr<float>() = after_;
}

void Task::run() const {
  const Kernels& kernels = kernels_in_use();
  const int64_t items = kernels.items(job_);
  at::parallel_for(0, items, grain(job_, items),
                   [&](int64_t begin, int64_t end) { kernels.quantize(job_, begin, end); });
}

void Task::run_rows(int64_t first, int64_t count, float* values) const {
  Job part = job_;
  part.x = (const char*)job_.x + first * job_.x_cols * (job_.in == Type::kFloat ? 4 : 2);
  part.x_rows = std::min(count, job_.x_rows - first), part.rows = std::min(count, job_.rows - first);
  part.random.first_row += first;
  if (values) {
    part.out = values;
    part.out_type = Type::kFloat;
  } else {
    part.out = (char*)job_.out + first * row_bytes(job_);
    if (job_.scales && job_.scale.rule != Rule::kGiven)
      part.scales = (char*)job_.scales + first / job_.block_rows * job_.scale_cols * (has_wide_scales(spec_) ? 4 : 1);
  }
  const Kernels& kernels = kernels_in_use();
  kernels.quantize(part, 0, kernels.items(part));
}

// Rows after rows, so that the second one finds them in the cache; with few rows a thread each, one after the other.
void run_together(const Task& one, const Task* other) {
  const int64_t parts = (one.rows() + Task::kRows - 1) / Task::kRows;
  if (parts < at::get_num_threads()) {
    one.run();
    if (other) other->run();
    return;
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      one.run_rows(part * Task::kRows, Task::kRows);
      if (other) other->run_rows(part * Task::kRows, Task::kRows);
    }
  });
}

float Task::amax() const { return job_.amax_seen ? std::bit_cast<float>(seen_) : amax_; }

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
  const bool wide = has_wide_scales(spec);
  TORCH_CHECK(job.rule == Rule::kGiven || (scales.scalar_type() == (wide ? at::kFloat : at::kByte) &&
                                           scales.size(0) >= (job.rows + job.block_rows - 1) / job.block_rows &&
                                           scales.size(1) >= (job.cols + job.block_cols - 1) / job.block_cols),
              "scales do not fit the codes");
  const Kernels& kernels = kernels_in_use();
  at::parallel_for(0, job.rows, std::max<int64_t>(1, 32768 / length),
                   [&](int64_t begin, int64_t end) { kernels.dequantize(job, begin, end); });
  return out;
}

}  // namespace lowprec
