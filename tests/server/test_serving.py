"""The real engine behind the real server, asked by the openai client over loopback."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ds_jax.async_engine import AsyncEngine
from ds_jax.engine import NO_TARGET_NS
from ds_jax.protocol import Arrived, Reject, Slo
from tests import goldens
from tests.engine.serving import config_for
from tests.server.scripted import serving, until

CASE = goldens.CASES[0]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
TALK: Any = [{"role": "user", "content": "Hello, who are you?"}]
LIMIT = 2048


@dataclass
class Served:
    url: str
    engine: AsyncEngine
    client: openai.OpenAI

    def pages_used(self) -> int:
        return sum(instance["pages_used"] for instance in self.engine.statistics()["instances"])


def roomy(folder: Path) -> Path:
    """The golden checkpoint with room for long outputs, so that a request is still running when a test looks."""
    shutil.copytree(CASE.folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": LIMIT}))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = config_for(CASE, pages=600, max_model_len=0)
    model = replace(config.model, path=str(roomy(tmp_path_factory.mktemp("model") / "tiny")), served_name="tiny")
    engine = AsyncEngine(replace(config, model=model), progress=False)
    with serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield Served(url, engine, client)


def test_completions_are_the_oracles_tokens(served: Served) -> None:
    for answer in CASE.answers():
        count = len(answer.tokens)
        done = served.client.completions.create(prompt=answer.prompt, max_tokens=count, **GREEDY)
        if (answer.margins > goldens.TIE).all():
            assert done.choices[0].text == served.engine.tokenizer.decode(answer.tokens)
        assert done.choices[0].finish_reason == "length"
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(answer.prompt), count)


def test_a_stream_says_what_the_answer_in_one_piece_says(served: Served) -> None:
    whole = served.client.completions.create(prompt="Once upon a time", max_tokens=40, **GREEDY)
    options: Any = {"include_usage": True}
    chunks = list(
        served.client.completions.create(
            prompt="Once upon a time", max_tokens=40, stream=True, stream_options=options, **GREEDY
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_a_chat_is_prompted_by_the_template_of_the_checkpoint(served: Served) -> None:
    prompt = served.engine.tokenizer.apply_chat_template(TALK)
    expected = served.client.completions.create(prompt=prompt, max_tokens=20, **GREEDY)
    whole = served.client.chat.completions.create(messages=TALK, max_tokens=20, **GREEDY)
    assert whole.choices[0].message.content == expected.choices[0].text
    assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt)
    stream = served.client.chat.completions.create(messages=TALK, max_tokens=20, stream=True, **GREEDY)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_string(served: Served, stream: bool) -> None:
    text = served.client.completions.create(prompt="Once upon a time", max_tokens=60, **GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:3]
    answer: Any = served.client.completions.create(
        prompt="Once upon a time", max_tokens=60, stop=["never in it", stop], stream=stream, **GREEDY
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_seed_repeats_and_the_stages_are_told(served: Served) -> None:
    for seed in (0, -1, 2**63, 2**64 - 1):
        asked = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "seed": seed}
        one, two = (httpx.post(f"{served.url}/v1/completions", json=asked).json()["choices"][0] for _ in range(2))
        assert one["text"] == two["text"]
        assert set(one["stages_s"]) >= {"prefill_queueing", "prefill_execution", "kv_transmission"}


def test_choices_differ_and_come_again_from_the_same_seed(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["Once", "Twice"], "max_tokens": 12, "seed": 4, "n": 3}
    first, again = (served.client.completions.create(**asked) for _ in range(2))
    assert [choice.index for choice in first.choices] == list(range(6))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len({*texts}) == 6
    streamed = [""] * 6
    for chunk in served.client.completions.create(stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    chat = served.client.chat.completions.create(model="tiny", messages=TALK, max_tokens=12, seed=4, n=2)
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert chat.choices[0].message.content != chat.choices[1].message.content
    with pytest.raises(openai.BadRequestError) as refusal:
        served.client.completions.create(**asked | {"n": 5})
    assert refusal.value.param == "n"


def test_logprobs_of_completions_and_chats_agree_and_sum_to_less_than_one(served: Served) -> None:
    prompt = served.engine.tokenizer.apply_chat_template(TALK)
    done = served.client.completions.create(prompt=prompt, max_tokens=20, logprobs=4, **GREEDY)
    found = done.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.top_logprobs is not None
    assert found.token_logprobs is not None and found.text_offset is not None and len(found.tokens) == 20
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values()), "greedy takes the likeliest"
        assert sum(math.exp(value) for value in top.values()) < 1
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:") and token in done.choices[0].text:
            assert done.choices[0].text[offset:].startswith(token)
    chat = served.client.chat.completions.create(messages=TALK, max_tokens=20, logprobs=True, top_logprobs=4, **GREEDY)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    content = chat.choices[0].logprobs.content
    assert [one.token for one in content] == found.tokens
    assert [one.logprob for one in content] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert all(bytes(one.bytes or ()).decode() == one.token for one in content if not one.token.startswith("bytes:"))
    stream = served.client.chat.completions.create(
        messages=TALK, max_tokens=20, logprobs=True, top_logprobs=4, stream=True, **GREEDY
    )
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [one.token for piece in pieces if piece for one in piece.content or ()] == found.tokens


def test_penalties_biases_and_stop_tokens_do_what_they_say(served: Served) -> None:
    def ask(**fields: Any) -> Any:
        body = {key: fields.pop(key) for key in ("min_tokens", "stop_token_ids", "prompt_logprobs") if key in fields}
        extra = {"ignore_eos": True, **body}
        return served.client.completions.create(
            **{"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 10, "temperature": 0, "logprobs": 0}
            | {"extra_body": extra}
            | fields
        ).choices[0]

    word = served.engine.tokenizer.pieces[70].decode()
    assert ask(logit_bias={"70": 100}).logprobs.tokens == [word] * 10
    assert len({*ask(logit_bias={"70": 100, "71": 100}, frequency_penalty=2).logprobs.tokens}) == 2
    stopped = ask(logit_bias={"70": 100}, stop_token_ids=[70])
    assert stopped.logprobs.tokens == [word] and stopped.finish_reason == "stop"
    held = ask(logit_bias={"70": 100}, stop_token_ids=[70], min_tokens=4)
    assert held.logprobs.tokens.index(word) == 4 and len(held.logprobs.tokens) == 5
    first, second, third = ask(prompt_logprobs=2).prompt_logprobs
    assert first is None and "6" in second and len(second) in (2, 3) and "7" in third


def test_bad_requests_are_refused_and_the_others_never_notice(served: Served) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5, 10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5] * LIMIT}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": LIMIT}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
    ]

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            good = {"prompt": "Once upon a time", "max_tokens": 50, **GREEDY}
            [alone] = (await client.completions.create(**good)).choices
            running = [asyncio.create_task(client.completions.create(**good)) for _ in range(12)]
            for fields, param in bad * 3:
                with pytest.raises(openai.BadRequestError) as refusal:
                    await client.completions.create(**({"model": "tiny"} | fields))
                assert refusal.value.param == param
            messages: Any = [{"role": "user", "content": "long " * LIMIT}]
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.chat.completions.create(model="tiny", messages=messages)
            assert refusal.value.param == "messages"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="a")
            for answer in await asyncio.gather(*running):
                assert answer.choices[0].text == alone.text

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_gives_its_pages_back(served: Served, stream: bool) -> None:
    body = {"prompt": ["Once", "upon", "a time"], "max_tokens": LIMIT - 100, "stream": stream, "ignore_eos": True}
    finished = served.engine.statistics()["finished"]
    with httpx.Client(base_url=served.url, timeout=30) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200 and served.pages_used() > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
    until(lambda: served.pages_used() == 0)
    assert served.engine.statistics()["requests"] == 0
    assert served.engine.statistics()["finished"] == finished + 3


def test_many_clients_at_once_get_what_each_gets_alone(served: Served) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed(index: int) -> str:
                stream = await client.completions.create(
                    prompt=f"Story {index}", max_tokens=10 + index, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            together = await asyncio.gather(*(streamed(index) for index in range(24)))
            assert together == [await streamed(index) for index in range(24)]

    asyncio.run(scenario())


def test_targets_and_deadlines_reach_the_engine_and_wrong_ones_are_refused(served: Served) -> None:
    def ask(**fields: Any) -> Any:
        return served.client.completions.create(
            model="tiny", prompt=[1, 2], max_tokens=1500, extra_body={"ignore_eos": True, **fields}
        )

    assert ask(deadline_s=0.02).choices[0].finish_reason == "deadline"
    for fields, field in (({"slo": {"tpot_s": -1}}, "slo.tpot_s = -1"), ({"deadline_s": 0}, "deadline_s = 0")):
        with pytest.raises(openai.BadRequestError, match=field):
            ask(**fields)
    heard: list[Any] = []
    scheduler = served.engine._engine
    ask_scheduler = scheduler._ask
    scheduler._ask = lambda event, now_ns: heard.append(event) or ask_scheduler(event, now_ns)
    try:
        for slo in ({"ttft_s": 0.25, "tpot_s": 0.05}, {"ttft_s": 0.25}):
            served.client.completions.create(model="tiny", prompt=[1], max_tokens=1, extra_body={"slo": slo})
    finally:
        scheduler._ask = ask_scheduler
    asked = [event.request.slo for event in heard if isinstance(event, Arrived)]
    assert asked == [Slo(250_000_000, 50_000_000), Slo(250_000_000, NO_TARGET_NS)]


def test_a_request_that_the_scheduler_turns_away_is_told_when_to_come_again(served: Served) -> None:
    """Before the first byte of a stream as well."""
    engine = served.engine._engine
    ask_scheduler = engine._ask

    def reject(event: Any, now_ns: int) -> list[Any]:
        if not isinstance(event, Arrived):
            return ask_scheduler(event, now_ns)
        return [Reject(event.request.id, "ttft_s = 0.2 can no longer be met", 2.5)]

    engine._ask = reject
    try:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="can no longer be met") as caught:
                served.client.completions.create(model="tiny", prompt=[1], stream=stream)
            assert caught.value.response.headers["retry-after"] == "3"
    finally:
        engine._ask = ask_scheduler
