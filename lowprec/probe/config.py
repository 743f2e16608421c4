"""The recipe's section `probe`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Numerics of the run's GEMMs, sampled on one held micro-batch (docs/probing.md). Off: nothing is hooked or paid.

    interval:  steps between samples, written to RUN/probe.jsonl and the sinks of `metrics`; 0: none
    layers:    globs over the names of the linears to look at
    gradients: compare each weight's gradient with that of the same micro-batch in high precision: a second forward and
               backward a sample, and a copy of this rank's gradients
    policy:    look at the model as another precision policy would quantize it (nvfp4 in a BF16 run); null: as it trains
    te_debug:  file with debug features of Transformer Engine (LogTensorStats, LogFp8TensorStats, LogNvfp4TensorStats),
               recorded beside at their own steps
    """

    interval: int = 0
    layers: tuple[str, ...] = ("*",)
    gradients: bool = True
    policy: str | None = None
    te_debug: str | None = None

    @property
    def on(self) -> bool:
        return self.interval > 0 or self.te_debug is not None

    def problems(self) -> list[str]:
        found = []
        if self.interval < 0:
            found.append(f"interval is {self.interval}; use a number of steps, or 0 for no samples")
        if not self.layers:
            found.append('layers is empty; name some, or use ["*"]')
        if self.policy is not None and not self.on:
            found.append(f"policy is {self.policy}, but interval is 0 and te_debug null; set an interval")
        return found
