// The kernels compiled for whatever the compiler targets without further flags.
#define LOWPREC_ISA portable
// clang-format off: simd first
#include "simd_portable.h"
#include "kernels.h"
// clang-format on

namespace lowprec {
extern const Kernels kernels_portable = {"portable", portable::items, portable::quantize, portable::amax,
                                         portable::dequantize, portable::adamw, portable::adamw_maxima};
}
