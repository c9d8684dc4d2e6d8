"""What goes over the wire when all is well, with an engine that says what it is told."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from ds_jax.async_engine import Output
from ds_jax.config import SloConfig
from ds_jax.sampling import TokenLogprobs
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


@both
def test_penalties_and_what_goes_with_them_reach_the_engine(client: Client, path: str) -> None:
    fields = {"presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_p": 0.1, "n": 1}
    fields |= {"min_tokens": 2, "stop_token_ids": [7, 8], "logit_bias": {"5": 1, "6": -2.5}, "prompt_logprobs": 3}
    assert client.ask(path, **fields).status_code == 200
    params = client.engine.calls[0][1]
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 0.5, 1.2)
    assert (params.min_p, params.min_tokens, params.stop_token_ids) == (0.1, 2, (7, 8))
    assert params.logit_bias == ((5, 1), (6, -2.5)) and params.prompt_logprobs == 3 and params.logprobs is None


def test_choices_are_counted_prompt_by_prompt(client: Client) -> None:
    client.engine.script = [
        Output(1, [5], "b"),
        Output(0, [5], "a", "stop"),
        Output(1, [5], "c", "length"),
    ]
    answer = client.ask(COMPLETIONS, prompt=["x", "y"], n=2).json()
    assert [(one["index"], one["text"], one["finish_reason"]) for one in answer["choices"]] == [
        (0, "a", "stop"),
        (1, "bc", "length"),
        (2, "a", "stop"),
        (3, "bc", "length"),
    ]
    assert answer["usage"]["completion_tokens"] == 6
    answer = client.ask(CHAT, n=2).json()
    assert [(one["index"], one["message"]["content"]) for one in answer["choices"]] == [(0, "a"), (1, "bc")]
    *chunks, _ = client.events(CHAT, n=2)
    texts = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["a", "bc"]
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks].count("assistant") == 2


def scored(client: Client) -> list[int]:
    """A script of three tokens, two of which make one character; each with the two likeliest."""
    first, *rest = client.engine.tokenizer.encode("aλ", add_special_tokens=False)
    assert len(rest) == 2
    tops = [((first, -0.1), (rest[0], -3.0)), ((9, -0.5), (first, -2.0)), ((rest[1], -0.2), (first, -2.5))]
    values = [TokenLogprobs(-0.1, tops[0]), TokenLogprobs(-4.0, tops[1]), TokenLogprobs(-0.2, tops[2])]
    client.engine.script = [
        Output(0, [first], "a", logprobs=values[:1], prompt_logprobs=[TokenLogprobs(-1.5, ((first, -0.5),))]),
        Output(0, rest[:1], "", logprobs=values[1:2]),
        Output(0, rest[1:], "λ", "length", logprobs=values[2:]),
    ]
    return [first, *rest]


def test_logprobs_of_a_completion_have_openais_shape(client: Client) -> None:
    scored(client)
    [choice] = client.ask(COMPLETIONS, prompt=[5, 6], logprobs=2, prompt_logprobs=1).json()["choices"]
    nine = client.engine.tokenizer.decode([9])
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xce", "bytes:\\xbb"],
        "token_logprobs": [-0.1, -4.0, -0.2],
        "text_offset": [0, 1, 1],
        "top_logprobs": [
            {"a": -0.1, "bytes:\\xce": -3.0},
            {nine: -0.5, "a": -2.0, "bytes:\\xce": -4.0},
            {"bytes:\\xbb": -0.2, "a": -2.5},
        ],
    }
    a, six = client.engine.calls[0][0], client.engine.tokenizer.pieces[6].decode()
    assert a == [5, 6]
    first, own = choice["prompt_logprobs"]
    assert first is None and own["6"] == {"logprob": -1.5, "decoded_token": six} and len(own) == 2
    *chunks, _ = client.events(COMPLETIONS, prompt=[5, 6], logprobs=2)
    for field in choice["logprobs"]:
        pieces = [chunk["choices"][0]["logprobs"][field] for chunk in chunks]
        assert [one for piece in pieces for one in piece] == choice["logprobs"][field]


def test_logprobs_of_a_chat_have_openais_shape(client: Client) -> None:
    scored(client)
    client.engine.script[0] = replace(client.engine.script[0], prompt_logprobs=None)
    [choice] = client.ask(CHAT, logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "aλ" and choice["logprobs"]["refusal"] is None
    assert content[0] == {
        "token": "a",
        "logprob": -0.1,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.1, "bytes": [97]},
            {"token": "bytes:\\xce", "logprob": -3.0, "bytes": [0xCE]},
        ],
    }
    assert [one["bytes"] for one in content] == [[97], [0xCE], [0xBB]]
    *chunks, _ = client.events(CHAT, logprobs=True, top_logprobs=2)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one for piece in pieces if piece for one in piece["content"]] == content


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


@both
def test_what_a_request_leaves_out_is_as_the_checkpoint_says_and_what_it_says_counts(client: Client, path: str) -> None:
    client.engine.sampling_defaults = {"temperature": 0.6, "top_k": 20}
    assert client.ask(path, top_p=0.5).status_code == 200
    assert client.ask(path, temperature=0, top_k=-1).status_code == 200
    (_, first), (_, second) = client.engine.calls
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.5, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 1.0, 0)


@both
def test_a_requests_targets_go_before_the_configs_one_by_one(client: Client, path: str) -> None:
    for fields, expected in (
        ({}, (None, SloConfig(0.5, 0.1))),
        ({"slo": {"ttft_s": 2}, "deadline_s": 7.5}, (7.5, SloConfig(2, 0.1))),
        ({"slo": {"ttft_s": 0, "tpot_s": 0.02}}, (None, SloConfig(0, 0.02))),
    ):
        client.engine.limits = []
        assert client.ask(path, **fields).status_code == 200
        assert client.engine.limits == [expected]
