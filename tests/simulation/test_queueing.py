"""The simulator against queueing theory: one prefill server, uniform prompts, one prompt a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_jax.protocol import Instance, Role
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.workload import evenly, fixed, poisson, submissions

SERVICE_NS = 10_000_000
LATENCY = LinearLatency(prefill_base_ns=2_000_000, prefill_token_ns=8_000)
PROMPT = 1000  # 2 ms + 1000 x 8 us = 10 ms
SERVER = Instance(0, Role.PREFILL, 0, 10**6, 16, max_step_tokens=PROMPT, max_step_sequences=1, saturation_tokens=1)


def ttfts_ns(arrivals_ns: list[int], server: Instance = SERVER, latency: LinearLatency = LATENCY) -> list[int]:
    requests = submissions(arrivals_ns, fixed(PROMPT, 1, len(arrivals_ns)))
    times = simulate(Disaggregated(), [server], requests, latency).times
    return [times[id].ttft_ns or 0 for id in range(len(arrivals_ns))]


@pytest.mark.parametrize("load", [0.3, 0.9, 1.2])
def test_every_ttft_follows_the_lindley_recursion(load):
    arrivals_ns = list(poisson(load * 1e9 / SERVICE_NS, 2000))
    wait_ns = 0
    expected = [SERVICE_NS]
    for before_ns, at_ns in zip(arrivals_ns, arrivals_ns[1:], strict=False):
        wait_ns = max(0, wait_ns + SERVICE_NS - (at_ns - before_ns))
        expected.append(wait_ns + SERVICE_NS)
    assert ttfts_ns(arrivals_ns) == expected


def test_the_mean_ttft_is_that_of_an_m_d_1_queue():
    rate, service_s = 60.0, SERVICE_NS / 1e9
    ttfts = ttfts_ns(list(poisson(rate, 20_000, seed=1)))
    expected_s = service_s + rate * service_s**2 / (2 * (1 - rate * service_s))  # DistServe, section 3.1, equation 1
    assert sum(ttfts) / len(ttfts) / 1e9 == pytest.approx(expected_s, rel=0.03)


def test_nobody_waits_when_arrivals_are_further_apart_than_a_step():
    assert set(ttfts_ns(list(evenly(99.0, 500)))) == {SERVICE_NS}


@pytest.mark.parametrize("load", [0.5, 1.9])
def test_a_pipeline_of_two_stages_is_a_server_of_half_the_service_time_and_half_more(load):
    """`load` in units of what one stage alone could serve: two stages serve twice that."""
    arrivals_ns = list(poisson(load * 1e9 / SERVICE_NS, 1500, seed=2))
    half_ns, free_ns, expected = SERVICE_NS // 2, 0, []
    for at_ns in arrivals_ns:
        free_ns = max(free_ns, at_ns) + half_ns
        expected.append(free_ns + half_ns - at_ns)
    assert ttfts_ns(arrivals_ns, replace(SERVER, lanes=2)) == expected


def test_the_mean_ttft_of_a_two_way_pipeline_is_that_of_the_paper():
    rate, service_s = 120.0, SERVICE_NS / 1e9
    ttfts = ttfts_ns(list(poisson(rate, 8_000, seed=3)), replace(SERVER, lanes=2))
    expected_s = service_s + rate * service_s**2 / (4 * (2 - rate * service_s))  # section 3.1, equation 2
    assert sum(ttfts) / len(ttfts) / 1e9 == pytest.approx(expected_s, rel=0.05)


def test_the_mean_ttft_of_two_way_tensor_parallelism_is_that_of_the_paper():
    rate, service_s, speedup = 100.0, SERVICE_NS / 1e9, 1.6
    faster = LinearLatency(
        prefill_base_ns=LATENCY.prefill_base_ns / speedup, prefill_token_ns=LATENCY.prefill_token_ns / speedup
    )
    ttfts = ttfts_ns(list(poisson(rate, 8_000, seed=4)), latency=faster)
    waiting_s = rate * service_s**2 / (2 * speedup * (speedup - rate * service_s))  # section 3.1, equation 3
    assert sum(ttfts) / len(ttfts) / 1e9 == pytest.approx(service_s / speedup + waiting_s, rel=0.05)
