// A GEMM whose left operand is quantized on the way, some rows after the others.
//
//   product(x, inputs, spec, right, turned, after?, bias?, keep, side inputs, side spec, side dtype, same amax)
//       -> (y, values, scale, amax, side, side block scales, side scale, side amax)
//
// y = Q(x) right, or Q(x) right^T (turned), summed in FP32 and rounded once to x's dtype. inputs: [amax?, scale?,
// signs?, random?] of Q and spec as in ops.cpp; right: the other operand, decoded, FP32; after: the scalar that belongs
// after its GEMM. keep: give Q(x), too. side: the same x quantized for another GEMM, if it has a spec: decoded to a
// floating dtype, or packed codes that lie as x does (uint8); same amax: it is scaled by the amax that Q finds.
//
// As whole matrices, the FP32 copies of x and y would each pass through memory twice, and one kernel would wait for all
// threads of another; where the GEMM is small, that is a third of its time. Here a thread takes its rows through
// everything while its second-level cache holds them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "task.h"

namespace lowprec {
namespace {

using MaybeTensors = c10::List<std::optional<at::Tensor>>;
using Product = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kCacheBytes = 1 << 19;  // of the FP32 rows that a thread has in hand

Inputs inputs_of(const MaybeTensors& given) {
  TORCH_CHECK(given.size() == 4, "inputs are amax, scale, signs, random");
  return {given.get(0), given.get(1), given.get(2), given.get(3)};
}

int64_t rows_at_once(int64_t rows, int64_t width, int64_t threads) {
  const int64_t fit = kCacheBytes / (int64_t)sizeof(float) / width, share = (rows + threads - 1) / threads;
  return std::max(std::min(fit, share) / Task::kRows, (int64_t)1) * Task::kRows;
}

Product product(const at::Tensor& x, const MaybeTensors& inputs, at::IntArrayRef spec, const at::Tensor& right, bool turned,
                const MaybeTensor& after, const MaybeTensor& bias, bool keep, const MaybeTensors& side_inputs,
                at::IntArrayRef side_spec, at::ScalarType side_dtype, bool same_amax) {
  Task left(x, inputs_of(inputs), spec);
  const at::Tensor factor = turned ? right.t() : right;
  const int64_t m = x.size(0), k = left.cols(), n = factor.size(1), threads = at::get_num_threads();
  TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.size(0) == k, "right must be FP32 with ", k, " rows, it is ",
              factor.scalar_type(), " with ", factor.size(0));
  std::optional<Task> side;
  if (!side_spec.empty()) {
    Inputs beside = inputs_of(side_inputs);
    if (same_amax) beside.amax = scalar(left.amax());
    side.emplace(x, beside, side_spec);
    side_dtype == at::kByte ? side->write_codes() : side->write_values(side_dtype);
  }
  const float alpha = after ? left.after() * value_of(*after, "after") : left.after();
  const auto wide = x.options().dtype(at::kFloat);
  const int64_t size = rows_at_once(m, k + n, threads);
  const at::Tensor y = at::empty({m, n}, x.options()), values = at::empty({keep ? m : 0, k}, wide);
  const at::Tensor scratch = at::empty({threads, size * (k + n)}, wide), nothing = at::zeros({1}, wide);

  at::parallel_for(0, (m + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    float* own = scratch.mutable_data_ptr<float>() + at::get_thread_num() * size * (k + n);
    for (int64_t first = begin * size; first < std::min(end * size, m); first += size) {
      const int64_t rows = std::min(size, m - first);
      float* quantized = keep ? values.mutable_data_ptr<float>() + first * k : own + size * n;
      left.run_rows(first, size, quantized);
      if (side) side->run_rows(first, size);
      at::Tensor sums = at::from_blob(own, {rows, n}, wide);
      at::addmm_out(sums, nothing, at::from_blob(quantized, {rows, k}, wide), factor, 0, alpha);
      if (bias) sums.add_(*bias);
      y.narrow(0, first, rows).copy_(sums);
    }
  });
  const at::Tensor none = at::empty({0}, x.options());
  return {y,
          values,
          scalar(left.after()),
          scalar(left.amax()),
          side ? side->out() : none,
          side && side->scales().defined() ? side->scales() : none,
          scalar(side ? side->after() : 1.0f),
          scalar(side ? side->amax() : 0.0f)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lowprec_cpu, m) {
  m.def("product(Tensor x, Tensor?[] inputs, int[] spec, Tensor right, bool turned, Tensor? after, Tensor? bias, bool keep, "
        "Tensor?[] side_inputs, int[] side_spec, ScalarType side_dtype, bool same_amax) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lowprec_cpu, CPU, m) { m.impl("product", &product); }

}  // namespace lowprec
