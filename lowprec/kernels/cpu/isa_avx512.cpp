// The kernels compiled for avx512: the whole file is, so it must share no inline function with another file.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2")
#endif
#define LOWPREC_ISA avx512
#include "simd_avx512.h"
// clang-format off: simd first
#include "kernels.h"
// clang-format on

namespace lowprec {
extern const Kernels kernels_avx512 = {"avx512",           avx512::items, avx512::quantize,    avx512::amax,
                               avx512::dequantize, avx512::adamw, avx512::adamw_maxima};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
