"""Served tokens equal those of Hugging Face transformers, on any tensor parallelism of either phase."""

from __future__ import annotations

import pytest

from ds_jax.sampling import SamplingParams
from tests import goldens
from tests.engine.serving import config_for, serve

PLACEMENTS = ((1, 1), (2, 1), (1, 4), (4, 2))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda tp: f"prefill_tp{tp[0]}_decode_tp{tp[1]}")
@pytest.mark.parametrize("case", goldens.CASES, ids=lambda case: case.name)
def test_greedy_tokens_are_those_of_the_oracle(case: goldens.Golden, placement: tuple[int, int]) -> None:
    answers = case.answers()
    length = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
    params = [SamplingParams(max_tokens=len(answer.tokens), temperature=0, ignore_eos=True) for answer in answers]
    with serve(config_for(case, *placement, max_model_len=length)) as llm:
        outputs = llm.generate([answer.prompt for answer in answers], params)
    for answer, output in zip(answers, outputs, strict=True):
        assert output.finish_reason == "length"
        assert answer.agrees(output.token_ids), f"{output.token_ids} instead of {answer.tokens}"
