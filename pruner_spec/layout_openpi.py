"""The weight map: every parameter of openpi's JAX and PyTorch models, and of ours.

A row is (stored name, our names, einops pattern), the names relative to the group's two modules;
`pruner_spec.layout_row.LEGEND` explains the axes. Names: openpi's Flax modules under "params", and
the state dict of its `PI0Pytorch`. Adapters, which openpi has in JAX alone, have PEFT's names in
the PyTorch layout, without the "base_model.model." that PEFT puts before every name.
"""

from collections.abc import Iterable, Iterator

from pruner_spec.layout_row import BlockRow, Row


def _under(theirs: str, ours: str, rows: Iterable[tuple[str, str, str]]) -> tuple[Row, ...]:
    return tuple(
        Row(theirs + stored, tuple(ours + target for target in targets.split()), pattern)
        for stored, targets, pattern in rows
    )


_JAX_VISION = (
    ("embedding/kernel", "patch_embedding.kernel", "p q c d -> (p q c) d"),
    ("embedding/bias", "patch_embedding.bias", "d -> d"),
    ("pos_embedding", "position_embedding", "1 n d -> n d"),
    ("Transformer/encoder_norm/scale", "final_norm.scale", "d -> d"),
    ("Transformer/encoder_norm/bias", "final_norm.bias", "d -> d"),
    ("head/kernel", "head.kernel", "d o -> d o"),
    ("head/bias", "head.bias", "o -> o"),
)

_JAX_VISION_BLOCKS = (
    ("LayerNorm_0/scale", "attention_norm.scale", "l d -> l d"),
    ("LayerNorm_0/bias", "attention_norm.bias", "l d -> l d"),
    ("LayerNorm_1/scale", "mlp_norm.scale", "l d -> l d"),
    ("LayerNorm_1/bias", "mlp_norm.bias", "l d -> l d"),
    ("MlpBlock_0/Dense_0/kernel", "mlp.up.kernel", "l d f -> l d f"),
    ("MlpBlock_0/Dense_0/bias", "mlp.up.bias", "l f -> l f"),
    ("MlpBlock_0/Dense_1/kernel", "mlp.down.kernel", "l f d -> l f d"),
    ("MlpBlock_0/Dense_1/bias", "mlp.down.bias", "l d -> l d"),
)

_JAX_VISION_ATTENTION = (
    ("query/kernel", "query.kernel", "l d k h -> l d (k h)"),
    ("query/bias", "query.bias", "l k h -> l (k h)"),
    ("key/kernel", "key.kernel", "l d k h -> l d (k h)"),
    ("key/bias", "key.bias", "l k h -> l (k h)"),
    ("value/kernel", "value.kernel", "l d k h -> l d (k h)"),
    ("value/bias", "value.bias", "l k h -> l (k h)"),
    ("out/kernel", "out.kernel", "l k h d -> l (k h) d"),
    ("out/bias", "out.bias", "l d -> l d"),
)


def _jax_expert(x: str) -> tuple[tuple[str, str, str], ...]:
    """An expert's layers; openpi marks the modules of the second expert with x="_1"."""
    return (
        (f"attn/q_einsum{x}/w", "attention.query.kernel", "l k d h -> l d (k h)"),
        (
            f"attn/kv_einsum{x}/w",
            "attention.key.kernel attention.value.kernel",
            "l two g d h -> two l d (g h)",
        ),
        (f"attn/attn_vec_einsum{x}/w", "attention.out.kernel", "l k h d -> l (k h) d"),
        (f"mlp{x}/gating_einsum", "mlp.gate.kernel mlp.up.kernel", "l two d f -> two l d f"),
        (f"mlp{x}/linear", "mlp.down.kernel", "l f d -> l f d"),
        (f"pre_attention_norm{x}/scale", "attention_norm.scale", "l d -> l d"),
        (f"pre_ffw_norm{x}/scale", "mlp_norm.scale", "l d -> l d"),
    )


