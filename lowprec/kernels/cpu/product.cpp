#include "product.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace lowprec {

constexpr int64_t kCacheBytes = 1 << 19;  // of the FP32 rows that a thread has in hand
constexpr int64_t kNarrow = 1 << 19;      // elements of a right operand that each thread can have in its cache as well

namespace {

struct Product {
  const at::Tensor &x, factor;
  float alpha;
  const MaybeTensor& bias;

  void into(at::Tensor& sums, const at::Tensor& left) const {
    at::addmm_out(sums, at::zeros({1}, sums.options()), left, factor, 0, alpha);
    if (bias) sums.add_(*bias);
  }
};

at::Tensor whole(const Product& product, Task& left, const Task* side, at::Tensor* values) {
  left.write_values(at::kFloat);
  run_together(left, side);
  at::Tensor sums = at::empty({product.x.size(0), product.factor.size(1)}, at::TensorOptions(at::kFloat));
  product.into(sums, left.out());
  if (values) *values = left.out();
  return sums.to(product.x.scalar_type());
}

int64_t rows_at_once(int64_t rows, int64_t width, int64_t threads) {
  const int64_t fit = kCacheBytes / (int64_t)sizeof(float) / width, share = (rows + threads - 1) / threads;
  return std::max(std::min(fit, share) / Task::kRows, (int64_t)1) * Task::kRows;
}

at::Tensor rows_by_rows(const Product& product, const Task& left, const Task* side, at::Tensor* values) {
  const int64_t m = product.x.size(0), k = left.cols(), n = product.factor.size(1), threads = at::get_num_threads();
  const int64_t size = rows_at_once(m, k + n, threads);
  const auto wide = at::TensorOptions(at::kFloat);
  const at::Tensor y = at::empty({m, n}, product.x.options()), scratch = at::empty({threads, size * (k + n)}, wide);
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
      product.into(sums, at::from_blob(quantized, {rows, k}, wide));
      y.narrow(0, first, rows).copy_(sums);
    }
  });
  return y;
}

}  // namespace

at::Tensor multiply(const at::Tensor& x, Task& left, const Task* side, const at::Tensor& right, bool turned, float after,
                    const MaybeTensor& bias, at::Tensor* values) {
  const Product product{x, turned ? right.t() : right, left.after() * after, bias};
  TORCH_CHECK(right.scalar_type() == at::kFloat && product.factor.size(0) == left.cols(), "right must be FP32 with ",
              left.cols(), " rows, it is ", right.scalar_type(), " with ", product.factor.size(0));
  const bool narrow = right.numel() <= kNarrow && x.size(0) >= Task::kRows * at::get_num_threads();
  return narrow ? rows_by_rows(product, left, side, values) : whole(product, left, side, values);
}

}  // namespace lowprec
