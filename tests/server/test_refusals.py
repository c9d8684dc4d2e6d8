"""Requests that are refused, with OpenAI's error body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ds_jax.text import Tokenizer
from tests.server.client import CHAT, COMPLETIONS, LIMIT, USER, Client, error_of
from tests.text.tokenizers_for_tests import byte_level

both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@both
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("allowed_token_ids", [5]),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(client: Client, path: str, field: str, value: Any) -> None:
    error = client.refused(path, **{field: value})
    assert error["param"] == field and error["message"].startswith(f"{field} = ")
    assert "not supported yet" in error["message"] and error["type"] == "invalid_request_error"
    assert not client.engine.calls


@both
@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("max_tokens", 0, "max_tokens = 0 must be"),
        ("max_tokens", -1, "max_tokens = -1"),
        ("max_tokens", 65, "max_tokens = 65 exceeds"),
        ("max_tokens", "5", "max_tokens = '5'"),
        ("max_tokens", 5.5, "integer"),
        ("max_tokens", True, "integer"),
        ("temperature", -0.1, "temperature = -0.1 must be a number from 0"),
        ("temperature", "hot", "number"),
        ("top_p", 0, "top_p = 0"),
        ("top_p", 1.1, "top_p = 1.1"),
        ("top_k", -2, "top_k = -2"),
        ("seed", 2**64, "seed = "),
        ("n", 0, "n = 0 must be"),
        ("presence_penalty", 2.1, "presence_penalty = 2.1 must be a number from -2 to 2"),
        ("frequency_penalty", "much", "number"),
        ("repetition_penalty", 0, "repetition_penalty = 0"),
        ("min_p", -0.1, "min_p = -0.1"),
        ("logit_bias", {"fox": 1}, "logit_bias has 'fox', which is no token id"),
        ("logit_bias", [1], "dictionary"),
        ("min_tokens", -1, "min_tokens = -1"),
        ("slo", 5, "dictionary"),
        ("deadline_s", "soon", "deadline_s = 'soon' is refused"),
        ("prompt_logprobs", 21, "prompt_logprobs = 21 must be a whole number from 0 to 20"),
        ("stop", 5, "stop = 5 is refused: must be a string or a list of strings"),
        ("stop", ["a", 5], "list of strings"),
        ("stop", [""], "non-empty"),
        ("stop", ["a"] * 65, "65 strings; at most 64"),
        ("stream", "yes", "boolean"),
        ("stream_options", {"include_usage": True}, "only allowed with stream"),
        ("model", 5, "string"),
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_limit(
    client: Client, path: str, field: str, value: Any, part: str
) -> None:
    error = client.refused(path, **{field: value})
    assert error["param"] == field and part in error["message"], error


@pytest.mark.parametrize(
    ("path", "fields", "param", "part"),
    [
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "logprobs = 21 must be a whole number from 0 to 20"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs = 21 must be a whole number"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs = true"),
        (CHAT, {"logprobs": 2}, "logprobs", "boolean"),
        (CHAT, {"stop_token_ids": [5, "a"]}, "stop_token_ids[1]", "integer"),
        (CHAT, {"min_tokens": 64}, "min_tokens", "min_tokens = 64 must be at most max_tokens = "),
        (COMPLETIONS, {"min_tokens": 17}, "min_tokens", "min_tokens = 17 must be at most max_tokens = 16"),
        (COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias[5]", "logit_bias[5] = 101"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "only allowed without stream"),
    ],
)
def test_fields_that_do_not_fit_are_refused(
    client: Client, path: str, fields: dict[str, Any], param: str, part: str
) -> None:
    error = client.refused(path, **fields)
    assert error["param"] == param and part in error["message"], error


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([[]], "prompt is empty"),
        (["a", ""], "prompt[1] is empty"),
        ([5] * 64, "prompt has 64 tokens; the model allows 64"),
        ([5, 999], "token id 999"),
        ([[5], [999]], "prompt[1] has token id 999"),
        ([-1], "token id"),
        ([True], "must be a text, a list of texts, a list of token ids"),
        ([5, "a"], "must be a text"),
        ([[5], "a"], "must be a text"),
        ([1.5], "must be a text"),
        (None, "must be a text"),
        ({"a": 1}, "must be a text"),
        (["a"] * 1025, "at most 1024"),
    ],
)
def test_a_wrong_prompt_is_refused(client: Client, prompt: Any, part: str) -> None:
    error = client.refused(COMPLETIONS, prompt=prompt)
    assert error["param"] == "prompt" and part in error["message"], error


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([*USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls"),
        ([{"role": "user", "content": "long " * 100}], "messages"),
    ],
)
def test_wrong_messages_are_refused(client: Client, messages: Any, param: str) -> None:
    error = client.refused(CHAT, messages=messages)
    assert error["param"] == param and error["message"].startswith(param), error


def test_a_template_that_refuses_the_messages_is_the_clients_mistake(client: Client) -> None:
    client.engine.tokenizer = Tokenizer(byte_level(), chat_template="{{ raise_exception('roles must alternate') }}")
    error = client.refused(CHAT)
    assert error["param"] == "messages" and "roles must alternate" in error["message"]


def test_max_completion_tokens_is_refused_under_its_own_name(client: Client) -> None:
    for value in (0, 65):
        error = client.refused(CHAT, max_completion_tokens=value)
        assert error["param"] == "max_completion_tokens"
        assert error["message"].startswith(f"max_completion_tokens = {value}")


def test_half_a_surrogate_pair_is_refused(client: Client) -> None:
    for path, body in (
        (COMPLETIONS, r'{"prompt": "a\ud83e"}'),
        (CHAT, r'{"messages": [{"role":"user","content":"\ud83e"}]}'),
    ):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and "surrogate" in error_of(answer)["message"]


@both
@pytest.mark.parametrize(
    ("content", "kind", "part"),
    [
        ('{"prompt": ', "application/json", "not valid JSON"),
        ("", "application/json", "the body is empty"),
        ("[]", "application/json", "must be a JSON object"),
        ("{}", "application/json", "is missing"),
        (b'{"prompt": "\xff"}', "application/json", "body"),
        ("[" * 10_000, "application/json", "body"),
        ('{"prompt": "a"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    client: Client, path: str, content: str | bytes, kind: str, part: str
) -> None:
    answer = client.post(path, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and part in error_of(answer)["message"], answer.text


@both
def test_a_body_that_is_too_large_is_refused(client: Client, path: str) -> None:
    answer = client.ask(path, prompt="a" * LIMIT)
    assert answer.status_code == 413 and str(LIMIT) in error_of(answer)["message"]

    def parts() -> Iterator[bytes]:  # sent in chunks, without a length
        for _ in range(20):
            yield b" " * (LIMIT // 10)

    answer = client.post(path, content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and str(LIMIT) in error_of(answer)["message"]


def test_unknown_models_and_paths_are_404_and_wrong_methods_405(client: Client) -> None:
    for answer in (
        client.ask(COMPLETIONS, model="gpt-4"),
        client.ask(CHAT, model="gpt-4"),
        client.get("/v1/models/a/b"),
    ):
        error = error_of(answer)
        assert answer.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
        assert "'scripted'" in error["message"]
    answer = client.get("/v1/no/such/path")
    assert answer.status_code == 404 and "GET /v1/no/such/path" in error_of(answer)["message"]
    answer = client.get(COMPLETIONS)
    assert answer.status_code == 405 and "GET" in error_of(answer)["message"] and answer.headers["allow"] == "POST"


@both
@pytest.mark.parametrize("slo", [{"ttft": 0.2}, {"ttft_s": "soon"}])
def test_a_target_that_does_not_exist_or_is_no_number_is_refused_by_its_full_name(
    client: Client, path: str, slo: dict[str, Any]
) -> None:
    error = client.refused(path, slo=slo)
    [(name, value)] = slo.items()
    assert error["param"] == f"slo.{name}" and error["message"].startswith(f"slo.{name} = {value!r} is refused")
