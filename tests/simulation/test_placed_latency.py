"""Copies over links, and steps of placed instances."""

from __future__ import annotations

import pytest

from ds_jax.latency import LatencyProfile
from ds_jax.protocol import Copy, Decode, Medium, Place, Prefill, Step
from ds_jax.simulation import Links, PlacedLatency

PAGE = 1_000_000.0
LINKS = Links(bytes_per_s=1e9, network_bytes_per_s=0.5e9, host_bytes_per_s=0.25e9, latency_s=0.001)
MS = 1_000_000


class Steps:
    stages = 1

    def step_s(self, chunks, batch, context_tokens):
        return 0.001 * sum(length for _, length in chunks) + 0.01 * batch + 1e-5 * context_tokens


def _copy(id: int, source: int, destination: int, pages: int, to: Medium = Medium.DEVICE) -> Copy:
    pairs = tuple((page, page) for page in range(pages))
    return Copy(id, id, Place(source, 0), Place(destination, 0, to), pairs)


def _latency(**arguments) -> PlacedLatency:
    return PlacedLatency(dict.fromkeys(range(4), Steps()), LINKS, PAGE, **arguments)


def test_a_copy_takes_its_bytes_over_the_bandwidth_and_a_latency():
    assert _latency().copy_ns(_copy(0, 0, 1, 50), now_ns=0) == 51 * MS


def test_copies_out_of_one_instance_wait_for_each_other_and_others_do_not():
    latency = _latency()
    assert latency.copy_ns(_copy(0, 0, 1, 50), now_ns=0) == 51 * MS
    assert latency.copy_ns(_copy(1, 0, 2, 50), now_ns=10 * MS) == (50 + 50 - 10 + 1) * MS
    assert latency.copy_ns(_copy(2, 3, 1, 50), now_ns=60 * MS) == 51 * MS  # the link into 1 is free again


def test_every_gpu_of_an_instance_has_a_link_of_its_own():
    """KV of an instance of 4 GPUs goes to one of 2: two links work side by side."""
    assert _latency(gpus={0: 4, 1: 2}).copy_ns(_copy(0, 0, 1, 50), now_ns=0) == 26 * MS


def test_all_instances_of_a_node_share_its_network():
    latency = _latency(nodes={0: 0, 1: 0, 2: 1, 3: 1}, gpus=dict.fromkeys(range(4), 8))
    assert latency.copy_ns(_copy(0, 0, 2, 50), now_ns=0) == 101 * MS
    assert latency.copy_ns(_copy(1, 1, 3, 50), now_ns=0) == 201 * MS
    assert latency.copy_ns(_copy(2, 3, 1, 50), now_ns=0) == 101 * MS  # the other direction


def test_a_swap_goes_over_the_link_to_the_host():
    assert _latency().copy_ns(_copy(0, 0, 0, 50, Medium.HOST), now_ns=0) == 201 * MS


def test_a_step_takes_what_its_instance_says_and_the_hosts_overhead():
    latency = _latency(host_overhead_s=0.002, host_overhead_per_context_token_s=1e-6)
    mixed = Step(0, 1, 0, 0, (Prefill(7, 100, 20, True),), (Decode(8, 0), Decode(9, 1)))
    assert latency.step_ns(mixed, 1000) == pytest.approx((0.02 + 0.02 + 0.01 + 0.002 + 0.001) * 1e9)


def test_a_copy_over_a_link_without_bandwidth_is_refused_by_name():
    latency = PlacedLatency(dict.fromkeys(range(2), Steps()), Links(1e9), PAGE, nodes={0: 0, 1: 1})
    with pytest.raises(ValueError, match="instance 0 to instance 1 runs over node out at 0 bytes/s, which must be"):
        latency.copy_ns(_copy(0, 0, 1, 1), now_ns=0)


def test_links_are_those_of_the_profile_where_it_was_measured():
    profile = LatencyProfile("d", "m", "bfloat16", {}, copy_bytes_per_s=5e9, copy_latency_s=0.25)
    assert Links.of(profile, 1e9, network_bytes_per_s=2e9) == Links(5e9, 2e9, 32e9, 0.25)
    assert Links.of(LatencyProfile("d", "m", "bfloat16", {}, host_bytes_per_s=3e9), 1e9) == Links(1e9, 0.0, 3e9)
