"""How large a gap may be: what is known for a precision policy, else an explicit default.

    policy   limit               source
    mxfp8    0.5 % perplexity    remembered from arXiv 2506.08027 (8 B, 15 T); its abstract, all that could be read,
                                 says that MXFP8 matches BF16, without a number
    nvfp4    1.5 % of the loss   arXiv 2509.25149: below 1 % in the stable phase, about 1.5 % at the end of the decay
                                 (12 B, 10 T tokens); about 1.5 % (8 B, 1 T)
    mxfp4    2.5 % of the loss   arXiv 2509.25149: 8 B, 1 T tokens
    others   0.5 % of the loss   ours. FP8-LM (arXiv 2310.18313) and FP8 report no gap and no number

A loss of 4 nats makes 0.5 % of perplexity 0.12 % of the loss: the unit matters.
"""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A gap up to `percent` of the baseline's loss or perplexity (`unit`) is within the limit."""

    percent: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.percent:g} % of the {self.unit} ({self.source})"


KNOWN = {
    "mxfp8": Limit(percent=0.5, unit="perplexity", source="remembered from arXiv 2506.08027, not read again"),
    "nvfp4": Limit(percent=1.5, unit="loss", source="published for NVFP4, arXiv 2509.25149"),
    "mxfp4": Limit(percent=2.5, unit="loss", source="published for MXFP4, arXiv 2509.25149"),
}
DEFAULT = Limit(
    percent=0.5, unit="loss", source="the default; nothing is published for this recipe, or it is not known"
)


def choose_limit(policy: str | None, percent: float | None, unit: str | None) -> Limit:
    """The limit for a policy's name; a percentage of the user's replaces it (of the loss, unless the unit is given)."""
    if percent is not None:
        return Limit(percent=percent, unit=unit or "loss", source="given")
    found = KNOWN.get(policy or "", DEFAULT)
    if unit is not None and unit != found.unit:
        return Limit(percent=DEFAULT.percent, unit=unit, source=f"the default; none is stated in {unit}")
    return found
