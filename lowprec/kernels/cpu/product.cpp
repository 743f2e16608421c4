#include "product.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace lowprec {

constexpr int64_t kCacheBytes = 1 << 19;  // of the FP32 rows that a thread has in hand

static int64_t rows_at_once(int64_t rows, int64_t width, int64_t threads) {
  const int64_t fit = kCacheBytes / (int64_t)sizeof(float) / width, share = (rows + threads - 1) / threads;
  return std::max(std::min(fit, share) / Task::kRows, (int64_t)1) * Task::kRows;
}

at::Tensor multiply_rows(const at::Tensor& x, const Task& left, const Task* side, const at::Tensor& right, bool turned,
                         float after, const MaybeTensor& bias, at::Tensor* values) {
  const at::Tensor factor = turned ? right.t() : right;
  const int64_t m = x.size(0), k = left.cols(), n = factor.size(1), threads = at::get_num_threads();
  TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.size(0) == k, "right must be FP32 with ", k, " rows, it is ",
              factor.scalar_type(), " with ", factor.size(0));
  const auto wide = at::TensorOptions(at::kFloat);
  const float alpha = left.after() * after;
  const int64_t size = rows_at_once(m, k + n, threads);
  const at::Tensor y = at::empty({m, n}, x.options()), scratch = at::empty({threads, size * (k + n)}, wide);
  const at::Tensor nothing = at::zeros({1}, wide);
  if (values) *values = at::empty({m, k}, wide);
  float* const kept = values ? values->mutable_data_ptr<float>() : nullptr;

  at::parallel_for(0, (m + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    float* own = scratch.mutable_data_ptr<float>() + at::get_thread_num() * size * (k + n);
    for (int64_t first = begin * size; first < std::min(end * size, m); first += size) {
      const int64_t rows = std::min(size, m - first);
      float* quantized = kept ? kept + first * k : own + size * n;
      left.run_rows(first, size, quantized);
      if (side) side->run_rows(first, size);
      at::Tensor sums = at::from_blob(own, {rows, n}, wide);
      at::addmm_out(sums, nothing, at::from_blob(quantized, {rows, k}, wide), factor, 0, alpha);
      if (bias) sums.add_(*bias);
      y.narrow(0, first, rows).copy_(sums);
    }
  });
  return y;
}

}  // namespace lowprec