def _jax_adapters(x: str) -> tuple[tuple[str, str, str], ...]:
    """The adapters of an expert."""
    kv, mlp = "attention.key.lora.{0} attention.value.lora.{0}", "mlp.gate.lora.{0} mlp.up.lora.{0}"
    return (
        (f"attn/q_einsum{x}/lora_a", "attention.query.lora.a", "l k d r -> l k d r"),
        (f"attn/q_einsum{x}/lora_b", "attention.query.lora.b", "l k r h -> l k r h"),
        (f"attn/kv_einsum{x}/lora_a", kv.format("a"), "l two g d r -> two l g d r"),
        (f"attn/kv_einsum{x}/lora_b", kv.format("b"), "l two g r h -> two l g r h"),
        (f"attn/attn_vec_einsum{x}/lora_a", "attention.out.lora.a", "l k h r -> l k h r"),
        (f"attn/attn_vec_einsum{x}/lora_b", "attention.out.lora.b", "l k r d -> l k r d"),
        (f"mlp{x}/gating_einsum_lora_a", mlp.format("a"), "l two d r -> two l d r"),
        (f"mlp{x}/gating_einsum_lora_b", mlp.format("b"), "l two r f -> two l r f"),
        (f"mlp{x}/linear_lora_a", "mlp.down.lora.a", "l f r -> l f r"),
        (f"mlp{x}/linear_lora_b", "mlp.down.lora.b", "l r d -> l r d"),
    )


_JAX_ADAPTIVE_NORMS = (
    ("pre_attention_norm_1/Dense_0/kernel", "attention_norm.modulation.kernel", "l d m -> l d m"),
    ("pre_attention_norm_1/Dense_0/bias", "attention_norm.modulation.bias", "l m -> l m"),
    ("pre_ffw_norm_1/Dense_0/kernel", "mlp_norm.modulation.kernel", "l d m -> l d m"),
    ("pre_ffw_norm_1/Dense_0/bias", "mlp_norm.modulation.bias", "l m -> l m"),
)

_JAX_REST = (
    ("PaliGemma/llm/embedder/input_embedding", "gemma.embedder.embedding", "v d -> v d"),
    ("PaliGemma/llm/final_norm/scale", "gemma.language.final_norm.scale", "d -> d"),
    ("PaliGemma/llm/final_norm_1/scale", "gemma.action.final_norm.scale", "d -> d"),
    (
        "PaliGemma/llm/final_norm_1/Dense_0/kernel",
        "gemma.action.final_norm.modulation.kernel",
        "d m -> d m",
    ),
    (
        "PaliGemma/llm/final_norm_1/Dense_0/bias",
        "gemma.action.final_norm.modulation.bias",
        "m -> m",
    ),
    ("action_in_proj/kernel", "action_in_proj.kernel", "a d -> a d"),
    ("action_in_proj/bias", "action_in_proj.bias", "d -> d"),
    ("action_out_proj/kernel", "action_out_proj.kernel", "d a -> d a"),
    ("action_out_proj/bias", "action_out_proj.bias", "a -> a"),
    ("time_mlp_in/kernel", "time_mlp_in.kernel", "i o -> i o"),
    ("time_mlp_in/bias", "time_mlp_in.bias", "o -> o"),
    ("time_mlp_out/kernel", "time_mlp_out.kernel", "i o -> i o"),
    ("time_mlp_out/bias", "time_mlp_out.bias", "o -> o"),
    ("state_proj/kernel", "state_proj.kernel", "a d -> a d"),
    ("state_proj/bias", "state_proj.bias", "d -> d"),
    ("action_time_mlp_in/kernel", "action_time_mlp_in.kernel", "i o -> i o"),
    ("action_time_mlp_in/bias", "action_time_mlp_in.bias", "o -> o"),
    ("action_time_mlp_out/kernel", "action_time_mlp_out.kernel", "i o -> i o"),
    ("action_time_mlp_out/bias", "action_time_mlp_out.bias", "o -> o"),
)

_JAX_BLOCK = "PaliGemma/img/Transformer/encoderblock/"
_JAX_ATTENTION = f"{_JAX_BLOCK}MultiHeadDotProductAttention_0/"

JAX_ROWS = (
    *_under("PaliGemma/img/", "vision.", _JAX_VISION),
    *_under(_JAX_BLOCK, "vision.blocks.", _JAX_VISION_BLOCKS),
    *_under(_JAX_ATTENTION, "vision.blocks.attention.", _JAX_VISION_ATTENTION),
    *_under("PaliGemma/llm/layers/", "gemma.language.layers.", _jax_expert("")),
    *_under("PaliGemma/llm/layers/", "gemma.action.layers.", _jax_expert("_1")),
    *_under("PaliGemma/llm/layers/", "gemma.language.layers.", _jax_adapters("")),
    *_under("PaliGemma/llm/layers/", "gemma.action.layers.", _jax_adapters("_1")),
    *_under("PaliGemma/llm/layers/", "gemma.action.layers.", _JAX_ADAPTIVE_NORMS),
    *_under("", "", _JAX_REST),
)

