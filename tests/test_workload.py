"""Arrivals, lengths, classes and traces."""

from __future__ import annotations

import itertools
import json
import statistics
import tracemalloc

import numpy as np
import pytest

from ds_jax.protocol import Slo
from ds_jax.workload import (
    HUMANEVAL,
    LONGBENCH,
    MOONCAKE,
    SHAREGPT,
    Empirical,
    Lengths,
    Means,
    Phase,
    Replay,
    RequestClass,
    at_times,
    evenly,
    fixed,
    gamma,
    mix,
    poisson,
    read_csv,
    read_humaneval,
    read_longbench,
    read_mooncake,
    read_sharegpt,
    submissions,
    uniform,
    workload,
)


def gaps_s(arrivals_ns):
    return [(after - before) / 1e9 for before, after in itertools.pairwise(arrivals_ns)]


def rank_correlation(one, other):
    """Spearman's, with the mean rank for ties."""

    def ranks(values):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[places]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


# --- arrivals ---------------------------------------------------------------------------------------------------------


def test_poisson_arrivals_have_their_rate_and_exponential_gaps():
    arrivals_ns = list(poisson(50.0, 20_000, seed=3))
    assert statistics.mean(gaps_s(arrivals_ns)) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps_s(arrivals_ns)) == pytest.approx(1 / 50, rel=0.03)
    assert arrivals_ns == sorted(arrivals_ns) == list(poisson(50.0, 20_000, seed=3))
    assert arrivals_ns != list(poisson(50.0, 20_000, seed=4))


@pytest.mark.parametrize("cv", [0.3, 4.0])
def test_gamma_arrivals_have_their_rate_and_coefficient_of_variation(cv):
    gaps = gaps_s(gamma(10.0, cv, 200_000, seed=1))
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)


def test_even_and_fixed_arrivals_are_as_given():
    assert list(evenly(4.0, 3)) == [0, 250_000_000, 500_000_000]
    assert list(at_times([0.0, 0.5, 0.5])) == [0, 500_000_000, 500_000_000]
    with pytest.raises(ValueError, match="arrival at 0.5 s comes before the arrival or the start at 1.0 s"):
        list(at_times([1.0, 0.5]))


def test_a_stream_of_requests_does_not_grow_with_its_length():
    def peak_bytes(count):
        tracemalloc.start()
        for _ in workload("sharegpt", rate=10.0, cv=4.0, count=count):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(10)
    assert peak_bytes(40_000) < peak_bytes(8_000) + 100_000


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_uniform_lengths_reach_both_ends():
    lengths = uniform((3, 5), (1, 2), 500, seed=1)
    assert {one.prompt for one in lengths} == {3, 4, 5} and {one.output for one in lengths} == {1, 2}


def test_sharegpt_has_the_means_quantiles_and_correlation_that_were_measured():
    """Of the 1,600 measured pairs: to 2 % in the means, 4 % or 3 tokens in the quantiles, 0.02 in the correlation."""
    prompts, outputs = SHAREGPT.draw(np.random.default_rng(7), 200_000)
    assert prompts.mean() == pytest.approx(758.7, rel=0.02) and outputs.mean() == pytest.approx(186.3, rel=0.02)
    assert (prompts * outputs).mean() == pytest.approx(125_684, rel=0.03)
    shares = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    measured = (89, 311, 680, 1147, 1543, 1723, 1922)
    np.testing.assert_allclose(np.quantile(prompts, shares), measured, rtol=0.04, atol=3)
    np.testing.assert_allclose(np.quantile(outputs, shares), (9, 18, 76.5, 304, 507, 648, 968), rtol=0.04, atol=3)
    assert rank_correlation(prompts, outputs) == pytest.approx(-0.12, abs=0.02)
    assert not SHAREGPT.assumed


