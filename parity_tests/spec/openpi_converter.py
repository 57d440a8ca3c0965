"""What openpi's `examples/convert_jax_model_to_pytorch.py` does to each tensor, written out.

Apart from its two faults: sizes are the config's, and the attention's output is transposed rightly
where heads times head_dim is not the width.
"""

import numpy as np

_HEADS = (
    "action_in_proj",
    "action_out_proj",
    "time_mlp_in",
    "time_mlp_out",
    "state_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
)


def openpi_convert(tree, config):
    """JAX tensors by openpi's names, as PyTorch tensors by openpi's names."""
    converted = {
        "paligemma_with_expert.paligemma.lm_head.weight": tree[
            "PaliGemma/llm/embedder/input_embedding"
        ]
    }
    for name in _HEADS:
        if f"{name}/kernel" in tree:
            converted[f"{name}.weight"] = tree[f"{name}/kernel"].T
            converted[f"{name}.bias"] = tree[f"{name}/bias"]
    converted |= _convert_vision(tree, config.vision)
    language = "paligemma_with_expert.paligemma.model.language_model."
    converted |= _convert_expert(tree, "", language, config.paligemma)
    action = "paligemma_with_expert.gemma_expert.model."
    return converted | _convert_expert(tree, "_1", action, config.action_expert)


def _convert_vision(tree, variant):
    img, paligemma = "PaliGemma/img/", "paligemma_with_expert.paligemma.model."
    tower = f"{paligemma}vision_tower.vision_model."
    converted = {
        f"{tower}embeddings.patch_embedding.weight": np.transpose(
            tree[f"{img}embedding/kernel"], (3, 2, 0, 1)
        ),
        f"{tower}embeddings.patch_embedding.bias": tree[f"{img}embedding/bias"],
        f"{tower}embeddings.position_embedding.weight": tree[f"{img}pos_embedding"][0],
        f"{tower}post_layernorm.weight": tree[f"{img}Transformer/encoder_norm/scale"],
        f"{tower}post_layernorm.bias": tree[f"{img}Transformer/encoder_norm/bias"],
        f"{paligemma}multi_modal_projector.linear.weight": tree[f"{img}head/kernel"].T,
        f"{paligemma}multi_modal_projector.linear.bias": tree[f"{img}head/bias"],
    }
    stacked, width = f"{img}Transformer/encoderblock/", variant.width
    for i in range(variant.depth):
        block = f"{tower}encoder.layers.{i}."
        for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
            converted[f"{block}{ours}.weight"] = tree[f"{stacked}{theirs}/scale"][i]
            converted[f"{block}{ours}.bias"] = tree[f"{stacked}{theirs}/bias"][i]
        for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            dense = f"{stacked}MlpBlock_0/{theirs}"
            converted[f"{block}mlp.{ours}.weight"] = tree[f"{dense}/kernel"][i].T
            converted[f"{block}mlp.{ours}.bias"] = tree[f"{dense}/bias"][i]
        attention = f"{stacked}MultiHeadDotProductAttention_0/"
        projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        for theirs, ours in projections.items():
            kernel = tree[f"{attention}{theirs}/kernel"][i].reshape(-1, width)
            converted[f"{block}self_attn.{ours}.weight"] = kernel.T
            converted[f"{block}self_attn.{ours}.bias"] = tree[f"{attention}{theirs}/bias"][
                i
            ].reshape(-1)
    return converted


def _convert_expert(tree, x, expert, variant):
    llm, width = "PaliGemma/llm/", variant.width
    converted = _convert_norm(tree, f"{llm}final_norm{x}", f"{expert}norm", ...)
    for i in range(variant.depth):
        block, layers = f"{expert}layers.{i}.", f"{llm}layers/"
        q = tree[f"{layers}attn/q_einsum{x}/w"][i]
        k, v = tree[f"{layers}attn/kv_einsum{x}/w"][i]
        out = tree[f"{layers}attn/attn_vec_einsum{x}/w"][i]
        gate, up = tree[f"{layers}mlp{x}/gating_einsum"][i]
        converted |= {
            f"{block}self_attn.q_proj.weight": q.transpose(0, 2, 1).reshape(-1, width),
            f"{block}self_attn.k_proj.weight": k.transpose(0, 2, 1).reshape(-1, width),
            f"{block}self_attn.v_proj.weight": v.transpose(0, 2, 1).reshape(-1, width),
            f"{block}self_attn.o_proj.weight": out.transpose(2, 0, 1).reshape(width, -1),
            f"{block}mlp.gate_proj.weight": gate.T,
            f"{block}mlp.up_proj.weight": up.T,
            f"{block}mlp.down_proj.weight": tree[f"{layers}mlp{x}/linear"][i].T,
        }
        norms = {
            "pre_attention_norm": "input_layernorm",
            "pre_ffw_norm": "post_attention_layernorm",
        }
        for theirs, ours in norms.items():
            converted |= _convert_norm(tree, f"{layers}{theirs}{x}", f"{block}{ours}", i)
    return converted


def _convert_norm(tree, theirs, ours, index):
    if f"{theirs}/scale" in tree:
        return {f"{ours}.weight": tree[f"{theirs}/scale"][index]}
    return {
        f"{ours}.dense.weight": tree[f"{theirs}/Dense_0/kernel"][index].T,
        f"{ours}.dense.bias": tree[f"{theirs}/Dense_0/bias"][index],
    }
