"""Served tokens equal those of Hugging Face transformers, on any tensor parallelism of either phase.

Building an engine costs some ten seconds of compilation. So every golden is served at one placement here, each
placement by several goldens; tests/models/test_goldens.py has the model of every golden at every placement. With
`--every-placement` all pairs are served (some ten minutes).
"""

from __future__ import annotations

import pytest

from ds_jax.sampling import SamplingParams
from tests import goldens
from tests.engine.serving import config_for, serve

PLACEMENTS = ((1, 4), (4, 2), (2, 1), (1, 1))
"""tp of prefill and of decode."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every, folder = metafunc.config.getoption("--every-placement"), metafunc.config.getoption("--goldens")
    pairs = [
        (case, placement)
        for number, case in enumerate(goldens.goldens_in(folder) if folder else goldens.CASES)
        for placement in (PLACEMENTS if every else [PLACEMENTS[number % len(PLACEMENTS)]])
    ]
    ids = [f"{case.name}-prefill_tp{prefill}_decode_tp{decode}" for case, (prefill, decode) in pairs]
    metafunc.parametrize(("case", "placement"), pairs, ids=ids)


def test_greedy_tokens_are_those_of_the_oracle(case: goldens.Golden, placement: tuple[int, int]) -> None:
    answers = case.answers()
    length = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
    params = [SamplingParams(max_tokens=len(answer.tokens), temperature=0, ignore_eos=True) for answer in answers]
    # Few programs: prompts in one step of one size, pages so large that four hold a sequence.
    config = config_for(
        case, *placement, max_model_len=length, page_size=-(-length // 4), token_buckets=(64,), slots=len(answers)
    )
    with serve(config) as llm:
        outputs = llm.generate([answer.prompt for answer in answers], params)
    for answer, output in zip(answers, outputs, strict=True):
        assert output.finish_reason == "length"
        assert answer.agrees(output.token_ids), f"{output.token_ids} instead of {answer.tokens}"