@pytest.mark.parametrize(
    ("lengths", "means"),
    [
        (HUMANEVAL, (171.3, 98.2)),
        (LONGBENCH, (1738.3, 90.7)),
        (MOONCAKE, (12035, 342.6)),
        (Means(512, 64), (512, 64)),
        (Means(7, 3, 0, 0), (7, 3)),
    ],
)
def test_assumed_shapes_have_the_published_means_and_say_that_they_are_assumed(lengths, means):
    drawn = lengths.draw(np.random.default_rng(0), 200_000)
    np.testing.assert_allclose([one.mean() for one in drawn], means, rtol=0.02)
    assert "assumed" in lengths.assumed or "shape" in lengths.assumed
    assert min(one.min() for one in drawn) >= 1
    assert lengths is not LONGBENCH or drawn[0].max() <= 2048


def test_lengths_that_were_seen_are_drawn_as_pairs():
    prompts, outputs = Empirical([Lengths(3, 30), Lengths(5, 50)]).draw(np.random.default_rng(0), 100)
    assert set(zip(prompts.tolist(), outputs.tolist(), strict=True)) == {(3, 30), (5, 50)}


# --- workloads --------------------------------------------------------------------------------------------------------


def test_submissions_join_arrivals_and_lengths():
    one, two = submissions([5, 9], fixed(7, 3, 2), max_tokens=10, slo=Slo(1, 2))
    assert (one.arrival_ns, one.request.prompt_tokens, one.request.max_tokens, one.output_tokens) == (5, 7, 10, 3)
    assert (two.request.id, two.request.slo, two.label) == (1, Slo(1, 2), "")
    assert submissions([5], fixed(7, 3, 1))[0].request.max_tokens == 3


def test_a_workload_is_the_same_each_time_and_another_for_another_seed():
    work = workload("humaneval", rate=3.0, count=300, seed=5)
    assert list(work) == list(work) != list(workload("humaneval", rate=3.0, count=300, seed=6))
    assert [one.request.id for one in work] == list(range(300))
    assert (work.name, {one.label for one in work}) == ("humaneval", {"humaneval"})


def test_more_requests_begin_with_the_same_requests():
    few = list(workload("sharegpt", rate=3.0, count=100, seed=5))
    assert list(workload("sharegpt", rate=3.0, count=5000, seed=5))[:100] == few


def test_targets_may_depend_on_the_lengths():
    work = workload("512/64", rate=1.0, count=5, slo=lambda lengths: Slo(lengths.prompt * 10, 7))
    assert all(one.request.slo == Slo(one.request.prompt_tokens * 10, 7) for one in work)


def test_classes_come_in_their_shares_with_their_labels_and_targets():
    chat = RequestClass("chat", Means(10, 5, 0, 0), Slo(1, 1), share=3)
    summary = RequestClass("summary", Means(900, 20, 0, 0), Slo(9, 9), share=1)
    requests = list(mix([chat, summary], rate=5.0, count=20_000))
    chats = [one for one in requests if one.label == "chat"]
    assert len(chats) / len(requests) == pytest.approx(0.75, abs=0.01)
    assert {(one.label, one.request.prompt_tokens, one.request.slo) for one in requests} == {
        ("chat", 10, Slo(1, 1)),
        ("summary", 900, Slo(9, 9)),
    }


def test_a_mix_shifts_from_phase_to_phase_and_starts_over():
    classes = [RequestClass("a", Means(1, 1, 0, 0)), RequestClass("b", Means(2, 1, 0, 0))]
    phases = [Phase(10.0, (1, 0)), Phase(20.0, (0, 1))]
    requests = list(mix(classes, rate=1.0, cv=0, count=90, phases=phases))
    labels = "".join(one.label for one in requests)
    assert labels == ("a" * 10 + "b" * 20) * 3


# --- traces -----------------------------------------------------------------------------------------------------------


def line(timestamp, prompt=5, output=2):
    return json.dumps({"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": [1]})


def written(folder, name, *lines):
    path = folder / name
    path.write_bytes(b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in lines))
    return path


