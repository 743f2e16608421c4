"""The decoder-only transformer and its hybrids with Mamba-2: plain modules that know neither precision nor ranks.

Every GEMM weight is an `nn.Linear`, so that low precision can replace it by name and tensor parallelism can
slice it. Module names are stable; checkpoints, precision rules and conversions speak them:
`embedding`, `layers.{i}.{attention_norm, attention.qkv, attention.out, mlp_norm, mlp.gate_up | mlp.up, mlp.down}`,
`layers.{i}.attention.{q_norm, k_norm}` with QK-norm, `norm`, and `lm_head` unless tied. Under `ModelConfig.pattern` a
block has one sublayer and its norm; Mamba's is
`layers.{i}.{mamba_norm, mamba.{in_proj, conv, A_log, D, dt_bias, norm, out_proj}}`.
"""
