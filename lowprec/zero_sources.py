"""What lowprec/zero.py and lowprec/zero_optimizer.py rely on inside DeepSpeed 0.19.8, by fingerprints of its source.

Methods that our subclasses override or call, those that call what is overridden, and those that make the attributes
that are read. What only runs with offloading, which we never ask for, is not here.
"""

from __future__ import annotations

STAGES_0_TO_2 = {
    "__init__": "e9c9d9eb3054",
    "_build_compact_grad_partition_buffer": "bfb6551b9e79",
    "_clear_previous_reduced_grads": "583677393727",
    "_create_param_mapping": "90ed173cd32a",
    "_fill_param_grad_accum_attribute": "1b50beac85f6",
    "_get_compact_grad_partition_buffer": "9c44fe29b5b1",
    "_get_flat_partition_unpadded": "04936c07b3ca",
    "_gradient_reduction_buffer_dtype": "a5798dc54849",
    "_lazy_init_hp_params_optimizer_state": "b28be00a467c",
    "_link_all_hp_params": "2f55a86c2e44",
    "_model_parallel_all_reduce": "7eb8eb0deaf5",
    "_update_model_bit16_weights": "5fe84d1350e7",
    "_update_scale": "0c162f500494",
    "_use_compact_grad_partition_buffer": "43ecf54e7ef0",
    "average_tensor": "a9941e3d346c",
    "backward": "d9d5250f7d8c",
    "backward_epilogue": "d16eb7bc36ba",
    "clear_grad_attribute": "b90cf25356dd",
    "copy_grads_in_partition": "e4e9cba3a1b4",
    "create_gradient_handling_hooks": "eafc19461022",
    "fill_grad_accum_attribute": "300273ed2e3c",
    "finalize_gradient_accumulation_boundary": "350c9486df42",
    "get_gradient_for_reduction": "d839e1d485f9",
    "get_param_gradient_attribute": "8ce7647307bf",
    "get_param_id": "c4eed868ec04",
    "independent_gradient_partition_epilogue": "854f4cf7be3d",
    "process_gradients": "53a2c0be5e68",
    "reduce_gradients": "292fd17a4948",
    "reduce_independent_p_g_buckets_and_remove_grads": "df03a8957341",
    "reduce_ipg_grads": "df3e72454bc8",
    "reduce_ready_partitions_and_remove_grads": "535900d3397d",
    "set_gradient_accumulation_boundary": "0ee8bdb23e44",
    "setup_buckets": "2e4a2c97d31b",
    "step": "7e056292003c",
    "update_lp_params": "d160564ab4e9",
    "zero_grad": "fff4e3013dcc",
}
STAGE_3 = {
    "__init__": "e72f2417ee27",
    "_create_fp32_partitions": "0416e7bec0df",
    "_get_norm_groups": "974311a54ac7",
    "_get_param_partition_rank": "c3f72bb1757d",
    "_loss_scale_update_and_overflow_cleanup": "fa15a8904ed3",
    "_optimizer_step": "4a543331f7be",
    "_partition_all_parameters": "d69e92b8ed15",
    "_prepare_fp32_grad_for_sub_group": "728df2f77998",
    "_reassign_or_swap_out_partitioned_parameters": "628a45836351",
    "_release_sub_group": "6abcf74ba10e",
    "_unflatten_partitioned_parameters": "dd504d0a626c",
    "step": "19695d69a3d9",
}
ENGINE = {
    "_do_optimizer_sanity_check": "697bd4d5478d",
    "_configure_zero_optimizer": "cc7870325a7c",
    "_take_model_step": "3193e047daed",
    "backward": "50334d594e2e",
    "step": "4f17873fa093",
}
