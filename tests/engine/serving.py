"""Engines over the golden checkpoints, small enough to build in seconds, and mixed requests for them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ds_jax.config import CacheConfig, Config, DecodeConfig, EngineConfig, ModelConfig, PrefillConfig
from ds_jax.llm import LLM
from ds_jax.sampling import SamplingParams
from tests import goldens


def config_for(
    case: goldens.Golden,
    prefill_tp: int = 1,
    decode_tp: int = 1,
    *,
    prefill_instances: int = 1,
    decode_instances: int = 1,
    pages: int = 48,
    max_model_len: int = 96,
    slots: int = 8,
    page_size: int = 8,
    token_buckets: tuple[int, ...] = (16, 64),
    log_capacity: int = 0,
) -> Config:
    """Two prefill programs and pages of 8 tokens, unless told otherwise."""
    return Config(
        model=ModelConfig(path=str(case.folder), dtype="float32", max_model_len=max_model_len),
        prefill=PrefillConfig(
            instances=prefill_instances,
            tp=prefill_tp,
            max_step_tokens=64,
            max_step_sequences=4,
            saturation_tokens=32,
            token_buckets=token_buckets,
        ),
        decode=DecodeConfig(instances=decode_instances, tp=decode_tp, slots=slots),
        cache=CacheConfig(page_size=page_size, num_pages=pages),
        engine=EngineConfig(compilation_cache="", log_capacity=log_capacity),
    )


def serve(config: Config, **options: Any) -> LLM:
    return LLM(config, progress=False, **options)


def mixed_requests(count: int, vocabulary: int, seed: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 40 tokens, a few longer than a step; greedy and seeded sampling in turn."""
    draw = random.Random(seed)
    prompts, params = [], []
    for index in range(count):
        length = draw.choice((1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 40, 70))
        prompts.append([draw.randrange(vocabulary) for _ in range(length)])
        base = SamplingParams(max_tokens=draw.randint(1, 20), temperature=0.0, seed=1000 + index, ignore_eos=True)
        if index % 2:
            base = replace(
                base,
                temperature=draw.choice((0.5, 1.0, 1.5)),
                top_p=draw.choice((1.0, 0.9, 0.5)),
                top_k=draw.choice((0, 5, 50)),
            )
        params.append(base)
    return prompts, params
