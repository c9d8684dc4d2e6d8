"""What the benchmarks make of their input, and that they drive every scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_jax.config import FORETELLING
from ds_jax.scheduling import POLICIES
from experiments.engine_cases import read_cases
from experiments.kernel_cases import Load
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
    ],
)
def test_a_wrong_case_file_is_refused_by_name(cases: list, reason: str, tmp_path: Path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    with pytest.raises(ValueError, match=reason):
        read_cases(path)
