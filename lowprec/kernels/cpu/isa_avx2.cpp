// The kernels compiled for avx2: the whole file is, so it must share no inline function with another file.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define LOWPREC_ISA avx2
#include "simd_avx2.h"
// clang-format off: simd first
#include "kernels.h"
// clang-format on

namespace lowprec {
extern const Kernels kernels_avx2 = {"avx2",           avx2::items, avx2::quantize,    avx2::amax,
                               avx2::dequantize, avx2::adamw, avx2::adamw_maxima};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
