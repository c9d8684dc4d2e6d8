"""Steps in which nobody asks for more than a temperature: programs without a branch, where branches wait for the host.

Both variants run on the CPU here; what they are for a GPU is seen in what JAX lowers for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.architecture import Architecture
from ds_jax.config import CacheConfig, Config, DecodeConfig, MixedConfig, ModelConfig, PrefillConfig
from ds_jax.protocol import Decode, Prefill
from ds_jax.runtime import mixed, platform, programs, sampling
from ds_jax.runtime.programs import Model, Program
from ds_jax.runtime.sequence import Sequence
from ds_jax.runtime.shapes import Shapes
from ds_jax.sampling import SamplingParams
from kernels.mosaic import HOPPER
from models.sharding import STAGE, TENSOR
from models.transformer import abstract_params
from tests.runtime.harness import GREEDY, Bench, bench, write_config

SHAPES = Shapes(pages=100, page_size=16, max_model_len=64, slots=4, rows=3, token_buckets=(16,), mixes=True)
PROGRAMS: dict[str, tuple[Program, int]] = {
    "decode": (programs.decode, 1),
    "prefill": (programs.prefill, 16),
    "mixed": (mixed.mixed, 16),
}
HOT = SamplingParams(temperature=0.9)
PENALISED = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.5, logprobs=1)


def lowered(name: str, tp: int, plain: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program of two layers for Hopper, as JAX hands it to XLA."""

    def lower(function: Program, arguments: tuple[Any, ...], *, donate: tuple[int, ...], **_: Any) -> str:
        traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    monkeypatch.setattr(programs, "compile_ahead", lower)
    arch = Architecture("llama", 61, 128, 2, 2, 2, 64, 24, 64)
    mesh: Any = jax.sharding.AbstractMesh((1, tp), (STAGE, TENSOR), abstract_device=HOPPER)
    model = Model(arch, jnp.bfloat16, mesh, *abstract_params(arch, tp, jnp.bfloat16, mesh))
    program, size = PROGRAMS[name]
    text = program(model, SHAPES, size, plain)
    assert "mosaic_gpu" in text
    return text


def branches(text: str) -> int:
    return sum(text.count(f"stablehlo.{operation}") for operation in ("case", "if", "while"))


@pytest.mark.parametrize(("name", "tp"), [("decode", 1), ("decode", 2), ("prefill", 1), ("prefill", 2), ("mixed", 2)])
def test_a_plain_program_for_a_gpu_has_no_branch_and_writes_its_pool_in_place(
    name: str, tp: int, monkeypatch: pytest.MonkeyPatch
):
    text = lowered(name, tp, True, monkeypatch)
    assert branches(text) == 0
    arguments = text[text.index("@main(") :].split(" -> ")[0]
    donated = arguments.count("tf.aliasing_output") + arguments.count("jax.buffer_donor")
    assert donated == 2 * 2 + (0 if name == "prefill" else 2)  # keys and values of two layers; state and marks


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_the_other_program_branches(name: str, monkeypatch: pytest.MonkeyPatch):
    assert branches(lowered(name, 1, False, monkeypatch)) >= 4


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, True),
        ({"top_k": 37, "seed": 4, "n": 3, "stop": ("x",), "ignore_eos": True}, True),
        ({"top_p": 0.9}, False),
        ({"top_k": 36}, False),
        ({"min_p": 0.1}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "min_tokens": 1}, False),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, False),
        ({"presence_penalty": 0.1}, False),
    ],
)
def test_what_is_plain(params: dict[str, Any], plain: bool):
    assert sampling.is_plain(SamplingParams(**params), vocab=37) == plain


def test_plain_tokens_are_those_of_the_whole_rule():
    rows = [
        Sequence(0, [0], SamplingParams(temperature=t), seed, t > 1) for t in (0, 0.5, 1, 1.7) for seed in (1, 2**40)
    ]
    words = np.asarray([sampling.pack(row) for row in rows], np.int32)
    logits = np.random.default_rng(0).normal(size=(9, len(rows), 1009)).astype(np.float32)
    both = jax.jit(
        lambda x, by, at: (
            sampling.sample(x, sampling.unpack(by), at),
            sampling.sample_plainly(x, sampling.unpack(by), at),
        )
    )
    for step in range(9):
        whole, plain = both(logits[step], words, np.arange(len(rows), dtype=np.int32) * 7 + step)
        assert np.array_equal(whole, plain)


# --- an instance with both --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("tiny"))


def config_for(folder: str) -> Config:
    return Config(
        model=ModelConfig(path=folder, load_format="dummy"),
        policy="by:hand",
        prefill=PrefillConfig(instances=0),
        decode=DecodeConfig(instances=0),
        mixed=MixedConfig(instances=1, max_step_tokens=32, max_step_sequences=2, slots=2),
        cache=CacheConfig(page_size=8, num_pages=64),
    )


@pytest.fixture(scope="module")
def one(folder: str) -> Iterator[Bench]:
    """With the programs that branch, as on any CPU."""
    with bench(config_for(folder)) as b:
        yield b


@pytest.fixture(scope="module")
def two(folder: str) -> Iterator[Bench]:
    """With both variants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "waits_at_branches", lambda device: True)
        with bench(config_for(folder)) as b:
            yield b
            assert b.executor.compilations.count == 0, "something compiled while serving"


def served(b: Bench, first: SamplingParams, second: SamplingParams) -> tuple[list[Any], list[str]]:
    """Two sequences: one decodes alone, beside the other's prompt, then beside the other. Tokens and scores, and the
    variant of each step."""
    instance, ran = b.executor._instances[0], []
    known = instance._programs

    class Seen(dict):
        def __getitem__(self, key: Any) -> Program:
            if key[0] in PROGRAMS:
                ran.append(f"{'plain ' if key[-1] else ''}{key[0]}")
            return known[key]

    instance._programs = Seen()
    one, other = b.add([5, 6, 7], first, seed=3), b.add([9] * 11, second, seed=4)
    pages = [b.pages(0, 2) for _ in range(2)]
    prompts = [Prefill(one.id, 0, 3, True, pages[0]), Prefill(other.id, 0, 6, False, pages[1])]
    steps = [
        ((prompts[0],), ()),
        ((), (Decode(one.id, 1),)),
        ((prompts[1],), (Decode(one.id, 1),)),
        ((Prefill(other.id, 6, 5, True),), (Decode(one.id, 1),)),
        *[((), (Decode(one.id, 1), Decode(other.id, 0)))] * 3,
        ((), (Decode(one.id, 1),)),
    ]
    scores = []
    try:
        for step in steps:
            b.finish(id := b.run(0, *step))
            scores.append({b.sequences[s].prompt[0]: score.top[0][0] for s, score in b.scores[id].tokens.items()})
    finally:
        instance._programs = known
    return [one.output, other.output, scores], ran


@pytest.mark.parametrize("second", [HOT, PENALISED, SamplingParams(temperature=0, prompt_logprobs=0)])
@pytest.mark.parametrize("first", [GREEDY, HOT])
def test_both_variants_give_the_same_tokens(one: Bench, two: Bench, first: SamplingParams, second: SamplingParams):
    tokens, ran = served(one, first, second)
    assert not any(name.startswith("plain") for name in ran)
    tokens_of_both, ran = served(two, first, second)
    assert tokens_of_both == tokens
    expected = ["prefill", "decode", "mixed", "mixed", "decode", "decode", "decode", "decode"]
    branching = {HOT: (), PENALISED: (3, 4, 5, 6)}.get(second, (2, 3))
    assert ran == [name if step in branching else f"plain {name}" for step, name in enumerate(expected)]
