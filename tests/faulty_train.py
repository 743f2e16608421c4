"""train.py with one GEMM that goes wrong: `faulty=RANK,MODULE,GEMM,STEP,FACTOR` among its arguments, then as usual.

In that step (counted from 0) the first number of every product of this GEMM is multiplied by FACTOR (nan, 1e6, ...).
"""

from __future__ import annotations

import os
import sys

import train
from lowprec.linear import LowPrecisionLinear


def plant(fault: str, rank: int) -> None:
    """Replace the GEMM of low-precision linears in this process."""
    where, module, gemm, step, factor = fault.split(",")
    right = LowPrecisionLinear.multiply

    def multiply(self, name, a, b, bias=None):  # noqa: ANN001
        product = right(self, name, a, b, bias)
        if (rank, self.name, name, self.shared.position.step) == (int(where), module, gemm, int(step)):
            product[0, 0] *= float(factor)
        return product

    LowPrecisionLinear.multiply = multiply  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    faults = [word for word in sys.argv if word.startswith("faulty=")]
    for word in faults:
        plant(word.partition("=")[2], int(os.environ["RANK"]))
    sys.exit(train.main([word for word in sys.argv[1:] if word not in faults]))