def test_a_csv_trace_is_replayed_whatever_else_it_has(tmp_path):
    path = written(tmp_path, "t.csv", "ttft_s,arrival_s,output_tokens,prompt_tokens", "9,0.5,3,70", "9,1.25,4,80")
    assert list(read_csv(path)) == [(500_000_000, (70, 3)), (1_250_000_000, (80, 4))]
    assert [one.arrival_ns for one in workload(str(path))] == [0, 750_000_000]


def test_mooncake_requests_of_one_tick_are_spread_over_it(tmp_path):
    path = written(tmp_path, "m.jsonl", *(line(at) for at in (0, 0, 0, 3000, 3000, 6000)))
    assert [one.at_ns / 1e6 for one in read_mooncake(path)] == [0, 1000, 2000, 3000, 4500, 6000]
    assert [one.at_ns / 1e6 for one in read_mooncake(path, spread=False)] == [0, 0, 0, 3000, 3000, 6000]


def test_a_replay_keeps_proportions_at_another_rate(tmp_path):
    path = written(tmp_path, "m.jsonl", *(line(at) for at in (0, 1000, 4000, 5000)))
    assert [at_ns for at_ns, _ in Replay(path, rate=3.0, count=4)] == [0, 200_000_000, 800_000_000, 1_000_000_000]
    assert [at_ns for at_ns, _ in Replay(path, skip=2)] == [0, 1_000_000_000]


@pytest.mark.parametrize(
    ("name", "lines", "why"),
    [
        ("a.csv", ["arrival_s,prompt_tokens", "1,2"], "a.csv, line 1: column output_tokens is missing"),
        ("a.csv", ["arrival_s,prompt_tokens,output_tokens", "0,5,5", "1,x,2"], "a.csv, line 3: .*'x'"),
        ("a.csv", ["arrival_s,prompt_tokens,output_tokens", "1,5"], "a.csv, line 2: "),
        ("a.csv", ["arrival_s,prompt_tokens,output_tokens", "nan,5,5"], "a.csv, line 2: "),
        ("a.csv", ["arrival_s,prompt_tokens,output_tokens", "2,5,5", "1,5,5"], "line 3: arrival at 1.0 s comes before"),
        ("a.csv", ["arrival_s,prompt_tokens,output_tokens", "0,5,5", b"1,\xff,2"], "a.csv, line 3: "),
        ("a.jsonl", [line(0), "{"], "a.jsonl, line 2: "),
        ("a.jsonl", [line(0), b'{"timestamp": \xff}'], "a.jsonl, line 2: "),
        ("a.jsonl", [line(0), "[1]"], "a.jsonl, line 2: list in place of an object"),
        ("a.jsonl", ['{"timestamp": 3}'], "a.jsonl, line 1: input_length is missing"),
        ("a.jsonl", [line(0, prompt="many")], "a.jsonl, line 1: input_length = 'many' must be a number"),
        ("a.jsonl", [line(0), line(3, output=0)], r"a.jsonl, line 2: lengths \(5, 0\) must be at least 1"),
        ("a.txt", ["x"], "must end in one of .csv, .jsonl"),
    ],
)
def test_a_malformed_trace_names_file_and_line(tmp_path, name, lines, why):
    with pytest.raises(ValueError, match=why):
        list(Replay(written(tmp_path, name, *lines)))


def test_a_trace_that_is_too_short_says_so(tmp_path):
    path = written(tmp_path, "m.jsonl", line(0), line(3))
    with pytest.raises(ValueError, match="has 1 requests after the first 1, 2 needed"):
        list(Replay(path, count=2, skip=1))


# --- the users' own data sets -----------------------------------------------------------------------------------------


