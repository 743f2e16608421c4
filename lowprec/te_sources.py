"""What lowprec/te.py and lowprec/te_layers.py know of the inside of Transformer Engine, by fingerprints of its source.

    its function                       what we rely on
    IdentityQuantizer, HybridQuantizer `_maybe_cast` is what stands between a matrix and its copy; children; `copy`
    is_custom                          a quantizer with `custom` is gathered in high precision first
    make_quantizers of recipe states   the factory is asked once a slot; a recipe's attributes reach its quantizers
    WeightGradStore                    the two methods that our `Queue` has in its place
    base module                        `fp8_meta_tensors_initialized`, `fp8_meta`, `_fp8_workspaces`, who sums up biases
    forward and backward of layers     slots of quantizers, closures that compute weight gradients, the protocol of
                                       main_grad, `gemm_bias_unfused_add`, parameters by their names

A release whose sources differ is refused until somebody has read what changed: with the tests of tests/te_cpu passed,
its fingerprints are added here. Fingerprints are of 2.20.2, and of 2.19.0 where that differs.
"""

from __future__ import annotations

from functools import cache

from lowprec.patching import Sources

# "name|other": the first of the two that is there. te.Linear was taken apart for torch.compile in 2.20, which changed
# no path that runs here; of LayerNormMLP's backward, only what concerns Userbuffers.
KNOWN = {
    "tensor.identity_tensor:IdentityQuantizer.__init__": ("061eb0cc591b",),
    "tensor.identity_tensor:IdentityQuantizer.copy": ("efd4fe46f86b",),
    "tensor.identity_tensor:IdentityQuantizer._maybe_cast": ("b7ecc3ef2c55",),
    "tensor.identity_tensor:IdentityQuantizer.quantize_impl": ("7f2d12915050",),
    "tensor.identity_tensor:IdentityQuantizer.update_quantized": ("941847215931",),
    "tensor.hybrid_tensor:HybridQuantizer.__init__": ("5a0a860516f9",),
    "tensor.hybrid_tensor:HybridQuantizer.copy": ("0326f9fdbbd3",),
    "tensor.hybrid_tensor:HybridQuantizer.quantize_impl": ("eaaccba892a3",),
    "tensor.hybrid_tensor:HybridQuantizer.update_quantized": ("ec5da20408dd",),
    "tensor.utils:is_custom": ("a25ccaef3f64",),
    "quantization:CustomRecipeState.make_quantizers": ("ec3519cd9b9b",),
    "quantization:Float8CurrentScalingRecipeState.make_quantizers": ("56afd870b77c",),
    "quantization:Float8BlockScalingRecipeState.make_quantizers": ("3480b3d2c574",),
    "quantization:MXFP8BlockScalingRecipeState.make_quantizers": ("43c3409040ef",),
    "quantization:NVFP4BlockScalingRecipeState.make_quantizers": ("413c52fb48cd",),
    "module._common:WeightGradStore.__init__": ("43f7d1a32849",),
    "module._common:WeightGradStore.delay_wgrad_compute": ("b1501b7de8de",),
    "module._common:WeightGradStore.put": ("5e1b8f214127",),
    "module.base:quantize_weight": ("718428736919",),
    "module.base:TransformerEngineBaseModule.__init__": ("6ae88ae667e5",),
    "module.base:TransformerEngineBaseModule.set_meta_tensor": ("01da0a495286",),
    "module.base:TransformerEngineBaseModule.init_fp8_meta_tensors": ("16cdf5c53bf2",),
    "module.base:TransformerEngineBaseModule.init_fp8_metadata": ("40298551d5f1",),
    "module.base:TransformerEngineBaseModule.grad_output_preprocess": ("316dfe33dfb9",),
    "module.linear:_linear_forward_impl": ("c2b53b9e70db", "e3ef0f3680f2"),
    "module.linear:_linear_setup_ctx": ("b82614ec405c", "f0421bb854aa"),
    "module.linear:_linear_backward_impl|_linear_backward": ("68bba28f998f", "7d68d305936f"),
    "module.linear:Linear.__init__": ("db3f365ad77e",),
    "module.linear:Linear.forward": ("a8d0b4c5d019", "e84828520205"),
    "module.linear:Linear.get_quantizer_roles": ("d04d011d1986",),
    "module.linear:Linear._get_quantizers": ("2c71d35bf7a4",),
    "module.layernorm_linear:_LayerNormLinear.forward": ("b6f701e7bde9",),
    "module.layernorm_linear:_LayerNormLinear.backward": ("1412a8cc58ef",),
    "module.layernorm_linear:LayerNormLinear.__init__": ("d639c39163da",),
    "module.layernorm_linear:LayerNormLinear.forward": ("c88f3b419bd3",),
    "module.layernorm_linear:LayerNormLinear.get_quantizer_roles": ("3e881d02b53a",),
    "module.layernorm_linear:LayerNormLinear._get_quantizers": ("f06c47744dad",),
    "module.layernorm_mlp:_LayerNormMLP._forward": ("c0c8b616ae57",),
    "module.layernorm_mlp:_LayerNormMLP.backward": ("99913bfa77e9", "6545f873a004"),
    "module.layernorm_mlp:LayerNormMLP.__init__": ("b071d673a671",),
    "module.layernorm_mlp:LayerNormMLP.forward": ("79992c9fe749",),
    "module.layernorm_mlp:LayerNormMLP.get_quantizer_roles": ("3456f7975aa9",),
    "module.layernorm_mlp:LayerNormMLP._get_quantizers": ("3c661553ccb6",),
}
SOURCES = Sources(
    dist="transformer_engine", of={f"transformer_engine.pytorch.{place}": known for place, known in KNOWN.items()}
)


@cache
def drifted() -> tuple[str, ...]:
    """For each function that is not as we know it, how the installed Transformer Engine differs."""
    return tuple(SOURCES.drifted())
