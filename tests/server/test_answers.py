"""What goes over the wire when all is well, with an engine that says what it is told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.server.client import CHAT, COMPLETIONS, TEXT, USER, Client, error_of

both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


def test_a_completion_has_openais_shape(client: Client) -> None:
    answer = client.ask(COMPLETIONS, model="scripted").json()
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    stages = {"prefill_queueing": 0.5}
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stages_s": stages}
    usage = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    prompt = client.engine.tokenizer.encode("Once")
    usage |= {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 4}
    assert answer == {"object": "text_completion", "model": "scripted", "choices": [choice], "usage": usage}
    assert client.engine.calls[0][0] == prompt


def test_a_chat_completion_has_openais_shape(client: Client) -> None:
    answer = client.ask(CHAT).json()
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stages_s": {"prefill_queueing": 0.5},
        }
    ]
    prompt = client.engine.tokenizer.apply_chat_template(USER)
    assert client.engine.calls[0][0] == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Once", 1), (["Once", "upon"], 2), ([5, 6, 7], 1), ([[5], [6, 7], [8]], 3), (["Once"], 1), ([[5]], 1)],
)
def test_prompts_are_texts_or_token_ids_one_or_many(client: Client, prompt: Any, count: int) -> None:
    answer = client.ask(COMPLETIONS, prompt=prompt).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    assert all(choice["text"] == TEXT for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 4 * count
    asked = [token_ids for token_ids, _ in client.engine.calls]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, asked))
    if not isinstance(prompt[0], str):
        assert asked == (prompt if isinstance(prompt[0], list) else [prompt])


def test_a_streamed_completion_says_the_same(client: Client) -> None:
    *chunks, done = client.events(COMPLETIONS)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"} and len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hel", "lö 🦊", ""]  # no chunk for a token without text
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert "usage" not in chunks[0]


def test_a_streamed_chat_begins_with_the_role(client: Client) -> None:
    *chunks, done = client.events(CHAT)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lö 🦊"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


@both
def test_usage_comes_last_in_a_stream_that_asks_for_it(client: Client, path: str) -> None:
    *chunks, last, done = client.events(path, stream_options={"include_usage": True})
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)


def test_streams_of_many_prompts_carry_their_index(client: Client) -> None:
    *chunks, last, _ = client.events(COMPLETIONS, prompt=["a", "b", "c"], stream_options={"include_usage": True})
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: TEXT, 1: TEXT, 2: TEXT} and last["usage"]["completion_tokens"] == 12


def test_sampling_parameters_reach_the_engine(client: Client) -> None:
    fields = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["a", "b"]}
    client.ask(COMPLETIONS, **fields, top_k=-1, ignore_eos=True)
    params = client.engine.calls[0][1]
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.9, 7)
    assert params.stop == ("a", "b") and params.top_k == 0 and params.ignore_eos
    client.ask(CHAT, stop="a", max_completion_tokens=4, max_tokens=5)
    params = client.engine.calls[1][1]
    assert params.stop == ("a",) and params.max_tokens == 4 and params.temperature == 1.0


def test_without_max_tokens_completions_get_16_and_chats_what_is_left(client: Client) -> None:
    for prompt, expected in (([5], 16), ([5] * 60, 4)):
        client.ask(COMPLETIONS, prompt=prompt)
        assert client.engine.calls[-1][1].max_tokens == expected
    client.ask(CHAT)
    prompt, params = client.engine.calls[-1]
    assert params.max_tokens == 64 - len(prompt)


def test_parts_of_text_are_one_text_and_developers_are_the_system(client: Client) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]
    client.ask(CHAT, messages=[{"role": "developer", "content": parts}])
    plain = [{"role": "system", "content": "Be\nkind"}]
    assert client.engine.calls[0][0] == client.engine.tokenizer.apply_chat_template(plain)


def test_models_and_health(client: Client) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "scripted" and model["object"] == "model" and model["max_model_len"] == 64
    assert client.get("/v1/models/scripted").json() == model
    assert client.get("/health").status_code == 200
    client.engine.healthy = False
    answer = client.get("/health")
    assert answer.status_code == 503 and error_of(answer)["type"] == "server_error"


@both
def test_unknown_fields_and_those_that_ask_for_nothing_are_ignored(client: Client, path: str) -> None:
    fields = {"user": "me", "no_such_field": {"a": 1}, "n": 1, "tools": [], "logprobs": None, "presence_penalty": 0.0}
    assert client.ask(path, **fields, response_format={"type": "text"}).status_code == 200
