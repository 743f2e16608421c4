// The torch operators, and the choice of the instruction set at run time.
//
//   operand(x, amax?, scale?, signs?, random?, spec, dtype) -> (values, scale, amax)
//   pack(x, amax?, scale?, signs?, random?, spec) -> (codes, block scales, scale, amax)
//   unpack(codes, block scales, spec, dtype) -> values
//   amax(x, signs?, axis) -> amax
//
// `spec` is a list of integers, in the order of `Spec` in task.h (lowprec/kernels/support.py makes it); `random` is
// int64 [k0, k1, step, row, column]; `signs` float32 [hadamard], divided by sqrt(hadamard). `scale` and `amax` of the
// results are float32 scalars: what belongs after a GEMM, and the tensor's amax (0 where none is needed).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "task.h"

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> operand(const at::Tensor& x, const MaybeTensor& amax,
                                                       const MaybeTensor& scale, const MaybeTensor& signs,
                                                       const MaybeTensor& random, at::IntArrayRef spec,
                                                       at::ScalarType dtype) {
  Task task(x, {amax, scale, signs, random}, spec);
  task.write_values(dtype);
  task.run();
  return {task.out(), scalar(task.after()), scalar(task.amax())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack(const at::Tensor& x, const MaybeTensor& amax,
                                                                const MaybeTensor& scale, const MaybeTensor& signs,
                                                                const MaybeTensor& random, at::IntArrayRef spec) {
  Task task(x, {amax, scale, signs, random}, spec);
  task.write_codes();
  task.run();
  return {task.out(), task.scales(), scalar(task.after()), scalar(task.amax())};
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