_TORCH_VISION = (
    ("embeddings.patch_embedding.weight", "patch_embedding.kernel", "d c p q -> (p q c) d"),
    ("embeddings.patch_embedding.bias", "patch_embedding.bias", "d -> d"),
    ("embeddings.position_embedding.weight", "position_embedding", "n d -> n d"),
    ("post_layernorm.weight", "final_norm.scale", "d -> d"),
    ("post_layernorm.bias", "final_norm.bias", "d -> d"),
)

_TORCH_VISION_BLOCKS = (
    ("layer_norm1.weight", "attention_norm.scale", "d -> d"),
    ("layer_norm1.bias", "attention_norm.bias", "d -> d"),
    ("layer_norm2.weight", "mlp_norm.scale", "d -> d"),
    ("layer_norm2.bias", "mlp_norm.bias", "d -> d"),
    ("mlp.fc1.weight", "mlp.up.kernel", "f d -> d f"),
    ("mlp.fc1.bias", "mlp.up.bias", "f -> f"),
    ("mlp.fc2.weight", "mlp.down.kernel", "d f -> f d"),
    ("mlp.fc2.bias", "mlp.down.bias", "d -> d"),
    ("self_attn.q_proj.weight", "attention.query.kernel", "o d -> d o"),
    ("self_attn.q_proj.bias", "attention.query.bias", "o -> o"),
    ("self_attn.k_proj.weight", "attention.key.kernel", "o d -> d o"),
    ("self_attn.k_proj.bias", "attention.key.bias", "o -> o"),
    ("self_attn.v_proj.weight", "attention.value.kernel", "o d -> d o"),
    ("self_attn.v_proj.bias", "attention.value.bias", "o -> o"),
    ("self_attn.out_proj.weight", "attention.out.kernel", "d i -> i d"),
    ("self_attn.out_proj.bias", "attention.out.bias", "d -> d"),
)

