"""Steps and copies against the oracle's tokens, whatever the tensor parallelism of the two phases."""

from __future__ import annotations

import pytest

from ds_jax.config import CacheConfig, Config, DecodeConfig, ModelConfig, PrefillConfig
from tests.goldens import CASES, Golden
from tests.runtime.harness import bench


def config_for(path: str, prefill_tp: int = 1, decode_tp: int = 1, **model: object) -> Config:
    return Config(
        model=ModelConfig(path=path, **model),
        prefill=PrefillConfig(tp=prefill_tp, max_step_tokens=64, max_step_sequences=4, token_buckets=(16, 64)),
        decode=DecodeConfig(tp=decode_tp, slots=4),
        cache=CacheConfig(page_size=4, num_pages=64),
    )


@pytest.mark.parametrize("prefill_tp, decode_tp", [(1, 1), (2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("golden", CASES[:1], ids=lambda golden: golden.name)
def test_greedy_tokens_are_those_of_the_oracle(golden: Golden, prefill_tp: int, decode_tp: int):
    with bench(config_for(str(golden.folder), prefill_tp, decode_tp)) as b:
        for answer in golden.answers():
            tokens = b.generate(b.add(answer.prompt), len(answer.tokens), slot=2)
            assert answer.agrees(tokens)
        assert b.executor.compilations.count == 0
