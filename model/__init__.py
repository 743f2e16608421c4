"""The decoder-only transformer: plain modules that know neither precision nor ranks.

Every GEMM weight is an `nn.Linear`, so that low precision can replace it by name and tensor parallelism can
slice it. Module names are stable; checkpoints, precision rules and conversions speak them:
`embedding`, `layers.{i}.{attention_norm, attention.qkv, attention.out, mlp_norm, mlp.gate_up | mlp.up, mlp.down}`,
`layers.{i}.attention.{q_norm, k_norm}` with QK-norm, `norm`, and `lm_head` unless tied.
"""
