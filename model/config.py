"""Shape and options of the transformer, with what follows from them: parameter count and FLOPs.

Parameters (h hidden, f FFN, V vocabulary, L layers, q = heads * head_size, kv = kv_heads * head_size, m FFN
matrices: 3 for SwiGLU, else 2; n values in a norm: h, or 2h for LayerNorm with bias):
    V h (twice if untied) + L (h (q + 2 kv) + q h + m h f + 2 n [+ 2 head_size of QK-norm] [+ biases]) + n

With a pattern each block has one of the three: attention, FFN (and one norm, n values), or the mixer of model/mamba.py.

FLOPs of one trained token (forward 1, backward 2; a multiply-add is 2), by the convention of Megatron-LM's
`num_floating_point_operations`: logits counted, embedding lookup not, attention scores counted as causal
(half of the square), a Mamba mixer as its projections and 7 x inner width x state for its scan, recomputation not
counted:
    6 (L (h (q + 2 kv) + q h + q S + m h f) + h V)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.mamba import MambaConfig

MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**15
KINDS = "M*-"  # of sublayers, in Megatron-LM's notation: Mamba-2, attention, FFN


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only, pre-norm transformer.

    dtype: of parameters and activations; norms, rotary embedding and loss compute in FP32 in either case.
    vocab_size, hidden_size, num_layers, num_heads, ffn_size: the usual shape.
    pattern: one character a block, in Megatron-LM's notation: M Mamba-2, * attention, - FFN; none: every block is
        attention and FFN.
    mamba: sizes of the M blocks.
    num_kv_heads: key/value heads (grouped-query attention); none: as many as num_heads.
    head_dim: width of one head; none: hidden_size / num_heads.
    activation: swiglu (silu(gate) * up), relu2 (relu squared), gelu (tanh approximation: GPT-2's, and the one of
        Megatron-LM's fused bias-GELU).
    norm, norm_eps: rmsnorm or layernorm, and the epsilon under the root.
    position: rope (rotary, rotate-half as in Hugging Face's Llama) or none; rope_theta is its base.
    bias: on every linear except lm_head, and on LayerNorm (RMSNorm has none).
    tied_embeddings: the output projection is the embedding; there is no lm_head.
    qk_norm: RMSNorm over head_dim on queries and keys before the rotary embedding (as in Qwen3).
    recompute: what the backward computes again instead of keeping: none, selective (the attention core: scores,
        softmax, values; Korthikanti et al., arXiv:2205.05198; of a Mamba mixer all between its projections) or full
        (each block).
    init: normal (N(0, init_std) for every matrix) or megatron (the same, but attention.out, mlp.down and
        mamba.out_proj, which feed the residual stream, with init_std / sqrt(2 num_layers); with a pattern, whose blocks
        feed it once, with init_std / sqrt(num_layers)). Norm weights are 1 and biases 0 in both.
    init_from: directory with weights to start from instead (of `python -m convert.from_hf`).
    """

    dtype: Literal["bf16", "fp32"] = "bf16"
    vocab_size: int
    hidden_size: int
    num_layers: int
    pattern: str | None = None
    mamba: MambaConfig = field(default_factory=MambaConfig)
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_size: int
    activation: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position: Literal["rope", "none"] = "rope"
    rope_theta: float = 10000.0
    bias: bool = False
    tied_embeddings: bool = False
    qk_norm: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    init: Literal["normal", "megatron"] = "megatron"
    init_std: float = 0.02
    init_from: str | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kinds of sublayers of each block, in order."""
        return ("*-",) * self.num_layers if self.pattern is None else tuple(self.pattern)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.kv_heads

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: per key/value head its query heads, then the key, then the value."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_size

    @property
    def up_size(self) -> int:
        """Rows of the first FFN matrix: gate and up for SwiGLU, else up alone."""
        return (2 if self.activation == "swiglu" else 1) * self.ffn_size

    def parameter_count(self) -> int:
        """Number of parameters; the formula is in the module's docstring."""
        h, affine = self.hidden_size, self.bias
        norm = h * (2 if self.norm == "layernorm" and affine else 1)
        each = {
            "M": self.mamba.parameter_count(h, affine),
            "*": h * (self.qkv_size + self.q_size) + (self.qkv_size + h) * affine + 2 * self.head_size * self.qk_norm,
            "-": h * (self.up_size + self.ffn_size) + (self.up_size + h) * affine,
        }
        sublayers = sum(each[kind] + norm for kind in "".join(self.blocks))
        return self.vocab_size * h * (1 if self.tied_embeddings else 2) + sublayers + norm

    def block_flops(self, seq_len: int) -> tuple[int, ...]:
        """FLOPs to train each block on one token of a sequence of `seq_len`, by the same convention."""
        h = self.hidden_size
        each = {
            "M": self.mamba.flops_per_token(h),
            "*": 6 * (h * (self.qkv_size + self.q_size) + self.q_size * seq_len),
            "-": 6 * h * (self.up_size + self.ffn_size),
        }
        return tuple(sum(each[kind] for kind in block) for block in self.blocks)

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token of a sequence of `seq_len`; formula and convention in the module's docstring."""
        return sum(self.block_flops(seq_len)) + 6 * self.hidden_size * self.vocab_size

    def problems(self) -> list[str]:
        """One message for each invalid value; empty if the model can be built."""
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
        values = {name: getattr(self, name) for name in sizes}
        found = [f"{name} is {n}: it must be at least 1" for name, n in values.items() if n is not None and n < 1]
        if self.num_layers > MOST_LAYERS:
            found.append(f"num_layers is {self.num_layers}: more than {MOST_LAYERS:,} are a mistake")
        if found:
            return found
        if self.num_heads % self.kv_heads:
            found.append(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            found.append(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: set head_dim")
        if self.position == "rope" and self.head_size % 2:
            found.append(f"head_dim {self.head_size} is odd: rope rotates pairs; make it even or set position: none")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if getattr(self, name) <= 0:
                found.append(f"{name} is {getattr(self, name)}: it must be positive")
        found += self._pattern_problems()
        if not found and (count := self.parameter_count()) > MOST_PARAMETERS:
            found.append(f"these sizes make {count:.1e} parameters; more than {MOST_PARAMETERS:.0e} are a mistake")
        return found

    def _pattern_problems(self) -> list[str]:
        pattern, found = self.pattern, []
        if pattern is None or "M" not in pattern:
            if self.mamba != MambaConfig():
                found.append("mamba is set, but no block is M; name such blocks in model.pattern, or drop it")
        else:
            found += [f"mamba.{problem}" for problem in self.mamba.problems(self.hidden_size)]
        if pattern is not None and (unknown := sorted(set(pattern) - set(KINDS))):
            found.append(f"pattern {pattern!r} has {''.join(unknown)!r}; M is Mamba-2, * attention, - FFN")
        elif pattern is not None and len(pattern) != self.num_layers:
            found.append(f"pattern {pattern!r} has {len(pattern)} blocks, num_layers is {self.num_layers}")
        return found
