"""Parameters, weights and KV of published models, and of what this project's devices hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ds_jax.architecture import Architecture, Experts
from ds_jax.config import CacheConfig, Config, DecodeConfig, ModelConfig, PrefillConfig
from ds_jax.flags import read_config
from ds_jax.runtime.pool import page_bytes
from experiments.describe import describe
from models.folder import CHECKOUT, read_configs
from models.sharding import make_mesh
from models.transformer import abstract_params

CONFIGS = sorted(path.stem for path in (CHECKOUT / "configs").glob("*.py") if not path.name.startswith("plan_"))

# Parameter counts as their makers, or the files that they published, state them.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-13b": 12_853_473_280,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
}


def published(name: str, **changes: object) -> Config:
    return Config(model=ModelConfig(path=f"models/published/{name}", load_format="dummy"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name: str):
    assert describe(published(name))["parameters"] == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_opt_66b_and_175b_are_as_large_as_their_names():
    assert describe(published("opt-66b"))["parameters"] == pytest.approx(65.7e9, rel=1e-3)
    assert describe(published("opt-175b"))["parameters"] == pytest.approx(174.6e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("opt-13b", 2 * 40 * 5120 * 2),  # K and V, layers, all heads together, two bytes each
        ("opt-350m", 2 * 24 * 1024 * 2),  # not of the narrower embeddings
        ("gpt2", 2 * 12 * 768 * 4),
        ("llama-3-8b", 2 * 32 * 8 * 128 * 2),
        ("qwen3-0.6b", 2 * 28 * 8 * 128 * 2),  # heads wider than hidden_size / heads
        ("gemma-3-1b", 2 * 26 * 1 * 256 * 2),
    ],
)
def test_kv_bytes_per_token_follow_the_closed_formula(name: str, nbytes: int):
    assert describe(published(name))["kv_bytes_per_token"] == nbytes


def test_devices_that_share_a_layer_share_its_bytes_until_kv_heads_run_out():
    config = published("llama-3-8b", prefill=PrefillConfig(tp=8), decode=DecodeConfig(tp=16, instances=2))
    found = describe(config, device_memory_gib=10.0)
    assert found["devices"] == 8 + 2 * 16
    prefill, decode = found["groups"]
    one_head = 2 * 32 * 128 * 2
    assert prefill["kv_bytes_per_token_per_device"] == decode["kv_bytes_per_token_per_device"] == one_head
    tokens = (int(10.0 * 2**30 * 0.9) - prefill["weight_bytes_per_device"]) // one_head // 16 * 16
    assert prefill["tokens_that_fit"] == tokens < decode["tokens_that_fit"]


def test_a_model_that_does_not_fit_has_room_for_no_token():
    assert describe(published("opt-175b"), 80.0)["groups"][0]["tokens_that_fit"] == 0


def test_the_type_asked_for_counts_before_the_checkpoints_own():
    config = published("llama-3-8b")
    wide = replace(config, model=replace(config.model, dtype="float32"))
    assert (describe(config)["dtype"], describe(wide)["dtype"]) == ("bfloat16", "float32")
    assert describe(wide)["weight_bytes"] == 2 * describe(config)["weight_bytes"]


def test_a_tp_that_does_not_fit_the_model_is_refused_with_its_field():
    with pytest.raises(ValueError, match=r"^decode.tp = 3 does not divide the model's 32 attention heads$"):
        describe(published("llama-3-8b", decode=DecodeConfig(tp=3)))


SMALL = {
    "opt": Architecture(
        "opt", 263, 48, 2, 8, 8, 6, 80, 128, norm="layer", gated_mlp=False, positions="learned", position_offset=2,
        embedding_size=24, attention_bias=True, attention_output_bias=True, mlp_bias=True, tie_embeddings=True,
    ),
    "llama": Architecture("llama", 263, 48, 3, 8, 2, 6, 80, 128, attention_bias=True, mlp_bias=True),
    "gemma2": Architecture("gemma2", 263, 48, 2, 4, 1, 16, 80, 128, norms="around", query_key_norm=True),
    "mixtral": Architecture("mixtral", 263, 48, 2, 8, 2, 6, 80, 128, experts=Experts(8, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_device_holds_what_is_described(name: str):
    arch = SMALL[name]
    for tp in (1, 4):
        _, params = abstract_params(arch, tp, jnp.bfloat16, make_mesh(jax.devices()[:tp], tp))
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
        assert arch.parameters_per_device(tp) == held
        assert arch.kv_bytes_per_token_per_device("bfloat16", tp) * 16 == page_bytes(arch, "bfloat16", tp, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_fits_gpus_of_80_gb(name: str):
    config = read_config(f"configs/{name}.py", Config)
    described = describe(config, device_memory_gib=80e9 / 2**30)
    assert read_configs(config.model.path).eos_token_ids
    assert all(group["tokens_that_fit"] >= 8192 for group in described["groups"])


def test_the_launcher_needs_no_jax_and_writes_what_it_prints(tmp_path: Path):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax', 'safetensors']))\n"
    script = blocked + "import runpy; runpy.run_module('experiments.describe', run_name='__main__')"
    arguments = ["--config=configs/opt_13b.py", "--device_memory_gib=80", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12,853,473,280" in done.stdout and "800 KiB" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == describe(read_config("configs/opt_13b.py", Config), 80.0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["path"] == "models/published/opt-13b"


def test_pages_asked_for_are_shown_as_tokens():
    config = published("gpt2", cache=CacheConfig(num_pages=100, page_size=8))
    assert [group["tokens_asked_for"] for group in describe(config)["groups"]] == [800, 800]
