// The torch operators of the AdamW step.
//
//   adamw_maxima(tensors, tables, grad, spec, numbers) -> maxima
//   adamw(tensors, tables, grad, maxima?, random?, spec, numbers, measure) -> float64 [3]
//
// tensors: what changes, in the order of `Place`; tables: codebook, limits and cells of exp_avg, then of exp_avg_sq;
// what a fragment does not have is an empty tensor. spec: integers in the order of `Spec`; numbers: in the order of
// `AdamJob`; random: int64 [k0, k1, step, row, column]. lowprec/kernels/adamw.py makes them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <vector>

#include "adamw_job.h"

namespace lowprec {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

struct Spec {  // in the order of the integers
  int64_t exp_avg, exp_avg_sq, weight;  // Store
  int64_t write;                        // Write
  int64_t offset, row_count, row_length;
};

enum Place { kWeight, kWeightScale, kLow, kMoments, kSquares = kMoments + 4, kSquaresLow = kSquares + 4, kPlaces };
enum Part { kPayload, kScales, kRows, kColumns };  // of a moment's four places

constexpr int64_t kUnitsOfAThread = 128;

at::ScalarType type_of(Store store) {
  switch (store) {
    case Store::kFloat: return at::kFloat;
    case Store::kBf16: return at::kBFloat16;
    case Store::kHalf: return at::kHalf;
    default: return at::kByte;
  }
}

void check(const at::Tensor& t, at::ScalarType type, int64_t length, const char* what) {
  TORCH_CHECK(t.scalar_type() == type && t.dim() == 1 && t.size(0) == length && t.is_contiguous() && t.device().is_cpu(),
              what, " must be a contiguous ", type, " vector of ", length, ", it is ", t.scalar_type(), " ", t.sizes());
}

bool scaled(Store store) { return store == Store::kHalf || store == Store::kByte; }
bool book(Store store) { return store >= Store::kBook8; }

float* floats(const at::Tensor& t) { return t.numel() ? t.mutable_data_ptr<float>() : nullptr; }

State state_of(const at::Tensor* parts, const at::Tensor* tables, Store store, const AdamJob& job, const char* name) {
  State state{};
  const int64_t count = job.count, units = (count + kUnit - 1) / kUnit;
  const bool halves = store == Store::kBook4 || store == Store::kRank1;
  state.store = store;
  check(parts[kPayload], type_of(store), halves ? (count + 1) / 2 : count, name);
  state.payload = parts[kPayload].mutable_data_ptr();
  if (scaled(store)) {
    check(parts[kScales], at::kFloat, 1, name);
    state.scale = state.next_scale = *parts[kScales].const_data_ptr<float>();
  } else if (store == Store::kRank1) {
    check(parts[kRows], at::kFloat, job.row_count, name), check(parts[kColumns], at::kFloat, job.row_length, name);
    state.rows = floats(parts[kRows]), state.columns = floats(parts[kColumns]);
  } else if (store >= Store::kByteBlock) {
    check(parts[kScales], at::kFloat, store == Store::kBook4 ? (count + 127) / 128 : units, name);
    state.scales = floats(parts[kScales]);
  }
  if (book(store)) {
    const int64_t entries = store == Store::kBook8 ? 256 : 16;
    check(tables[0], at::kFloat, entries, name), check(tables[1], at::kFloat, entries, name);
    check(tables[2], at::kByte, 65536, name);
    state.values = floats(tables[0]), state.limits = floats(tables[1]);
    state.cells = tables[2].const_data_ptr<uint8_t>();
    state.linear = entries == 16;
    for (int i = 0; i < 16; i++) state.linear &= state.values[i] == (i + 1) / 16.0f;
  }
  return state;
}

int64_t maxima_of(const State& state, const AdamJob& job) {
  return scaled(state.store) ? 1 : state.store == Store::kRank1 ? job.row_count + job.row_length : 0;
}

AdamJob job_of(at::TensorList tensors, at::TensorList tables, const at::Tensor& grad, at::IntArrayRef spec_values,
               at::ArrayRef<double> n) {
  TORCH_CHECK(tensors.size() == kPlaces && tables.size() == 6 && n.size() == 12 &&
              spec_values.size() * sizeof(int64_t) == sizeof(Spec), "adamw: arguments");
  const Spec& spec = *(const Spec*)spec_values.data();
  AdamJob job{};
  job.count = grad.numel(), job.offset = spec.offset;
  job.row_count = spec.row_count, job.row_length = spec.row_length;
  TORCH_CHECK(job.offset % kUnit == 0 && job.count > 0 && job.offset + job.count <= job.row_count * job.row_length, "extent");
  job.grad_store = grad.scalar_type() == at::kFloat ? Store::kFloat : Store::kBf16;
  check(grad, type_of(job.grad_store), job.count, "grad");
  job.grad = grad.const_data_ptr();
  job.exp_avg = state_of(&tensors[kMoments], &tables[0], (Store)spec.exp_avg, job, "exp_avg");
  job.exp_avg_sq = state_of(&tensors[kSquares], &tables[3], (Store)spec.exp_avg_sq, job, "exp_avg_sq");
  job.weight = state_of(&tensors[kWeight], nullptr, (Store)spec.weight, job, "weight");
  job.exp_avg_sq.found_at = maxima_of(job.exp_avg, job);
  job.weight.found_at = job.exp_avg_sq.found_at + maxima_of(job.exp_avg_sq, job);
  job.write = (Write)spec.write;
  TORCH_CHECK(job.write == Write::kNearest || job.weight.store == Store::kBf16, "this rule writes BF16 weights");
  if (job.write >= Write::kKahan) {
    check(tensors[kLow], at::kBFloat16, job.count, "low");
    job.low = (Bf16*)tensors[kLow].mutable_data_ptr();
  }
  if (job.write == Write::kCollagePlus) {
    check(tensors[kSquaresLow], at::kBFloat16, job.count, "exp_avg_sq.low");
    job.exp_avg_sq_low = (Bf16*)tensors[kSquaresLow].mutable_data_ptr();
  }
  float* to[] = {&job.grad_scale, &job.one_minus_beta1, &job.beta2, &job.one_minus_beta2, &job.minus_step, &job.root_correction,
                 &job.eps, &job.keep, &job.decay, &job.beta1, &job.beta2_high, &job.beta2_low};
  for (size_t i = 0; i < n.size(); i++) *to[i] = (float)n[i];
  return job;
}

at::Tensor adamw_maxima(at::TensorList tensors, at::TensorList tables, const at::Tensor& grad, at::IntArrayRef spec,
                        at::ArrayRef<double> numbers) {
  const AdamJob job = job_of(tensors, tables, grad, spec, numbers);
  const int64_t length = job.weight.found_at + maxima_of(job.weight, job);
  at::Tensor maxima = at::zeros({length}, at::kFloat);
  float* all = maxima.mutable_data_ptr<float>();
  std::mutex lock;
  at::parallel_for(0, (job.count + kUnit - 1) / kUnit, kUnitsOfAThread, [&](int64_t begin, int64_t end) {
    std::vector<float> mine(length);
    kernels_in_use().adamw_maxima(job, begin, end, mine.data());
    const std::lock_guard<std::mutex> guard(lock);
    for (int64_t i = 0; i < length; i++) all[i] = std::max(all[i], mine[i]);
  });
  return maxima;
}

// Decode scale 2^-k, 2^k the largest power of two with 2^k amax <= largest: lowprec/codecs.py, power_of_two_scale.
float power_of_two_scale(float amax, float largest, float previous) {
  if (!(amax > 0) || !std::isfinite(amax)) return previous;
  const int exponent = std::ilogb(largest / std::max(amax, 0x1p-110f));
  return std::ldexp(1.0f, -std::clamp(exponent, -126, 126));
}

void take_maxima(State& state, const float* maxima, float* inverses, const AdamJob& job, float largest) {
  const float* mine = maxima + state.found_at;
  inverses += state.found_at;
  if (scaled(state.store)) state.next_scale = power_of_two_scale(*mine, largest, state.scale);
  if (state.store != Store::kRank1) return;
  for (int64_t i = 0; i < job.row_count + job.row_length; i++) inverses[i] = 1.0f / std::max(mine[i], 0x1p-126f);
  state.next_rows = inverses, state.next_columns = inverses + job.row_count;
}

void keep_scales(const State& state, const float* maxima, const at::Tensor* parts, const AdamJob& job) {
  if (scaled(state.store)) *floats(parts[kScales]) = state.next_scale;
  if (state.store != Store::kRank1) return;
  std::copy_n(maxima + state.found_at, job.row_count, floats(parts[kRows]));
  std::copy_n(maxima + state.found_at + job.row_count, job.row_length, floats(parts[kColumns]));
}

float largest_of(Store store) { return store == Store::kHalf ? 65504.0f : 448.0f; }

at::Tensor adamw(at::TensorList tensors, at::TensorList tables, const at::Tensor& grad, const MaybeTensor& maxima,
                 const MaybeTensor& random, at::IntArrayRef spec, at::ArrayRef<double> numbers, bool measure) {
  AdamJob job = job_of(tensors, tables, grad, spec, numbers);
  const int64_t wanted = job.weight.found_at + maxima_of(job.weight, job), units = (job.count + kUnit - 1) / kUnit;
  const float* values = nullptr;
  std::vector<float> inverses(wanted);
  if (wanted) {
    TORCH_CHECK(maxima, "adamw needs the tensor's maxima");
    check(*maxima, at::kFloat, wanted, "maxima");
    values = maxima->const_data_ptr<float>();
    for (State* state : {&job.exp_avg, &job.exp_avg_sq, &job.weight})
      take_maxima(*state, values, inverses.data(), job, largest_of(state->store));
  }
  if (job.write == Write::kStochastic) {
    TORCH_CHECK(random && random->scalar_type() == at::kLong && random->numel() == 5 && random->is_contiguous(), "random");
    const int64_t* words = random->const_data_ptr<int64_t>();
    job.random = {true, {(uint32_t)words[0], (uint32_t)words[1]}, (uint32_t)words[2], (uint64_t)words[3], 0};
  }
  std::vector<double> tally(measure ? 3 * units : 0);
  job.tally = measure ? tally.data() : nullptr;
  const Kernels& kernels = kernels_in_use();
  at::parallel_for(0, units, kUnitsOfAThread, [&](int64_t begin, int64_t end) { kernels.adamw(job, begin, end); });
  keep_scales(job.exp_avg, values, &tensors[kMoments], job);
  keep_scales(job.exp_avg_sq, values, &tensors[kSquares], job);
  keep_scales(job.weight, values, &tensors[kWeight], job);
  at::Tensor sums = at::zeros({3}, at::kDouble);
  for (size_t i = 0; i < tally.size(); i++) sums.mutable_data_ptr<double>()[i % 3] += tally[i];
  return sums;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lowprec_cpu, m) {
  m.def("adamw_maxima(Tensor[] tensors, Tensor[] tables, Tensor grad, int[] spec, float[] numbers) -> Tensor");
  m.def("adamw(Tensor(a!)[] tensors, Tensor[] tables, Tensor grad, Tensor? maxima, Tensor? random, int[] spec, "
        "float[] numbers, bool measure) -> Tensor");
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) {
  m.impl("adamw_maxima", &adamw_maxima);
  m.impl("adamw", &adamw);
}

}  // namespace lowprec
