"""The account of a lane's decodes: against sums and minima over the whole batch, and nothing of it stays behind."""

from __future__ import annotations

import math
import random

import pytest

from ds_jax.protocol import NO_TARGET_NS, Decode, Decodes, Request, Slo
from ds_jax.scheduling.account import SPARE, Account
from ds_jax.scheduling.sequence import Sequence

TPOTS = (40, 100, NO_TARGET_NS)


class Batch:
    """A batch that says at every step who came and who left, as `RunningBatch` does."""

    def __init__(self, forgiving=False):
        self.account = Account(forgiving)
        self.sequences: dict[int, Sequence] = {}
        self.step = -1

    def enter(self, joined=(), parted=()):
        for one in joined:
            self.sequences[one.id] = one
        for id in parted:
            del self.sequences[id]
        decodes = Decodes(Decode(id, 0) for id in self.sequences)
        decodes.after = self.step if self.step >= 0 else None
        decodes.joined, decodes.parted = tuple(one.id for one in joined), tuple(parted)
        self.account.enter(decodes, self.sequences)
        self.step += 1
        self.account.launched(self.step)
        for one in self.sequences.values():
            one.counted += 1


def sequence(id, tpot_ns, first_ns, ttft_ns=10**6):
    one = Sequence(Request(id, 10 + id, 1000, slo=Slo(ttft_ns, tpot_ns)), id)
    one.first_ns, one.counted = first_ns, 1
    return one


def test_context_and_due_time_are_those_of_the_whole_batch_whoever_comes_and_goes():
    drawn, batch = random.Random(0), Batch()
    for id in range(300):
        gone = [one for one in batch.sequences if drawn.random() < 0.1]
        batch.enter([sequence(id, drawn.choice(TPOTS), drawn.randrange(1000))], gone)
        alive = batch.sequences.values()
        assert batch.account.context_tokens == sum(one.tokens - 1 for one in alive)
        due = [one.first_ns + one.request.slo.tpot_ns * (one.emitted - 1) for one in alive]
        due = [at for at, one in zip(due, alive, strict=True) if one.request.slo.tpot_ns < NO_TARGET_NS]
        assert batch.account.due_ns() == min(due, default=math.inf)


def test_nothing_stays_of_targets_that_nobody_has_any_more_and_little_of_who_has_left():
    batch = Batch()
    batch.enter([sequence(0, 40, first_ns=0)])
    for id in range(1, 500):
        batch.enter([sequence(id, 40, first_ns=1000), sequence(1000 + id, 50 + id, first_ns=0)],
                    [id - 1, 999 + id] if id > 1 else [])  # fmt: skip
    classes = batch.account._classes
    assert len(classes) == 2 and batch.account.tightest_tpot_ns() == 40
    assert all(len(equals.heap) <= 2 * equals.count + SPARE for equals in classes.values())
    batch.enter([], list(batch.sequences))
    assert not classes and batch.account.tightest_tpot_ns() == math.inf


@pytest.mark.parametrize(("forgiving", "due"), [(False, 340), (True, 1040)])
def test_who_has_missed_its_first_token_still_gets_its_time_for_each_further_one(forgiving, due):
    """A first token at 300 where 200 were promised, one token later, at 1000: strictly it is due at 340 and gets a
    share of its 40 from now on; forgiven, all of them, however much another one has banked."""
    batch = Batch(forgiving)
    batch.enter([sequence(0, 40, first_ns=300, ttft_ns=200), sequence(1, 1000, first_ns=900)])
    assert batch.account.lenient_due_ns(1000, 0.0, 0.0, 0.0) == max(1000, due)
    assert batch.account.lenient_due_ns(1000, 0.7, 0.0, 0.0) == (1040 if forgiving else 1028)
