"""What the host packs, what the programs make of it, and what they compile to."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.architecture import Architecture
from ds_jax.runtime import handover, host_memory, mixed, platform, programs, sampling
from ds_jax.runtime.compilation import compile_ahead
from ds_jax.runtime.handover import Cut
from ds_jax.runtime.programs import Chunk, DecodeState, Edits, Model, Prefill
from ds_jax.runtime.sequence import Sequence
from ds_jax.runtime.shapes import Shapes
from ds_jax.sampling import SamplingParams, TokenLogprobs
from kernels.projection import project
from models.sharding import make_mesh
from models.transformer import abstract_params

SHAPES = Shapes(pages=1000, page_size=4, max_model_len=32, slots=4, rows=3, token_buckets=(8, 16))


def model(tp: int = 1) -> Model:
    arch = Architecture("llama", 61, 16, 2, 4, 4, 4, 24, 64)
    mesh = make_mesh(jax.devices()[:tp], tp)
    return Model(arch, jnp.float32, mesh, *abstract_params(arch, tp, jnp.float32, mesh))


def sequence(tokens: int, output: int = 0) -> Sequence:
    made = Sequence(tokens, list(range(100, 100 + tokens)), SamplingParams(temperature=0.5, top_k=3), seed=2**40 + 1)
    made.output.extend(range(200, 200 + output))
    return made


def pool_sized(hlo: str, elements: int) -> set[str]:
    """Operations other than updates in place that make an array of at least so many elements."""
    made = re.findall(r"^\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", hlo, re.MULTILINE)
    harmless = {"parameter", "get-tuple-element", "tuple", "bitcast", "scatter", "dynamic-update-slice"}
    return {
        f"{operation} {name}"
        for name, shape, operation in made
        if np.prod([int(size) for size in shape.split(",")]) >= elements
        and operation not in harmless
        and not (operation == "fusion" and "scatter" in name)
    }


@pytest.mark.parametrize(
    "name, tp",
    [
        *itertools.product(["decode", "prefill", "insert", "gather"], [1, 2]),
        ("mixed", 2),
        ("write", 2),
        ("read", 2),
        ("duplicate", 2),
    ],
)
def test_no_program_copies_the_pool(name: str, tp: int):
    this = model(tp)
    program = {
        "decode": lambda: programs.decode(this, SHAPES, SHAPES.slots),
        "prefill": lambda: programs.prefill(this, SHAPES, 16),
        "mixed": lambda: mixed.mixed(this, SHAPES, 16),
        "duplicate": lambda: handover.duplicate(this, SHAPES, 4),
        "write": lambda: host_memory.write_pages(this, SHAPES, 4),
        "read": lambda: host_memory.read_pages(this, SHAPES, 4),
        "insert": lambda: handover.insert(this, SHAPES, Cut(4, 1, tp), 4),
        "gather": lambda: handover.gather(this, SHAPES, Cut(4, tp, 1), 4),
    }[name]()
    layer = SHAPES.pages * SHAPES.page_size * 4 * 4 // tp
    assert not pool_sized(program.as_text(), layer)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < layer * 4
    if name not in ("gather", "read"):
        assert memory.alias_size_in_bytes >= 2 * this.arch.num_layers * layer * 4, "the pool is not updated in place"


def test_a_copy_of_the_pool_would_be_seen():
    pool = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    copies = jax.jit(lambda pool: (pool.at[0].set(1), pool)).lower(pool).compile().as_text()
    assert pool_sized(copies, 64000)


def test_a_prefill_step_is_packed_back_to_back():
    chunks = [
        Chunk(sequence(5), 0, 5, True, [7, 3]),
        Chunk(sequence(6, output=4), 6, 3, False, [1, 9, 4]),
    ]
    bucket, packed = programs.pack_prefill(SHAPES, chunks)
    assert (bucket, packed.dtype, len(packed)) == (8, np.int32, Prefill.words(SHAPES, 8))
    step = Prefill.of(packed, SHAPES, bucket)
    assert step.tokens.tolist() == [100, 101, 102, 103, 104, 200, 201, 202]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert step.slots.tolist() == [28, 29, 30, 31, 12, 9 * 4 + 2, 9 * 4 + 3, 16]
    assert step.starts.tolist() == [0, 5, 0]
    assert step.lengths.tolist() == [5, 3, 0]
    assert step.contexts.tolist() == [0, 6, 0]
    assert step.samples.tolist() == [1, 0, 0]
    assert step.following.tolist() == [-1] * 8
    assert step.page_table[:, :4].tolist() == [[7, 3, 0, 0], [1, 9, 4, 0], [0, 0, 0, 0]]


def test_the_prompt_tokens_to_be_scored_are_those_that_are_not_known_yet():
    whole, replayed = sequence(6), sequence(6, output=1)
    for one in (whole, replayed):
        one.sampling = SamplingParams(prompt_logprobs=0)
    whole.prompt_logprobs = [TokenLogprobs(-1.0)] * 2
    bucket, packed = programs.pack_prefill(
        SHAPES, [Chunk(replayed, 0, 7, True, [0, 1]), Chunk(whole, 0, 4, False, [2]), Chunk(whole, 4, 2, True, [2, 3])]
    )
    following = Prefill.of(packed, SHAPES, bucket).following
    assert following.tolist() == [-1] * 7 + [-1, -1, 103, 104, 105, -1] + [-1] * 3


def test_padding_of_a_prefill_step_writes_nowhere():
    bucket, packed = programs.pack_prefill(SHAPES, [Chunk(sequence(9), 0, 9, True, [0, 1, 2])])
    assert bucket == 16
    assert Prefill.of(packed, SHAPES, bucket).slots[9:].tolist() == [-1] * 7


@pytest.mark.parametrize(
    "chunks, message",
    [
        ([Chunk(sequence(17), 0, 17, True, [0] * 5)], "prompt tokens in one step = 17 must be at most 16"),
        ([Chunk(sequence(1), 0, 1, True, [0])] * 4, "prompts in one step = 4 must be at most 3"),
        ([Chunk(sequence(5), 0, 5, True, [0])], "sequence 5 has pages for 4 tokens, 5 are to be run"),
        ([Chunk(sequence(5), 4, 2, True, [0, 1])], r"sequence 5 has 5 tokens, \[4, 6\) were asked for"),
    ],
)
def test_a_step_that_cannot_be_is_refused(chunks: list[Chunk], message: str):
    with pytest.raises(ValueError, match=message):
        programs.pack_prefill(SHAPES, chunks)


def test_sampling_parameters_survive_packing():
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.25, "min_tokens": 4}
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, **penalties)
    row = Sequence(0, [1], params, seed=-2, index=3)
    words = np.asarray([sampling.pack(row)], np.int32)
    read = jax.jit(sampling.unpack)(words)
    assert (read.temperature[0], read.top_p[0], read.top_k[0]) == (np.float32(0.7), np.float32(0.9), 5)
    assert (read.sequence[0], read.min_p[0], read.logprobs[0]) == (3, np.float32(0.1), False)
    assert (int(read.seed[0, 0]) << 32 | int(read.seed[0, 1])) == -2 % 2**64
    penalties = tuple(float(one[0]) for one in read.penalties)
    assert penalties == (1, 0.5, -0.5, 1.25, 5)


def edited(state: np.ndarray, edits: Edits) -> np.ndarray:
    packed = edits.pack()
    assert packed is not None
    bucket, rows = packed
    return np.asarray(programs.edit(model(), SHAPES, bucket)(state, rows))


def test_edits_join_leave_and_grow_slots_and_leave_the_others_alone():
    before = np.arange(4 * DecodeState.columns(SHAPES), dtype=np.int32).reshape(4, -1)
    edits = Edits(SHAPES)
    edits.join(2, sequence(5, output=2), [8, 6])
    edits.leave(0)
    edits.grow(3, 1, (55, 56))
    after = edited(before.copy(), edits)
    state = DecodeState.of(after)
    assert (state.token[2], state.position[2], state.active[2]) == (201, 6, 1)
    assert state.page_table[2].tolist() == [8, 6, 0, 0, 0, 0, 0, 0]
    assert not after[0].any()
    assert np.array_equal(after[1], before[1])
    expected = before[3].copy()
    expected[programs.FIRST_PAGE + 1 : programs.FIRST_PAGE + 3] = 55, 56
    assert np.array_equal(after[3], expected)


def test_nothing_is_sent_when_nothing_changes():
    assert Edits(SHAPES).pack() is None


def test_a_sequence_at_its_longest_writes_over_nobody():
    """A step planned before the host knew that it was the last must not spoil a page."""
    this: Any = model()
    params = jax.tree.map(lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), this.params)
    program = programs.decode(this, SHAPES, SHAPES.slots)
    edits = Edits(SHAPES)
    edits.join(0, sequence(33), [5] * 8)
    pool, state = (
        programs.fresh_pool(this, SHAPES)(),
        edited(np.zeros((4, DecodeState.columns(SHAPES)), np.int32), edits),
    )
    marks = programs.fresh_marks(this, SHAPES, SHAPES.slots)()
    pool, state, *_ = program(params, pool, state, marks)
    assert not any(np.asarray(layer).any() for layer in (*pool["k"], *pool["v"]))


def test_a_small_batch_is_the_first_slots_of_a_large_one():
    this: Any = model()
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(random.normal(size=leaf.shape).astype(leaf.dtype) / 8, leaf.sharding), this.params
    )
    results = []
    for batch in (SHAPES.slots, 2):
        edits = Edits(SHAPES)
        for slot in range(2):
            edits.join(slot, sequence(5), [2 * slot, 2 * slot + 1])
        state = edited(np.zeros((SHAPES.slots, DecodeState.columns(SHAPES)), np.int32), edits)
        pool, marks = programs.fresh_pool(this, SHAPES)(), programs.fresh_marks(this, SHAPES, SHAPES.slots)()
        pool, state, _, tokens, _ = programs.decode(this, SHAPES, batch)(params, pool, state, marks)
        assert tokens.shape == (batch,)
        results.append((pool, state, tokens[:2]))
    whole, small = results
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), whole, small)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="jaxlib has oneDNN for x86 alone")
def test_onednn_multiplies_float32_where_it_is_asked_for():
    cpu = jax.devices("cpu")[0]
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((128, 512), (1024, 512)))
    compiled = compile_ahead(project, (x, weight), compiler_options=platform.compiler_options(cpu, "float32", "onednn"))
    assert "__onednn$matmul" in compiled.as_text()
    np.testing.assert_allclose(compiled(x, weight), np.asarray(x) @ np.asarray(weight).T, rtol=1e-4, atol=1e-3)
    assert platform.compiler_options(cpu, "bfloat16", "onednn") == {}
    assert platform.compiler_options(cpu, "float32", "ynnpack") == {}


def test_the_model_s_programs_are_compiled_with_its_options():
    this = replace(model(), compiler_options={"xla_no_such_option": True})
    for program, size in ((programs.decode, SHAPES.slots), (programs.prefill, 16)):
        with pytest.raises(RuntimeError, match="xla_no_such_option"):
            program(this, SHAPES, size)
