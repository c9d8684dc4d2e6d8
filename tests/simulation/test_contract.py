"""The contract finds each kind of mistake, in the smallest case of it."""

from __future__ import annotations

import pytest

from ds_jax.protocol import (
    Arrived,
    Copy,
    CopyDone,
    Decode,
    Instance,
    InstanceUp,
    Place,
    Prefill,
    Reject,
    Request,
    Role,
    Run,
    Step,
    StepDone,
    Stopped,
)
from ds_jax.simulation import Contract, Violation

FOUR = Prefill(0, 0, 4, True, (0, 1))
COPY = Copy(0, 0, Place(0, 0), Place(1, 0), ((0, 5), (1, 6)))


@pytest.fixture
def contract() -> Contract:
    """Sequence 0 of 4 + 8 tokens and sequence 1 of 3 + 1 on one prefill and one decode instance; two tokens a page."""
    contract = Contract()
    up = [
        InstanceUp(Instance(0, Role.PREFILL, 0, 8, 2, max_step_tokens=6, max_step_sequences=2)),
        InstanceUp(Instance(1, Role.DECODE, 0, 8, 2, slots=2)),
    ]
    for event in [*up, Arrived(Request(0, 4, 8)), Arrived(Request(1, 3, 1))]:
        contract.hear(event, [], 0)
    return contract


def run(contract, *work, id=0, instance=0, lane=0):
    prefills = tuple(one for one in work if isinstance(one, Prefill))
    decodes = tuple(one for one in work if isinstance(one, Decode))
    contract.hear(Stopped(999, ""), [Run(Step(id, instance, 0, lane, prefills, decodes))], 0)


def decoding(contract) -> None:
    """Sequence 0 on the decode instance, its pages 5 and 6."""
    run(contract, FOUR)
    contract.hear(StepDone(0, {0: 1}), [COPY], 0)
    contract.hear(CopyDone(0, True), [], 0)


def test_a_whole_life_is_in_order(contract):
    decoding(contract)
    for id, pages in ((1, (7,)), (2, ())):
        run(contract, Decode(0, 1, pages), id=id, instance=1)
    contract.hear(StepDone(1, {0: 1}), [Run(Step(3, 1, 0, 0, (), (Decode(0, 1, (3,)),)))], 0)
    contract.hear(Stopped(0, "stop"), [], 0)
    assert [sequence.id for sequence in contract.living()] == [1]
    contract.hear(StepDone(2), [], 0)
    contract.hear(StepDone(3), [], 0)
    assert contract.quiet(contract.lives[1]) and not contract.accounted(contract.lives[1])


@pytest.mark.parametrize(
    ("work", "why"),
    [
        ([Prefill(0, 1, 3, True, (0, 1))], "has no pages on instance 0"),
        ([Prefill(0, 0, 5, True, (0, 1, 2))], "not inside the 4 tokens that are known"),
        ([Prefill(0, 0, 3, True, (0, 1))], "must sample exactly when it reaches token 4"),
        ([Prefill(0, 0, 4, False, (0, 1))], "must sample exactly when it reaches token 4"),
        ([Prefill(0, 0, 4, True, (0,))], "4 tokens of sequence 0 in 1 pages"),
        ([Prefill(0, 0, 4, True, (0, 0))], "given twice"),
        ([Prefill(0, 0, 4, True, (0, 8))], "page 8 of a pool of 8"),
        ([Prefill(5, 0, 4, True, (0, 1))], "sequence 5 never arrived"),
        ([FOUR, Prefill(1, 0, 3, True, (2, 3))], "more than 6 prompt tokens"),
        ([FOUR, FOUR], "none twice"),
        ([], "at least one sequence"),
        ([Decode(0, 0)], "decodes on a prefill instance"),
        ([FOUR, Prefill(1, 0, 3, True, (1, 2))], "more than 6"),
        ([Prefill(0, 0, 3, False, (0, 1)), Prefill(1, 0, 3, True, (1, 2))], None),
        ([FOUR, Prefill(1, 4, 0, True)], "does not follow a sequence of the same request"),
    ],
)
def test_a_wrong_prefill_is_found(contract, work, why):
    if why is None:  # page 1 changes hands before it was ever used: allowed, and fatal to sequence 0's next chunk
        run(contract, *work)
        contract.hear(StepDone(0, {1: 1}), [], 0)
        why, work = "cannot be used: page 1 was given to sequence 1", [Prefill(0, 3, 1, True)]
    with pytest.raises(Violation, match=why):
        run(contract, *work, id=1)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        ([Decode(0, 0)], "5 tokens of sequence 0 in 2 pages"),
        ([Decode(0, 2, (7,))], "slots must be distinct and below 2"),
        ([Decode(0, 0, (5,))], "given twice"),
        ([Decode(1, 0, (5,))], "sequence 1 has no pages on instance 1"),
        ([Prefill(1, 0, 3, True, (0, 1))], "prefills on a decode instance"),
    ],
)
def test_a_wrong_decode_is_found(contract, work, why):
    decoding(contract)
    with pytest.raises(Violation, match=why):
        run(contract, *work, id=1, instance=1)