def test_data_sets_are_read_with_the_users_own_count_of_tokens(tmp_path):
    turns = [{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e"}, {"from": "human", "value": "f"}]
    lonely = {"conversations": turns[:1]}
    sharegpt = written(tmp_path, "s.json", json.dumps([{"conversations": turns}, lonely]))
    humaneval = written(tmp_path, "h.jsonl", json.dumps({"prompt": "a b", "canonical_solution": "c d e"}))
    longbench = written(tmp_path, "l.jsonl", json.dumps({"context": "a b", "input": "c", "answers": ["d e", "f"]}))

    def count(text):
        return len(text.split())

    assert list(read_sharegpt(sharegpt, count)) == [(3, 2)]
    assert list(read_sharegpt(sharegpt, count, longest=4)) == []
    assert list(read_humaneval(humaneval, count)) == [(2, 3)]
    assert list(read_longbench(longbench, count)) == [(3, 2)]


@pytest.mark.parametrize(
    ("read", "name", "lines", "why"),
    [
        (read_sharegpt, "s.json", ["[", "{]"], "s.json, line 2: "),
        (read_sharegpt, "s.json", ["{}"], "a list of conversations is expected"),
        (read_sharegpt, "s.json", ['[{"conversations": [{"from": "human"}]}]'], "s.json, conversation 0: "),
        (read_sharegpt, "s.json", ["[", b'"\xff"]'], "s.json, line 2: invalid start byte in UTF-8"),
        (
            read_sharegpt,
            "s.json",
            ['[{"conversations": [{"from": "human", "value": null}]}]'],
            "s.json, conversation 0: the value of a turn must be a text",
        ),
        (read_humaneval, "h.jsonl", [b'{"prompt": "\xff"}'], "h.jsonl, line 1: invalid start byte in UTF-8"),
        (read_humaneval, "h.jsonl", ['{"prompt": "a"}'], "h.jsonl, line 1: canonical_solution is missing"),
        (read_longbench, "l.jsonl", ["", "{"], "l.jsonl, line 2: "),
        (read_longbench, "l.jsonl", ['{"context": "", "input": "", "answers": []}'], "line 1: answers must begin"),
    ],
)
def test_malformed_data_sets_name_file_and_line(tmp_path, read, name, lines, why):
    with pytest.raises(ValueError, match=why):
        list(read(written(tmp_path, name, *lines), len))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: poisson(0.0, 3), "rate = 0.0 requests/s must be greater than 0"),
        (lambda: evenly(-1.0, 3), "rate = -1.0 requests/s must be greater than 0"),
        (lambda: gamma(1.0, 0.0), "cv = 0.0 must be greater than 0"),
        (lambda: uniform((0, 3), (1, 2), 3), r"prompt = \(0, 3\) must be a range"),
        (lambda: uniform((1, 3), (2, 1), 3), r"output = \(2, 1\) must be a range"),
        (lambda: Means(0.5, 3), "mean prompt length = 0.5 tokens must be at least 1"),
        (lambda: Means(50, 3, longest_prompt=40), "mean prompt length = 50 must be below longest_prompt = 40"),
        (lambda: Means(20, 3, prompt_cv=1, longest_prompt=40), "prompt_cv = 1 must be below 1 for"),
        (lambda: Empirical([]), "no lengths were given"),
        (lambda: workload("sharegpt"), "workload 'sharegpt' needs a rate"),
        (lambda: workload("sharegtp", rate=1.0), "workload 'sharegtp' is none of sharegpt, humaneval"),
        (lambda: workload("12/x", rate=1.0), "workload '12/x'"),
        (lambda: workload("sharegpt", rate=-1.0), "rate = -1.0"),
        (lambda: mix([], rate=1.0), "has no class of requests"),
        (lambda: mix([RequestClass("a", SHAREGPT, share=0)], rate=1.0), r"shares \(0,\) must be 1 numbers"),
        (lambda: mix([RequestClass("a", SHAREGPT)], rate=1.0, phases=[Phase(0, (1,))]), "duration_s = 0 must be"),
    ],
)
def test_nonsense_is_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()
