"""What the benchmarks make of their input, and that they drive every scheduler."""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

import jax
import pytest

from ds_jax.config import FORETELLING, Config, ModelConfig
from ds_jax.scheduling import POLICIES
from experiments import beside_vllm, device_trace
from experiments.device_trace import Span
from experiments.engine_cases import Case, Mixed, mixed_requests, read_cases
from experiments.engine_runs import decode_rate
from experiments.kernel_cases import Load, loads
from experiments.scheduler_drive import measure

CASES = [(policy, False) for policy in sorted(POLICIES)] + [(policy, True) for policy in FORETELLING]


@pytest.mark.parametrize(("policy", "targets"), CASES)
def test_every_scheduler_brings_all_requests_to_decode_while_it_is_measured(policy: str, targets: bool):
    found = measure(policy, 12, 40, targets)
    steady = found["steady"]
    assert steady["steps"] >= 40
    assert steady["events"] >= 40
    assert 0 < steady["us_per_event"] <= steady["us_per_step"] * steady["steps"]


def test_loads_count_the_bytes_and_operations_of_attention():
    decode = Load("any", 8, 2, 64, 16, "bfloat16", batch=3, context=100)
    assert decode.kv_bytes == 3 * 100 * 2 * 64 * 2 * 2
    assert decode.flops == 4 * 3 * 100 * 8 * 64
    assert decode.pages == 3 * 7
    prefill = Load("any", 8, 2, 64, 16, "float32", chunks=((5, 3),))
    assert prefill.flops == 4 * (6 + 7 + 8) * 8 * 64  # the three tokens see 6, 7 and 8
    assert prefill.kv_bytes == 8 * 2 * 64 * 2 * 4


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ([], "must hold a JSON list of at least one case"),
        ([{"name": "a"}], r"cases\[0\] must have exactly the keys name, batch, prompt_tokens, output_tokens"),
        (
            [{"name": "a", "batch": 0, "prompt_tokens": 1, "output_tokens": 1}],
            r"cases\[0\].batch = 0 must be a positive int",
        ),
        (
            [{"name": "a", "requests": [[1, 0]]}],
            r"cases\[0\].requests must be a list of \[prompt tokens, output tokens\]",
        ),
    ],
)
def test_a_wrong_case_file_is_refused_by_name(cases: list, reason: str, tmp_path: Path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    with pytest.raises(ValueError, match=reason):
        read_cases(path)


def test_a_case_file_may_hold_batches_and_lists_of_requests(tmp_path: Path):
    requests = mixed_requests(20, 64, 16)
    path = tmp_path / "cases.json"
    batch = {"name": "b", "batch": 2, "prompt_tokens": 8, "output_tokens": 4}
    path.write_text(json.dumps([batch, {"name": "m", "requests": requests}]))
    equal, mixed = read_cases(path)
    assert equal == Case("b", 2, 8, 4)
    assert isinstance(mixed, Mixed) and [list(pair) for pair in mixed.requests] == requests
    assert mixed.longest <= 80 and all(1 <= prompt <= 64 and 1 <= output <= 16 for prompt, output in mixed.requests)
    assert mixed_requests(20, 64, 16) == requests


def test_the_loads_that_a_short_session_must_reach_come_first():
    found = loads(["llama-3-8b", "opt-13b"], "bfloat16", 64, ("decode", "prefill"))
    names = [load.name for load in found]
    assert names[:6:2] == [
        "llama-3-8b decode 32 x 2048",
        "llama-3-8b decode 1 x 131072",
        "llama-3-8b prefill 1 x 8192",
    ]
    assert len(names) == len(set(names)) == 2 * (25 + 5 + 1)
    assert {load.operation for load in loads(["opt-13b"], "bfloat16", 64, ("prefill",))} == {"prefill"}


def test_the_decode_rate_counts_only_what_comes_while_all_decode():
    heard = [(1.0, 1), (2.0, 1), (3.0, 2), (4.0, 2), (5.0, 2), (9.0, 1)]
    assert decode_rate(heard, 2.0, 5.0) == (2.0, 1.0)
    assert decode_rate(heard, 5.0, 5.0) == (None, None)


def test_idle_time_is_what_no_stream_of_the_device_fills():
    step = [Span(0, 40, "a"), Span(30, 60, "b"), Span(62, 90, "a")]  # two streams; 2 idle inside, 10 between
    spans = [Span(begin + 100 * i, end + 100 * i, name) for i in range(10) for begin, end, name in step]
    found = device_trace.gaps(spans, 5, 99e-9)
    assert found is not None
    assert found["window_s"] == pytest.approx(490e-9)
    assert found["idle_share"] == pytest.approx((5 * 2 + 4 * 10) / 490)
    assert found["between_steps_share"] == pytest.approx(4 * 10 / 490)
    assert found["kernels"]["a"] == pytest.approx(68e-9)
    assert device_trace.gaps([], 5, 1.0) is None


def test_of_a_trace_only_the_streams_of_a_gpu_are_read(tmp_path: Path):
    lines = "".join(
        f'lines {{ name: "{name}" timestamp_ns: 1000 events {{ metadata_id: 1 offset_ps: 5000 duration_ps: 7000 }} }}'
        for name in ("Stream #13(Compute)", "XLA Ops")
    )
    names = 'event_metadata { key: 1 value { id: 1 name: "kernel" } }'
    planes = "".join(f'planes {{ name: "{name}" {lines} {names} }}' for name in ("/host:CPU", "/device:GPU:0"))
    assert device_trace.read(tmp_path) == []
    written = jax.profiler.ProfileData.text_proto_to_serialized_xspace(planes)
    (tmp_path / "machine.xplane.pb").write_bytes(written)
    assert device_trace.read(tmp_path) == [Span(1005.0, 1012.0, "kernel")]


def test_two_engines_are_measured_in_turns_on_the_same_prompts():
    served: list[tuple[str, int, tuple[int, ...]]] = []
    first_tokens: dict[str, set[int]] = {"ours": set(), "vllm": set()}

    def side(name: str, seconds: float):
        def serve(prompts: list[list[int]], counts: list[int]) -> float:
            served.append((name, len(prompts), tuple(counts)))
            first_tokens[name].add(prompts[0][0])
            return seconds * (1 + sum(counts))

        return serve

    sides = {"ours": side("ours", 1.0), "vllm": side("vllm", 2.0)}
    found = beside_vllm.measure(Case("two", 2, 5, 3), sides, 1000, 0, rounds=2, gap_s=0.0)
    assert [name for name, _, counts in served if counts == (3, 3)][-4:] == ["ours", "vllm", "vllm", "ours"]
    assert first_tokens["ours"] == first_tokens["vllm"]
    assert found["ours"]["all_prefill_seconds"] == [3.0, 3.0]
    assert found["ours"]["prefill_tokens_per_s"] == 10 / 3
    assert found["ours"]["decode_tokens_per_s"] == 4 / (7 - 3)
    assert found["ratios"] == {"prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 2.0}

    unequal = beside_vllm.measure(Mixed("some", ((4, 2), (7, 1))), sides, 1000, 0, rounds=1, gap_s=0.0)
    assert unequal["ours"]["total_tokens_per_s"] == 14 / 4
    assert unequal["ratios"] == {"total_tokens_per_s": 2.0}


def test_a_peer_without_vllm_ends_the_measurement_with_its_log(tmp_path: Path):
    config = Config(model=ModelConfig(path=str(tmp_path)))
    peer = beside_vllm.Peer(sys.executable, config, "float32", tmp_path / "vllm.log")
    with pytest.raises(RuntimeError, match=r"vLLM ended with code 1; see .*vllm\.log"):
        peer.answer()
    peer.close()
    assert "No module named 'vllm'" in (tmp_path / "vllm.log").read_text()


def test_nothing_is_left_of_a_peer(tmp_path: Path):
    python, held = tmp_path / "python", tmp_path / "held"
    os.mkfifo(held)
    python.write_text(f"#!/bin/sh\nsleep 600 > {held} &\necho 1\ncat\n", encoding="utf-8")
    python.chmod(0o755)
    peer = beside_vllm.Peer(str(python), Config(), "float32", tmp_path / "vllm.log")
    with held.open("rb") as reader:
        assert peer.answer() == 1
        assert not select.select([reader], [], [], 0)[0], "the worker has it open"
        peer.close()
        assert select.select([reader], [], [], 30)[0], "the worker is gone"
