"""Every form of the paged operations against its definition, and the definitions against plain attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_write, paged_decode_attention, paged_prefill_attention, platforms

PAGES, PAGE, TABLE = 12, 4, 6
SHAPES = [(4, 2, 8), (3, 3, 5), (6, 1, 16)]  # H, K, D
SCALE = 0.4
SIDE_BY_SIDE = {"scale": SCALE, "over": platforms.side_by_side}
"""What the XLA forms do elsewhere than on the CPU."""


def forms_of(package, parallel, **options):
    forms = {name: functools.partial(package.attend, scale=SCALE, backend=name, **options) for name in package.FORMS}
    forms["xla side by side"] = functools.partial(parallel, **SIDE_BY_SIDE, **options)
    return {name: jax.jit(form) for name, form in forms.items()}


DECODE = forms_of(paged_decode_attention, paged_decode_attention.xla.over_sequences)
PREFILL = forms_of(paged_prefill_attention, paged_prefill_attention.xla.over_heads)
DECODE_FORMS = [name for name in DECODE if name != "definition"]
PREFILL_FORMS = [name for name in PREFILL if name != "definition"]
WRITE_FORMS = [name for name in kv_write.FORMS if name != "definition"]


def random_pool(seed: int, kv_heads: int, head_dim: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    pair = np.random.default_rng(seed).normal(size=(2, PAGES, kv_heads, PAGE, head_dim))
    return pair[0].astype(dtype), pair[1].astype(dtype)


def owned_pages(seed: int, lengths: list[int]) -> np.ndarray:
    """A page table for these many tokens; entries that nobody needs lead far outside the pool."""
    random = np.random.default_rng(seed)
    table = np.full((len(lengths), TABLE), 10**6, np.int32)
    for row, length in enumerate(lengths):
        used = -(-length // PAGE)
        table[row, :used] = random.choice(PAGES, used, replace=False)
    return table


def spoiled(pool: np.ndarray, table: np.ndarray, lengths: list[int], firsts: list[int] | None = None) -> np.ndarray:
    """The pool with NaN wherever none of the sequences has a token, or one before its first that matters."""
    held = np.zeros((PAGES, PAGE), bool)
    for row, length in enumerate(lengths):
        for i in range(firsts[row] if firsts else 0, length):
            held[table[row, i // PAGE], i % PAGE] = True
    return np.where(held[:, None, :, None], pool, np.nan).astype(pool.dtype)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, cap: float | None = None) -> np.ndarray:
    """softmax(scale q K^T) V of one query [H, D] over keys [S, K, D], in float64."""
    k, v = (np.repeat(x.astype(np.float64), len(q) // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("hd,shd->hs", q.astype(np.float64), k) * SCALE
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), v)


def test_the_definition_of_decode_attention_is_attention_over_the_tokens_in_order():
    k_pages, v_pages = random_pool(0, 2, 8)
    lengths = [9, 0, 4, 1]
    table = owned_pages(1, lengths)
    q = np.random.default_rng(2).normal(size=(4, 4, 8)).astype(np.float32)
    out = DECODE["definition"](q, k_pages, v_pages, table, np.array(lengths))
    for row, length in enumerate(lengths):
        at = [(table[row, i // PAGE], slice(None), i % PAGE) for i in range(length)]
        expected = np.zeros((4, 8))
        if length:
            expected = plain(q[row], np.stack([k_pages[i] for i in at]), np.stack([v_pages[i] for i in at]))
        np.testing.assert_allclose(out[row], expected, atol=1e-5)


def test_the_definition_of_prefill_attention_lets_each_token_see_what_stands_before_it():
    k_pages, v_pages = random_pool(0, 2, 8)
    starts, lengths, contexts = np.array([0, 3, 3]), np.array([3, 0, 2]), np.array([0, 0, 4])
    table = owned_pages(1, [3, 0, 6])
    q = np.random.default_rng(2).normal(size=(8, 4, 8)).astype(np.float32)
    out = PREFILL["definition"](q, k_pages, v_pages, table, starts, lengths, contexts)
    # Tokens 0, 1, 2 are the first three of chunk 0; tokens 3 and 4 are the fifth and sixth of chunk 2.
    rows = np.array([0, 0, 0, 2, 2])
    seen = np.array([1, 2, 3, 5, 6])
    np.testing.assert_allclose(out[:5], DECODE["definition"](q[:5], k_pages, v_pages, table[rows], seen), atol=1e-6)
    np.testing.assert_array_equal(out[5:], 0)


@pytest.mark.parametrize(("window", "cap"), [(1, None), (5, 1.5)])
def test_with_a_window_a_token_sees_the_last_ones_and_a_cap_bounds_its_scores(window: int, cap: float | None):
    k_pages, v_pages = random_pool(3, 2, 8)
    lengths = [9, 0, 4, 24]
    firsts = [max(0, length - window) for length in lengths]
    table = owned_pages(4, lengths)
    q = np.random.default_rng(5).normal(size=(4, 4, 8)).astype(np.float32)
    expected = np.zeros((4, 4, 8))
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        at = [(table[row, i // PAGE], slice(None), i % PAGE) for i in range(first, length)]
        if at:
            expected[row] = plain(q[row], np.stack([k_pages[i] for i in at]), np.stack([v_pages[i] for i in at]), cap)
    dirty = [spoiled(pool, table, lengths, firsts) for pool in (k_pages, v_pages)]
    forms = forms_of(paged_decode_attention, paged_decode_attention.xla.over_sequences, window=window, soft_cap=cap)
    for form in forms.values():
        np.testing.assert_allclose(form(q, *dirty, table, np.array(lengths)), expected, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), [(5, 1.5), (150, None)])
def test_prefill_with_a_window_equals_its_definition(window: int, cap: float | None):
    """Chunks longer than a block of keys, so that blocks before the window are left out."""
    random = np.random.default_rng(0)
    lengths, contexts = np.array([300, 1, 30]), np.array([0, 129, 200])
    starts = np.cumsum(lengths) - lengths
    pages = random.permutation(64)
    table = np.full((3, 24), -1, np.int32)
    for row, used in enumerate(-(-(lengths + contexts) // 16)):
        table[row, :used], pages = pages[:used], pages[used:]
    k_pages, v_pages = random.normal(size=(2, 64, 2, 16, 8)).astype(np.float32)
    for row, context in enumerate(contexts):
        # Pages that no token of the chunk sees may have been given away.
        for page in range(max(0, context - window + 1) // 16):
            k_pages[table[row, page]] = v_pages[table[row, page]] = np.nan
    q = random.normal(size=(352, 4, 8)).astype(np.float32)
    options = {"window": window, "soft_cap": cap}
    forms = forms_of(paged_prefill_attention, paged_prefill_attention.xla.over_heads, **options)
    expected = forms.pop("definition")(q, k_pages, v_pages, table, starts, lengths, contexts)
    assert not np.any(np.isnan(expected))
    for form in forms.values():
        out = form(q, k_pages, v_pages, table, starts, lengths, contexts)
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("form", DECODE_FORMS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from(SHAPES),
    lengths=st.lists(st.integers(0, PAGE * TABLE), min_size=5, max_size=5),
)
def test_decode_attention_equals_its_definition_whatever_lies_elsewhere_in_the_pool(form, seed, shape, lengths):
    heads, kv_heads, head_dim = shape
    k_pages, v_pages = random_pool(seed, kv_heads, head_dim)
    table = owned_pages(seed, lengths)
    q = np.random.default_rng(seed + 1).normal(size=(5, heads, head_dim)).astype(np.float32)
    expected = DECODE["definition"](q, k_pages, v_pages, table, np.array(lengths))
    dirty = [spoiled(pool, table, lengths) for pool in (k_pages, v_pages)]
    for form_ in (form, "definition"):
        out = DECODE[form_](q, *dirty, table, np.array(lengths))
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("form", PREFILL_FORMS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from(SHAPES),
    chunks=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=4, max_size=4),
)
def test_prefill_attention_equals_its_definition_whatever_lies_elsewhere_in_the_pool(form, seed, shape, chunks):
    heads, kv_heads, head_dim = shape
    lengths, contexts = (np.array(column) for column in zip(*chunks, strict=True))
    totals = np.where(lengths, lengths + contexts, 0).tolist()
    starts = np.cumsum(lengths) - lengths
    k_pages, v_pages = random_pool(seed, kv_heads, head_dim)
    table = owned_pages(seed, totals)
    q = np.random.default_rng(seed + 1).normal(size=(48, heads, head_dim)).astype(np.float32)
    arguments = (table, starts, lengths, contexts)
    expected = PREFILL["definition"](q, k_pages, v_pages, *arguments)
    dirty = [spoiled(pool, table, totals) for pool in (k_pages, v_pages)]
    q[lengths.sum() :] = np.nan  # Padding may hold anything too
    out = PREFILL[form](q, *dirty, *arguments)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_array_equal(out[lengths.sum() :], 0)


@pytest.mark.parametrize("form", PREFILL_FORMS)
def test_prefill_over_several_query_and_key_blocks_equals_its_definition(form: str):
    random = np.random.default_rng(0)
    heads, kv_heads, head_dim, size = 4, 2, 8, 16
    lengths, contexts = np.array([300, 1, 130]), np.array([0, 129, 200])
    starts = np.cumsum(lengths) - lengths
    pages = random.permutation(64)
    table = np.full((3, 24), -1, np.int32)
    for row, used in enumerate(-(-(lengths + contexts) // size)):
        table[row, :used], pages = pages[:used], pages[used:]
    k_pages, v_pages = random.normal(size=(2, 64, kv_heads, size, head_dim)).astype(np.float32)
    q = random.normal(size=(512, heads, head_dim)).astype(np.float32)
    arguments = (q, k_pages, v_pages, table, starts, lengths, contexts)
    np.testing.assert_allclose(PREFILL[form](*arguments), PREFILL["definition"](*arguments), atol=2e-6)


@pytest.mark.parametrize("form", DECODE_FORMS)
def test_decode_over_many_pages_equals_its_definition(form: str):
    random = np.random.default_rng(0)
    k_pages, v_pages = random.normal(size=(2, 96, 2, 16, 8)).astype(np.float32)
    lengths = np.array([1, 511, 512, 0, 129, 16])
    table = np.stack([random.permutation(96)[:32] for _ in lengths])
    q = random.normal(size=(6, 4, 8)).astype(np.float32)
    arguments = (q, k_pages, v_pages, table, lengths)
    np.testing.assert_allclose(DECODE[form](*arguments), DECODE["definition"](*arguments), atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_at_the_end(dtype: str):
    dtype = jnp.dtype(dtype)
    k_pages, v_pages = random_pool(0, 2, 8, dtype)
    lengths = [20, 3, 0, 24, 7]
    table = owned_pages(0, lengths)
    q = np.random.default_rng(0).normal(size=(5, 4, 8)).astype(dtype)
    chunks = (np.array([0, 3, 3, 3, 4]), np.array([3, 0, 0, 1, 1]), np.array([17, 0, 0, 23, 6]))
    for forms, arguments in ((DECODE, (table, np.array(lengths))), (PREFILL, (table, *chunks))):
        wide = forms["definition"](*(x.astype(np.float32) for x in (q, k_pages, v_pages)), *arguments)
        for form in forms.values():
            out = form(q, k_pages, v_pages, *arguments)
            assert out.dtype == dtype
            np.testing.assert_allclose(np.float32(out), np.float32(wide), atol=2e-2)


@pytest.mark.parametrize("form", ["definition", *WRITE_FORMS])
@settings(max_examples=20)
@given(slots=st.lists(st.integers(-2, PAGES * PAGE + 2), min_size=7, max_size=7, unique=True))
def test_a_write_changes_the_slots_it_names_and_no_other(form, slots):
    k_pages, v_pages = random_pool(0, 2, 8)
    k, v = np.random.default_rng(1).normal(size=(2, 7, 2, 8)).astype(np.float32)
    out = kv_write.write(k_pages, v_pages, k, v, np.array(slots), backend=form)
    for written, pages, new in zip(out, (k_pages, v_pages), (k, v), strict=True):
        expected = pages.copy()
        for row, slot in enumerate(slots):
            if 0 <= slot < PAGES * PAGE:
                expected[slot // PAGE, :, slot % PAGE] = new[row]
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("form", ["definition", *WRITE_FORMS])
def test_keys_are_turned_to_their_positions_while_they_are_written(form: str):
    """Dimensions i and i + D/2 are the real and imaginary part of a number, multiplied by e to the i angle."""
    k_pages, v_pages = random_pool(0, 2, 8)
    random = np.random.default_rng(1)
    k, v = random.normal(size=(2, 5, 2, 8)).astype(np.float32)
    angles = random.normal(size=(5, 4))
    slots = np.array([3, -1, 17, 40, 8])
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    out_k, out_v = kv_write.write(k_pages, v_pages, k, v, slots, cosine, sine, backend=form)
    numbers = (k[..., :4] + 1j * k[..., 4:]) * np.exp(1j * angles)[:, None]
    turned = np.concatenate([numbers.real, numbers.imag], -1)
    for row, slot in enumerate(slots):
        if slot >= 0:
            np.testing.assert_allclose(out_k[slot // PAGE, :, slot % PAGE], turned[row], atol=1e-6)
            np.testing.assert_array_equal(out_v[slot // PAGE, :, slot % PAGE], v[row])
    assert np.sum(np.asarray(out_k) != k_pages) <= 4 * 2 * 8


def test_an_unknown_backend_is_refused():
    k_pages, v_pages = random_pool(0, 2, 8)
    with pytest.raises(ValueError, match="backend = 'cuda' must be auto or one of mosaic, xla, definition"):
        paged_decode_attention.attend(
            np.zeros((1, 4, 8)), k_pages, v_pages, np.zeros((1, 1), int), np.ones(1, int), scale=1.0, backend="cuda"
        )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_pages_are_read_with_the_scale_of_their_page_and_head(dtype: str):
    random = np.random.default_rng(0)
    wide = random.normal(size=(2, PAGES, 2, PAGE, 8))
    most = 127 if dtype == "int8" else 448
    scales = np.abs(wide).max((-1, -2)) / most
    narrow = wide / scales[..., None, None]
    narrow = np.rint(narrow).astype(np.int8) if dtype == "int8" else narrow.astype(jnp.dtype(dtype))
    wide = (narrow.astype(np.float32) * scales[..., None, None]).astype(np.float32)
    scales = scales.astype(np.float32)
    lengths = [9, 0, 4, 24]
    table = owned_pages(1, lengths)
    q = random.normal(size=(4, 4, 8)).astype(np.float32)
    chunks = np.array([0, 2, 2, 3]), np.array([2, 0, 1, 1]), np.array([7, 0, 3, 23])
    for forms, rest in ((DECODE, (table, np.array(lengths))), (PREFILL, (table, *chunks))):
        expected = forms["definition"](q, *wide, *rest)
        for form in forms.values():
            np.testing.assert_allclose(form(q, *narrow, *rest, *scales), expected, atol=1e-5)
