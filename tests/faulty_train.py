"""train.py with one GEMM that goes wrong: `faulty=RANK,MODULE,GEMM,STEP,FACTOR` among its arguments, then as usual.

In that step (counted from 0) the first number of every product of this GEMM is multiplied by FACTOR (nan, 1e6, ...), if
its first operand is quantized. `bisect RUN STEP ...` runs report.bisect instead, with the same fault.
"""

from __future__ import annotations

import os
import sys

import report.bisect
import train
from lowprec.linear import LowPrecisionLinear


def plant(fault: str, rank: int) -> None:
    """Replace the GEMM of low-precision linears in this process."""
    where, module, gemm, step, factor = fault.split(",")
    right = LowPrecisionLinear.multiply

    def multiply(self, name, a, b, bias=None):  # noqa: ANN001
        product = right(self, name, a, b, bias)
        here = (rank, self.name, name, self.shared.position.step) == (int(where), module, gemm, int(step))
        if here and self.specs[f"{gemm}.a"] is not None:
            product[0, 0] *= float(factor)
        return product

    LowPrecisionLinear.multiply = multiply  # pyright: ignore[reportAttributeAccessIssue]
    LowPrecisionLinear.streams = False


if __name__ == "__main__":
    faults = [word for word in sys.argv if word.startswith("faulty=")]
    for word in faults:
        plant(word.partition("=")[2], int(os.environ["RANK"]))
    words = [word for word in sys.argv[1:] if word not in faults]
    sys.exit(report.bisect.main(words[1:]) if words[0] == "bisect" else train.main(words))
