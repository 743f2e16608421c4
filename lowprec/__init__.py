"""Low-precision numbers: formats, quantizers, and what trains with them.

q = lowprec.quantize(x, "mxfp8_e4m3")                  codes and scales, packed; q.dequantize()
y = lowprec.fake_quantize(x, "nvfp4", hadamard=16)     the same, decoded
values, scale, _ = lowprec.operand(x, "nvfp4")         a GEMM operand, exact in BF16, and its epilogue scale
"""

from lowprec.api import fake_quantize, operand, quantize
from lowprec.delayed import DelayedScale
from lowprec.formats import SPECS, QuantSpec, resolve_spec
from lowprec.philox import RandomKey, StepContext
from lowprec.quantized import Operand, QuantizedTensor

__all__ = [
    "SPECS",
    "DelayedScale",
    "Operand",
    "QuantSpec",
    "QuantizedTensor",
    "RandomKey",
    "StepContext",
    "fake_quantize",
    "operand",
    "quantize",
    "resolve_spec",
]
