"""Output depends on prompt, parameters and seed, and on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ds_jax.llm import LLM, RequestOutput
from ds_jax.runtime import sampling
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams
from models import checkpoint, transformer
from tests import goldens
from tests.engine.serving import config_for, mixed_requests, serve

CASE = next(case for case in goldens.CASES if case.name == "llama_gqa")


class Reference:
    """The 50 requests, each served alone, and the model itself to tell a tie from a mistake."""

    def __init__(self, llm: LLM):
        vocabulary = llm.engine.executor.arch.vocab_size
        self.prompts, self.params = mixed_requests(50, vocabulary)
        self.alone = [
            llm.generate([prompt], params)[0] for prompt, params in zip(self.prompts, self.params, strict=True)
        ]
        opened = checkpoint.open_checkpoint(CASE.folder)
        mesh = transformer.sharding.make_mesh(jax.devices()[:1], 1)
        graphdef, _ = transformer.abstract_params(opened.arch, 1, jnp.float32, mesh)
        self.model = nnx.merge(graphdef, checkpoint.load_params(opened, mesh, jnp.float32))

    def check(self, outputs: list[RequestOutput]) -> None:
        """Every output equals the one served alone, up to the first near-tie."""
        assert len(outputs) == len(self.alone)
        for index, (output, alone) in enumerate(zip(outputs, self.alone, strict=True)):
            if output.token_ids == alone.token_ids:
                assert output.finish_reason == alone.finish_reason
                continue
            pairs = zip(output.token_ids, alone.token_ids, strict=False)
            first = next(at for at, (got, wanted) in enumerate(pairs) if got != wanted)
            margin = self.margin(index, alone.token_ids[:first])
            assert margin < 1e-4, f"request {index} differs at token {first}, where the margin is {margin:.3g}"

    def margin(self, index: int, output: list[int]) -> float:
        """Best minus second best (perturbed) logit for the token after prompt + output."""
        tokens = jnp.asarray([*self.prompts[index], *output], jnp.int32)
        hidden = self.model(tokens, jnp.arange(len(tokens)), _causal)
        logits = self.model.logits(hidden[-1:])
        params = self.params[index]
        assert params.seed is not None
        words = sampling.pack(Sequence(0, self.prompts[index], params, params.seed))
        scores = sampling.scores(logits, sampling.unpack(jnp.asarray([words])), jnp.asarray([len(tokens)]))
        second, best = np.sort(np.asarray(scores)[0])[-2:]
        return float(best - second)


def with_tokens(output: RequestOutput, token_ids: list[int]) -> RequestOutput:
    return RequestOutput(output.prompt_token_ids, (dataclasses.replace(output.completions[0], token_ids=token_ids),))


def _causal(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with serve(config_for(CASE)) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(plain: LLM) -> Reference:
    return Reference(plain)


def test_a_request_served_again_gives_the_same_tokens(plain: LLM, reference: Reference) -> None:
    again = plain.generate(reference.prompts[:4], reference.params[:4])
    assert [output.token_ids for output in again] == [output.token_ids for output in reference.alone[:4]]


def test_different_seeds_give_different_tokens(plain: LLM) -> None:
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    outputs = plain.generate([[1, 2, 3]] * 4, params)
    assert len({tuple(output.token_ids) for output in outputs}) == 4


def test_batched_together(plain: LLM, reference: Reference) -> None:
    reference.check(plain.generate(reference.prompts, reference.params))


def test_prefill_on_four_devices_and_decoding_on_two(reference: Reference) -> None:
    with serve(config_for(CASE, prefill_tp=4, decode_tp=2)) as llm:
        reference.check(llm.generate(reference.prompts, reference.params))


def test_two_prefill_and_two_decode_instances(reference: Reference) -> None:
    with serve(config_for(CASE, prefill_instances=2, decode_instances=2)) as llm:
        reference.check(llm.generate(reference.prompts, reference.params))


def test_preemption_in_a_pool_of_a_few_pages(reference: Reference) -> None:
    with serve(config_for(CASE, pages=14)) as llm:
        outputs = llm.generate(reference.prompts, reference.params)
        reference.check(outputs)
        replays = sum(output.times.replays for output in outputs if output.times is not None)
        assert replays > 0, "the pool was large enough for all: nothing was preempted"
        assert all(instance["pages_used"] == 0 for instance in llm.engine.statistics()["instances"])


def test_the_reference_can_tell_a_tie_from_a_mistake(reference: Reference) -> None:
    margins = [reference.margin(index, reference.alone[index].token_ids[:1]) for index in (0, 1)]
    assert all(margin > 1e-4 for margin in margins)
    wrong = [one.token_ids for one in reference.alone]
    wrong[0] = [(wrong[0][0] + 1) % 50, *wrong[0][1:]]
    with pytest.raises(AssertionError, match="request 0 differs at token 0"):
        reference.check([with_tokens(one, ids) for one, ids in zip(reference.alone, wrong, strict=True)])
