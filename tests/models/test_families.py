"""config.json in, architecture out; and what follows from an architecture."""

from __future__ import annotations

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ds_jax.architecture import LayerKind, LinearScaling, Llama3Scaling
from models import rope
from models.families import FAMILIES, architecture_of, weight_names
from models.folder import CHECKOUT
from models.layout import parameters
from models.transformer import Transformer, params_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 1000,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 256,
}
GEMMA = {**LLAMA, "architectures": None, "head_dim": 10, "sliding_window": 32, "num_hidden_layers": 8}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "ffn_dim": 96,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
}


def of(model_type: str, config: dict = LLAMA, **fields: object) -> dict:
    return {**config, "architectures": None, "model_type": model_type, **fields}


def windows(config: dict) -> list[int | None]:
    arch = architecture_of(config)
    return [arch.kind(layer).window for layer in range(arch.num_layers)]


def test_a_window_is_there_where_the_family_and_its_config_say():
    assert windows(of("llama", sliding_window=8)) == [None] * 3
    assert windows(of("mistral", sliding_window=8)) == [8] * 3
    assert windows(of("mistral", sliding_window=None)) == [None] * 3
    assert windows(of("mistral")) == [4096] * 3
    assert windows(of("mixtral")) == [None] * 3
    assert windows(of("qwen2", sliding_window=8)) == [None] * 3
    assert windows(of("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=2)) == [None, None, 8]
    assert windows(of("gemma2", GEMMA)) == [32, None] * 4
    assert windows(of("gemma3_text", GEMMA)) == [32, 32, 32, 32, 32, None, 32, 32]
    assert windows(of("gemma2", GEMMA, layer_types=["full_attention"] * 7 + ["sliding_attention"]))[6:] == [None, 32]


def test_gemma_3_turns_heads_in_its_two_kinds_of_layers_differently_in_old_and_new_files():
    old = of("gemma3_text", GEMMA, rope_theta=5e5, rope_local_base_freq=2e4)
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    new = of("gemma3_text", GEMMA, rope_parameters={"full_attention": full, "sliding_attention": {"rope_theta": 2e4}})
    for config in (old, new):
        arch = architecture_of(config)
        assert arch.kind(0) == LayerKind(32, 2e4)
        assert arch.kind(5) == LayerKind(None, 5e5, LinearScaling(8.0))
    assert architecture_of(of("gemma3_text", GEMMA)).kind(5).rope_theta == 1e6


def test_fields_of_a_llama_config_are_read_with_the_defaults_of_transformers():
    arch = architecture_of(LLAMA)
    assert (arch.num_kv_heads, arch.head_dim, arch.kind(0).rope_theta, arch.tie_embeddings) == (2, 8, 10000.0, False)
    assert (arch.norm, arch.gated_mlp, arch.positions, arch.kind(0).rope_scaling) == ("rms", True, "rope", None)
    assert architecture_of({**LLAMA, "num_key_value_heads": None, "head_dim": 16}).num_kv_heads == 8


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_read_from_old_and_new_files(where: str):
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert architecture_of({**LLAMA, where: llama3}).kind(0).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert architecture_of({**LLAMA, where: {"type": "linear", "factor": 2}}).kind(2).rope_scaling == LinearScaling(2.0)
    for kind in ("dynamic", "yarn"):
        with pytest.raises(ValueError, match=f"rope_scaling.rope_type = '{kind}' is not supported; known are default"):
            architecture_of({**LLAMA, where: {"rope_type": kind, "factor": 2.0}})


def test_opt_has_two_rows_before_position_0_and_ties_its_embeddings_unless_told_otherwise():
    arch = architecture_of(OPT)
    assert (arch.positions, arch.position_offset, arch.tie_embeddings) == ("learned", 2, True)
    assert (arch.norms, arch.final_norm) == ("before", True)
    small = architecture_of({**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32})
    assert (small.norms, small.final_norm, small.token_width) == ("after", False, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM, which is not supported; known are Gemma2ForCausalLM",
        ),
        ({"model_type": "t5"}, "t5, which is not supported; known are .*, LlamaForCausalLM .llama., Mistral"),
        ({}, "None, which is not supported"),
        ({**LLAMA, "hidden_size": None}, "hidden_size = None must be a whole number of at least 1"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size = 0 must be"),
        ({**LLAMA, "rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny' must be a number greater than 0"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act = 'mish' is not supported; known are silu"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_heads = 8 must be divisible by num_kv_heads = 3"),
        ({**LLAMA, "head_dim": 7}, "head_dim = 7 must be even"),
        (of("llama", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5 is not supported"),
        (of("qwen3_moe", mlp_only_layers=[0]), r"mlp_only_layers = \[0\] is not supported; it must be \[\]"),
        (of("mixtral", num_experts_per_tok=9), "experts.per_token = 9 must be from 1 to experts.count = 8"),
        (of("gemma2", GEMMA, layer_types=["full_attention"]), "layer_types has 1 entries for num_hidden_layers = 8"),
        (
            of("qwen2", layer_types=["linear_attention"] * 3),
            "layer_types has 'linear_attention', which is not supported",
        ),
        (of("gemma3_text", GEMMA, use_bidirectional_attention=True), "use_bidirectional_attention = True is not"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ({**OPT, "enable_bias": False}, "enable_bias = false is not supported"),
        ({**OPT, "hidden_size": 60}, "hidden_size = 60 must be divisible by num_attention_heads = 8"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(config: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        architecture_of(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10},
        OPT,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
        GPT2,
        of("qwen2"),
        of("qwen3", head_dim=10),
        of("qwen3_moe", moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2),
        of("mixtral", num_local_experts=4),
        of("gemma2", GEMMA),
        of("gemma3_text", GEMMA),
    ],
)
def test_the_formula_counts_the_parameters_that_there_are_and_each_has_a_name(config: dict):
    arch = architecture_of(config)
    leaves = jax.tree.leaves(params_of(nnx.eval_shape(lambda: Transformer(arch, rngs=nnx.Rngs(0)))))
    assert arch.parameters() == sum(math.prod(leaf.shape) for leaf in leaves)
    found = parameters(arch, 1)
    assert {parameter.path for parameter in found} == set(weight_names(arch))
    assert arch.parameters() == sum(math.prod(s) for parameter in found for s in parameter.tensor_shapes())


def test_kv_bytes_count_real_heads_only():
    # 2 (K and V) x 3 layers x 2 heads x 8 numbers
    assert architecture_of(LLAMA).kv_bytes_per_token("float32") == 4 * 96
    assert architecture_of(LLAMA).kv_bytes_per_token("bfloat16") == 2 * 96


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, "tp = 3 does not divide the model's 8 attention heads"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8},
            4,
            "tp = 4 must divide, or be a multiple",
        ),
        ({"intermediate_size": 98}, 4, "tp = 4 does not divide the model's MLP width 98"),
        (of("mixtral", num_local_experts=6), 4, "tp = 4 does not divide the model's 6 experts"),
    ],
)
def test_a_tp_that_does_not_fit_is_refused_before_anything_is_made(changes: dict, tp: int, message: str):
    arch = architecture_of({**LLAMA, **changes})
    with pytest.raises(ValueError, match=message):
        parameters(arch, tp)


def test_llama3_scaling_keeps_fast_turns_slows_slow_ones_and_ramps_between():
    plain = LayerKind(rope_theta=500000.0)
    scaled = LayerKind(rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    before, after = rope.inverse_frequencies(plain, 64), rope.inverse_frequencies(scaled, 64)
    turns = 8192 * before / (2 * math.pi)  # In the original context
    np.testing.assert_array_equal(after[turns > 4], before[turns > 4])
    np.testing.assert_allclose(after[turns < 1], before[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any() and np.all((after < before)[between] & (after > before / 8)[between])


def test_rotation_keeps_dot_products_that_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 16))

    def score(at: int, of: int) -> jax.Array:
        turned = [
            rope.rotate(x, *rope.angles(LayerKind(), 16, jnp.array([position]))) for x, position in ((q, at), (k, of))
        ]
        return jnp.vdot(*turned)

    np.testing.assert_allclose(score(5, 2), score(43, 40), rtol=1e-4)
    np.testing.assert_allclose(score(0, 0), jnp.vdot(q, k), rtol=1e-5)
    assert abs(score(5, 2) - score(2, 5)) > 1e-3


def test_the_worked_example_of_the_docs_reads_fused_tensors(monkeypatch: pytest.MonkeyPatch):
    code = (CHECKOUT / "docs/families.md").read_text().partition("```python\n")[2].partition("```")[0]
    phi3 = types.ModuleType("phi3")
    exec(code, phi3.__dict__)
    monkeypatch.setitem(FAMILIES, "phi3", phi3)
    arch = architecture_of(of("phi3", sliding_window=7))
    found = {parameter.path[2:]: parameter for parameter in parameters(arch, 1) if parameter.path[:2] == ("layers", 0)}
    for path, name, shape in (
        (("attention", "qkv"), "self_attn.qkv_proj", (8 * (8 + 2 * 2), 64)),
        (("mlp", "up"), "mlp.gate_up_proj", (2 * 96, 64)),
    ):
        parameter = found[path]
        assert parameter.names == (f"model.layers.0.{name}.weight",) and parameter.tensor_shapes() == [shape]
        tensor = np.arange(math.prod(shape)).reshape(shape)
        whole = parameter.join((slice(None),) * len(parameter.shape), lambda _, index, tensor=tensor: tensor[index])
        assert whole.shape == parameter.shape
        np.testing.assert_array_equal(parameter.split(whole), [tensor])