def test_a_token_in_flight_can_only_be_fed_in_its_own_slot(contract):
    decoding(contract)
    run(contract, Decode(0, 0, (7,)), id=1, instance=1)
    with pytest.raises(Violation, match="in flight elsewhere"):
        run(contract, Decode(0, 1), id=2, instance=1)


def test_a_page_in_flight_cannot_be_given_away(contract):
    run(contract, FOUR)
    with pytest.raises(Violation, match="page 1 is given away while something in flight names it"):
        run(contract, Prefill(1, 0, 3, True, (1, 2)), id=1)


def test_source_pages_are_in_flight_until_the_copy_has_landed(contract):
    run(contract, FOUR)
    contract.hear(StepDone(0, {0: 1}), [COPY], 0)
    contract.hear(Stopped(0, "abort"), [], 0)
    with pytest.raises(Violation, match="page 0 is given away"):
        run(contract, Prefill(1, 0, 3, True, (0, 1)), id=1)
    contract.hear(CopyDone(0, False), [], 0)


@pytest.mark.parametrize(
    ("pages", "why"),
    [(((1, 5), (0, 6)), "in this order"), (((0, 5),), "2 tokens, of 4 planned"), (((0, 5), (1, 5)), "given twice")],
)
def test_a_wrong_copy_is_found(contract, pages, why):
    run(contract, FOUR)
    with pytest.raises(Violation, match=why):
        contract.hear(StepDone(0, {0: 1}), [Copy(0, 0, Place(0, 0), Place(1, 0), pages)], 0)


def test_pages_are_copied_only_when_they_are_written(contract):
    run(contract, FOUR)
    with pytest.raises(Violation, match="4 planned and 0 written"):
        contract.hear(Stopped(999, ""), [COPY], 0)


def test_a_decode_waits_for_its_copy(contract):
    run(contract, FOUR)
    contract.hear(StepDone(0, {0: 1}), [COPY], 0)
    with pytest.raises(Violation, match="before its pages have landed"):
        run(contract, Decode(0, 0, (7,)), id=1, instance=1)


def test_pages_of_a_failed_copy_cannot_be_used(contract):
    run(contract, FOUR)
    contract.hear(StepDone(0, {0: 1}), [COPY], 0)
    contract.hear(CopyDone(0, False), [], 0)
    with pytest.raises(Violation, match="copy 0 into it failed"):
        run(contract, Decode(0, 0, (7,)), id=1, instance=1)


def test_what_is_over_gets_no_more_steps(contract):
    contract.hear(Stopped(0, "abort"), [], 0)
    with pytest.raises(Violation, match="sequence 0 is over"):
        run(contract, FOUR)
    with pytest.raises(Violation, match="over already"):
        contract.hear(Stopped(999, ""), [Reject(0, "no")], 0)


def test_tokens_beyond_max_tokens_are_found(contract):
    contract.sequences[0].request = Request(0, 4, 2)
    decoding(contract)
    run(contract, Decode(0, 0, (7,)), id=1, instance=1)
    with pytest.raises(Violation, match="beyond max_tokens = 2"):
        run(contract, Decode(0, 0), id=2, instance=1)


def test_a_clock_that_goes_back_is_found(contract):
    contract.hear(Stopped(999, ""), [], 10)
    with pytest.raises(Violation, match="clock went back"):
        contract.hear(Stopped(999, ""), [], 9)


def test_an_executor_that_tells_steps_out_of_order_is_found(contract):
    run(contract, FOUR)
    run(contract, Prefill(1, 0, 3, True, (2, 3)), id=1)
    with pytest.raises(Violation, match="step 0 is ahead of it"):
        contract.hear(StepDone(1, {1: 1}), [], 0)
