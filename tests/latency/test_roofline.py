"""Step times and capacities worked out from published figures."""

from __future__ import annotations

import pytest

from ds_jax.latency import fewest_gpus, gpu, kv_tokens, roofline
from models.folder import read_configs

A100 = gpu("a100-80g")


def _arch(name: str):
    return read_configs(f"models/published/{name}").arch


@pytest.mark.parametrize(
    ("model", "tp", "pp", "measured"),
    [
        ("opt-13b", 1, 1, 66144),
        ("opt-13b", 2, 1, 163008),
        ("opt-13b", 1, 2, 163008),
        ("opt-13b", 4, 2, 744224),
        ("opt-66b", 2, 1, 11600),
        ("opt-66b", 4, 1, 78496),
        ("opt-66b", 2, 4, 212320),
        ("opt-66b", 8, 1, 212304),
        ("opt-175b", 8, 1, 59520),
        ("opt-175b", 3, 3, 76192),
    ],
)
def test_capacities_are_those_of_distserves_table(model, tp, pp, measured):
    assert kv_tokens(_arch(model), A100, "float16", tp, pp) == pytest.approx(measured, rel=0.02)


def test_a_model_whose_weights_do_not_fit_holds_no_token():
    arch = _arch("opt-66b")
    assert kv_tokens(arch, A100, "float16", 1, 1) == 0
    assert fewest_gpus(arch, A100, "float16", 2048) == 2
    assert fewest_gpus(_arch("opt-13b"), A100, "float16", 2048) == 1


@pytest.mark.parametrize(
    ("model", "tp", "chunks", "batch", "context", "measured_ms", "within"),
    [  # milliseconds: DistServe's fits for A100-80G at these points
        ("opt-13b", 1, [(0, 512)], 0, 0, 72.1, 0.1),
        ("opt-13b", 1, [], 32, 32 * 800, 37.2, 0.1),
        ("opt-13b", 2, [(0, 1500)], 0, 0, 123.1, 0.15),
        ("opt-66b", 4, [(0, 512)], 0, 0, 107.5, 0.1),
        ("opt-66b", 4, [], 1, 500, 31.1, 0.1),
        ("opt-66b", 8, [], 1, 500, 23.4, 0.25),
    ],
)
def test_opt_on_a100_comes_out_near_what_was_measured(model, tp, chunks, batch, context, measured_ms, within):
    profile = roofline(_arch(model), A100, "float16")
    assert profile.extrapolated
    assert 1e3 * profile.step_time(tp).step_s(chunks, batch, context) == pytest.approx(measured_ms, rel=within)


def test_a_faster_gpu_and_more_gpus_are_faster():
    arch = _arch("llama-2-70b")
    slow, fast = (roofline(arch, gpu(name), "float16") for name in ("a100-80g", "h100-80g"))
    for work in (([(0, 2000)], 0, 0), ([], 16, 16 * 1000)):
        assert fast.step_time(4).step_s(*work) < slow.step_time(4).step_s(*work)
        assert slow.step_time(8).step_s(*work) < slow.step_time(4).step_s(*work)


def test_grouped_kv_heads_and_experts_are_counted_as_they_are_used():
    """Llama-2-70B has an eighth of the KV of a model without groups; of Mixtral's 8 experts 2 work on a token."""
    assert roofline(_arch("llama-2-70b"), A100, "float16").kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    mixtral = roofline(_arch("mixtral-8x7b"), A100, "float16").fits[4]
    dense = roofline(_arch("llama-2-70b"), A100, "float16").fits[4]
    assert mixtral.prefill[1] < 0.3 * dense.prefill[1]
    assert 0.5 < mixtral.prefill[0] / dense.prefill[0] < 0.8


def test_an_unknown_gpu_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"gpu = 'a100-80gb' must be one of .*h200.*; did you mean a100-80g\?"):
        gpu("a100-80gb")
