"""Reading checkpoint folders: what is refused, what is read, and by which device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ds_jax.architecture import Architecture
from models.checkpoint import (
    CHECKOUT,
    bytes_to_read,
    dummy_params,
    find_folder,
    load_params,
    open_checkpoint,
    tensors_of,
)
from models.sharding import make_mesh
from models.tensor_files import StoredTensor
from models.transformer import abstract_params
from tests.goldens import CASES

GOLDENS = {golden.name: golden.folder for golden in CASES}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of a checkpoint in two files."""
    return Path(shutil.copytree(GOLDENS["llama_gqa"], tmp_path / "sharded"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return Path(shutil.copytree(GOLDENS["opt"], tmp_path / "single"))


@pytest.fixture(autouse=True)
def nothing_is_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of bad checkpoints fail where weights are opened for reading."""
    if "refused" in request.node.name:
        monkeypatch.setattr(StoredTensor, "view", None)


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_an_unknown_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="model.path = 'no/such/model': there is no such folder"):
        open_checkpoint("no/such/model")


def test_a_folder_without_config_is_refused(single: Path):
    (single / "config.json").unlink()
    refused(single, FileNotFoundError, "has no config.json")


def test_a_config_that_is_not_json_is_refused(single: Path):
    (single / "config.json").write_text('{"vocab_size": ')
    refused(single, ValueError, "config.json is not valid JSON")
    (single / "config.json").write_text("[]")
    refused(single, ValueError, "must hold a JSON object")


def test_a_folder_without_weights_is_refused(single: Path):
    (single / "model.safetensors").unlink()
    refused(single, FileNotFoundError, "has no weights", "model.safetensors.index.json")


def test_a_missing_shard_is_refused(sharded: Path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, FileNotFoundError, "has no model-00002-of-00002.safetensors")


def test_an_index_that_leads_out_of_the_folder_or_nowhere_is_refused(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    change(index, weight_map={"lm_head.weight": "../model.safetensors"})
    refused(sharded, ValueError, "'../model.safetensors'", "not a file of its folder")
    change(index, weight_map={})
    refused(sharded, ValueError, "has no weight_map")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(single: Path, keep: int):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(single, ValueError, "model.safetensors", "truncated")


def test_a_file_that_is_longer_than_its_header_says_is_refused(single: Path):
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(single, ValueError, "longer than its header says")


def test_a_broken_header_is_refused(single: Path):
    file = single / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8] = ord("?")
    file.write_bytes(content)
    refused(single, ValueError, "broken safetensors header")


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(single: Path):
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[48,48]', b'"shape":[48,47]', 1))
    refused(single, ValueError, "of shape [48, 47] has 9216 bytes, not 9024")


def test_a_missing_tensor_is_refused(single: Path):
    file = single / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.decoder.layers.1.fc2.bias"]
    save_file(tensors, file)
    refused(single, ValueError, "tensor model.decoder.layers.1.fc2.bias is missing")


def test_tensors_too_many_are_refused(single: Path):
    file = single / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.decoder.layers.2.fc1.bias": np.zeros(4, np.float32)}, file)
    refused(single, ValueError, "tensor model.decoder.layers.2.fc1.bias has no place in the model")
    save_file(tensors | {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}, file)
    refused(single, ValueError, "(and 1 more)")


def test_constants_and_tied_output_weights_in_a_file_are_passed_over(single: Path):
    file = single / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    save_file(tensors | extra | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"].copy()}, file)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_checkpoint(single), make_mesh(jax.devices()[:1], 1), jnp.float32),
        _loaded("opt", 1),
    )


def test_a_tensor_in_two_files_is_refused(sharded: Path):
    one, two = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(two) | {name: tensor}, two)
    refused(sharded, ValueError, f"tensor {name} is in {one.name} and in {two.name}")


def test_a_tensor_of_the_wrong_shape_is_refused(sharded: Path):
    change(sharded / "config.json", intermediate_size=76)
    refused(sharded, ValueError, "mlp.down_proj.weight has shape [48, 80], but config.json asks for [48, 76]")


def test_a_tensor_of_an_unsupported_type_is_refused(single: Path):
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors["model.decoder.layers.0.fc1.bias"] = tensors["model.decoder.layers.0.fc1.bias"].astype(np.int8)
    save_file(tensors, file)
    refused(single, ValueError, "fc1.bias has type I8; supported are F32, BF16, F16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertModel"]}, ("BertModel", "known are Gemma2ForCausalLM (gemma2), ")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantised (gptq)",)),
        ({"dtype": "float8_e4m3fn"}, ("dtype = 'float8_e4m3fn'", "float32, bfloat16, float16")),
        ({"eos_token_id": ["x"]}, ("eos_token_id = ['x']",)),
    ],
)
def test_an_unsupported_config_is_refused(single: Path, changes: dict, words: tuple[str, ...]):
    (single / "generation_config.json").unlink()
    change(single / "config.json", **changes)
    refused(single, ValueError, *words)


def test_end_tokens_come_from_the_generation_config_else_from_the_config(single: Path):
    assert open_checkpoint(single).eos_token_ids == (1,)
    change(single / "generation_config.json", eos_token_id=[7, 9])
    assert open_checkpoint(single).eos_token_ids == (7, 9)
    (single / "generation_config.json").unlink()
    change(single / "config.json", eos_token_id=5)
    assert open_checkpoint(single).eos_token_ids == (5,)


def test_sampling_defaults_are_those_in_use(single: Path):
    file = single / "generation_config.json"
    assert open_checkpoint(single).sampling_defaults == {}
    change(file, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, max_length=4096)
    assert open_checkpoint(single).sampling_defaults == {"repetition_penalty": 1.05}  # the rest asks for do_sample
    change(file, do_sample=True)
    assert open_checkpoint(single).sampling_defaults == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }


@pytest.mark.parametrize("changes", [{"temperature": "0.6"}, {"top_k": 2.5}, {"top_p": True}, {"temperature": -1}])
def test_a_sampling_default_of_the_wrong_kind_is_refused(single: Path, changes: dict):
    (name, value), *_ = changes.items()
    change(single / "generation_config.json", do_sample=True, **changes)
    refused(single, ValueError, f"generation_config.json: {name} = {value!r} must be a")


def test_a_relative_path_is_looked_for_here_and_then_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("tests/goldens/opt") == CHECKOUT / "tests/goldens/opt"
    (tmp_path / "tests/goldens/opt").mkdir(parents=True)
    assert find_folder("tests/goldens/opt").resolve() == tmp_path.resolve() / "tests/goldens/opt"


def test_names_without_the_model_prefix_are_understood(single: Path):
    file = single / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    tree = load_params(open_checkpoint(single), make_mesh(jax.devices()[:1], 1), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, tree, _loaded("opt", 1))


def _loaded(name: str, tp: int, dtype: object = jnp.float32):
    return load_params(open_checkpoint(GOLDENS[name]), make_mesh(jax.devices()[:tp], tp), dtype)


@pytest.mark.parametrize("name", GOLDENS)
def test_parameters_taken_apart_are_the_tensors_of_the_files(name: str):
    checkpoint = open_checkpoint(GOLDENS[name])
    expected = {}
    for file in checkpoint.folder.glob("*.safetensors"):
        expected |= load_file(file)
    found = tensors_of(checkpoint.arch, _loaded(name, 1))
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loaded_parameters_are_what_programs_are_compiled_for(tp: int):
    mesh = make_mesh(jax.devices()[:tp], tp)
    arch = open_checkpoint(GOLDENS["llama_gqa"]).arch
    _, abstract = abstract_params(arch, tp, jnp.bfloat16, mesh)
    for params in (_loaded("llama_gqa", tp, jnp.bfloat16), dummy_params(arch, mesh, jnp.bfloat16)):
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params)
        assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)


def test_kv_heads_are_repeated_next_to_each_other_when_tp_exceeds_them():
    whole, wide = (np.asarray(_loaded("llama_gqa", tp)["layers"][1]["attention"]["qkv"]) for tp in (1, 4))
    assert whole.shape == (2, 4, 12, 48) and wide.shape == (4, 3, 12, 48)  # 2 queries each, then 1 each
    np.testing.assert_array_equal(wide[:, 0], whole[:, :2].reshape(4, 12, 48))
    np.testing.assert_array_equal(wide[:, 1:], np.repeat(whole[:, 2:], 2, axis=0))


def test_each_device_reads_no_more_than_its_own_slice_and_progress_hears_of_every_byte():
    for name, tp in (("opt", 4), ("llama_gqa", 2), ("llama3_mqa", 4)):
        checkpoint, mesh = open_checkpoint(GOLDENS[name]), make_mesh(jax.devices()[:tp], tp)
        read: list[int] = []
        params = load_params(checkpoint, mesh, jnp.bfloat16, read.append)
        # What every device holds, counted once: half as wide as the float32 of the files, and padded to tp rows.
        held = {
            (path, shard.index): shard.data.nbytes * 2
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            for shard in leaf.addressable_shards
        }
        assert 0 < sum(read) == bytes_to_read(checkpoint, mesh) <= sum(held.values())


def test_loaded_numbers_are_no_longer_those_of_the_file(single: Path):
    params = load_params(open_checkpoint(single), make_mesh(jax.devices()[:1], 1), jnp.float32)
    file = single / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))
    jax.tree.map(np.testing.assert_array_equal, params, _loaded("opt", 1))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_files_are_read_and_cast(single: Path, stored: str):
    file = single / "model.safetensors"
    save_file({name: tensor.astype(jnp.dtype(stored)) for name, tensor in load_file(file).items()}, file)
    change(single / "config.json", dtype=stored)
    checkpoint = open_checkpoint(single)
    assert checkpoint.dtype == stored
    params = load_params(checkpoint, make_mesh(jax.devices()[:2], 2), jnp.float32)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(np.float32), _loaded("opt", 2))
    jax.tree.map(np.testing.assert_array_equal, params, rounded)


def test_dummy_weights_need_only_a_config(tmp_path: Path):
    shutil.copy(GOLDENS["opt"] / "config.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    assert checkpoint.arch.family == "opt" and not checkpoint.tensors
    with pytest.raises(ValueError, match="load_format = 'gguf' must be safetensors or dummy"):
        open_checkpoint(tmp_path, load_format="gguf")


def test_dummy_weights_are_one_model_at_any_tp():
    arch = Architecture("llama", 263, 48, 2, 8, 2, 6, 80, 128)

    def at(tp: int, seed: int = 0):
        return dummy_params(arch, make_mesh(jax.devices()[:tp], tp), jnp.float32, seed)

    one, four = at(1), at(4)
    np.testing.assert_array_equal(one["embedding"], four["embedding"][:263])
    for layer in (0, 1):
        np.testing.assert_array_equal(one["layers"][layer]["mlp"]["up"], four["layers"][layer]["mlp"]["up"])
        whole, wide = (np.asarray(tree["layers"][layer]["attention"]["qkv"]) for tree in (one, four))
        np.testing.assert_array_equal(wide[:, :2].reshape(48, 48), whole[:, :4].reshape(48, 48))
        np.testing.assert_array_equal(wide[:, 2:], np.repeat(whole[:, 4:], 2, axis=0))
    assert np.any(np.asarray(at(1, seed=1)["embedding"]) != one["embedding"])
    assert np.any(np.asarray(one["layers"][0]["mlp"]["up"]) != one["layers"][1]["mlp"]["up"])