_TORCH_EXPERT = (
    ("self_attn.q_proj.weight", "attention.query.kernel", "o d -> d o"),
    ("self_attn.k_proj.weight", "attention.key.kernel", "o d -> d o"),
    ("self_attn.v_proj.weight", "attention.value.kernel", "o d -> d o"),
    ("self_attn.o_proj.weight", "attention.out.kernel", "d i -> i d"),
    ("mlp.gate_proj.weight", "mlp.gate.kernel", "f d -> d f"),
    ("mlp.up_proj.weight", "mlp.up.kernel", "f d -> d f"),
    ("mlp.down_proj.weight", "mlp.down.kernel", "d f -> f d"),
    ("input_layernorm.weight", "attention_norm.scale", "d -> d"),
    ("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
)

_PEFT_ADAPTERS = (
    ("self_attn.q_proj.lora_A.weight", "attention.query.lora.a", "(k r) d -> k d r"),
    ("self_attn.k_proj.lora_A.weight", "attention.key.lora.a", "(g r) d -> g d r"),
    ("self_attn.v_proj.lora_A.weight", "attention.value.lora.a", "(g r) d -> g d r"),
    ("self_attn.o_proj.lora_B.weight", "attention.out.lora.b", "d (k r) -> k r d"),
    ("mlp.gate_proj.lora_A.weight", "mlp.gate.lora.a", "r d -> d r"),
    ("mlp.gate_proj.lora_B.weight", "mlp.gate.lora.b", "f r -> r f"),
    ("mlp.up_proj.lora_A.weight", "mlp.up.lora.a", "r d -> d r"),
    ("mlp.up_proj.lora_B.weight", "mlp.up.lora.b", "f r -> r f"),
    ("mlp.down_proj.lora_A.weight", "mlp.down.lora.a", "r f -> f r"),
    ("mlp.down_proj.lora_B.weight", "mlp.down.lora.b", "d r -> r d"),
)

_PEFT_DIAGONAL = (
    ("self_attn.q_proj.lora_B.weight", "attention.query.lora.b", "(k h) (x r) -> k r h"),
    ("self_attn.k_proj.lora_B.weight", "attention.key.lora.b", "(g h) (x r) -> g r h"),
    ("self_attn.v_proj.lora_B.weight", "attention.value.lora.b", "(g h) (x r) -> g r h"),
)

_PEFT_COPIES = (("self_attn.o_proj.lora_A.weight", "attention.out.lora.a", "(x r) (k h) -> k h r"),)

_TORCH_ADAPTIVE_NORMS = (
    ("input_layernorm.dense.weight", "attention_norm.modulation.kernel", "m d -> d m"),
    ("input_layernorm.dense.bias", "attention_norm.modulation.bias", "m -> m"),
    ("post_attention_layernorm.dense.weight", "mlp_norm.modulation.kernel", "m d -> d m"),
    ("post_attention_layernorm.dense.bias", "mlp_norm.modulation.bias", "m -> m"),
)

_TORCH_GEMMA = (
    ("paligemma.lm_head.weight", "embedder.embedding", "v d -> v d"),
    ("paligemma.model.language_model.norm.weight", "language.final_norm.scale", "d -> d"),
    ("gemma_expert.model.norm.weight", "action.final_norm.scale", "d -> d"),
    ("gemma_expert.model.norm.dense.weight", "action.final_norm.modulation.kernel", "m d -> d m"),
    ("gemma_expert.model.norm.dense.bias", "action.final_norm.modulation.bias", "m -> m"),
)

_TORCH_HEADS = (
    ("action_in_proj.weight", "action_in_proj.kernel", "d a -> a d"),
    ("action_in_proj.bias", "action_in_proj.bias", "d -> d"),
    ("action_out_proj.weight", "action_out_proj.kernel", "a d -> d a"),
    ("action_out_proj.bias", "action_out_proj.bias", "a -> a"),
    ("time_mlp_in.weight", "time_mlp_in.kernel", "o i -> i o"),
    ("time_mlp_in.bias", "time_mlp_in.bias", "o -> o"),
    ("time_mlp_out.weight", "time_mlp_out.kernel", "o i -> i o"),
    ("time_mlp_out.bias", "time_mlp_out.bias", "o -> o"),
    ("state_proj.weight", "state_proj.kernel", "d a -> a d"),
    ("state_proj.bias", "state_proj.bias", "d -> d"),
    ("action_time_mlp_in.weight", "action_time_mlp_in.kernel", "o i -> i o"),
    ("action_time_mlp_in.bias", "action_time_mlp_in.bias", "o -> o"),
    ("action_time_mlp_out.weight", "action_time_mlp_out.kernel", "o i -> i o"),
    ("action_time_mlp_out.bias", "action_time_mlp_out.bias", "o -> o"),
)

_TORCH_PROJECTOR = (
    ("linear.weight", "head.kernel", "o d -> d o"),
    ("linear.bias", "head.bias", "o -> o"),
)

_WITH_EXPERT = "paligemma_with_expert."
_PALIGEMMA = f"{_WITH_EXPERT}paligemma.model."
_TOWER = f"{_PALIGEMMA}vision_tower.vision_model."
_LANGUAGE_LAYER = f"{_PALIGEMMA}language_model.layers.{{layer}}."
_ACTION_LAYER = f"{_WITH_EXPERT}gemma_expert.model.layers.{{layer}}."


def _adapters(theirs: str, ours: str) -> Iterator[Row]:
    yield from _under(theirs, ours, _PEFT_ADAPTERS)
    for row in _under(theirs, ours, _PEFT_DIAGONAL):
        yield BlockRow(row.theirs, row.ours, row.pattern, "diagonal")
    for row in _under(theirs, ours, _PEFT_COPIES):
        yield BlockRow(row.theirs, row.ours, row.pattern, "copies")


TORCH_ROWS = (
    *_under(_TOWER, "vision.", _TORCH_VISION),
    *_under(f"{_TOWER}encoder.layers.{{layer}}.", "vision.blocks.", _TORCH_VISION_BLOCKS),
    *_under(f"{_PALIGEMMA}multi_modal_projector.", "vision.", _TORCH_PROJECTOR),
    *_under(_LANGUAGE_LAYER, "gemma.language.layers.", _TORCH_EXPERT),
    *_under(_ACTION_LAYER, "gemma.action.layers.", _TORCH_EXPERT),
    *_under(_ACTION_LAYER, "gemma.action.layers.", _TORCH_ADAPTIVE_NORMS),
    *_adapters(_LANGUAGE_LAYER, "gemma.language.layers."),
    *_adapters(_ACTION_LAYER, "gemma.action.layers."),
    *_under(_WITH_EXPERT, "gemma.", _TORCH_GEMMA),
    *_under("", "", _TORCH_HEADS),
)

# The other name of a stored tensor: the embedding table is tied to the language model's head.
TORCH_ALIASES = {
    f"{_PALIGEMMA}language_model.embed_tokens.weight": f"{_WITH_EXPERT}paligemma.lm_head.weight"
}

# The action expert's head for text: openpi's model has it, and never trains or uses it.
TORCH_UNUSED = (f"{_WITH_EXPERT}gemma_expert.lm_head.weight",)
