"""The page ledger against a model that counts page by page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_jax.scheduling.ledger import Lease, PageLedger

PAGES, PAGE_SIZE = 8, 4


def test_pages_are_taken_in_order_of_position_and_come_back():
    ledger = PageLedger(PAGES, PAGE_SIZE)
    lease = ledger.take(9)
    assert len(lease.pages) == 3 and ledger.free == PAGES - 3
    before = list(lease.pages)
    assert lease.pages == [*before, *ledger.grow(lease, 1)]
    ledger.drop(lease)
    assert ledger.free == PAGES


def test_a_pinned_page_is_not_free_until_the_last_pin_is_gone():
    ledger = PageLedger(PAGES, PAGE_SIZE)
    lease = ledger.take(PAGES * PAGE_SIZE)
    ledger.pin(lease)
    ledger.pin(lease)
    ledger.drop(lease)
    assert (ledger.free, ledger.leaving) == (0, PAGES)
    ledger.unpin(lease)
    assert not ledger.can_take(1)
    ledger.unpin(lease)
    assert (ledger.free, ledger.leaving) == (PAGES, 0)


def test_a_lease_is_dropped_once_and_does_not_grow_afterwards():
    ledger = PageLedger(PAGES, PAGE_SIZE)
    lease = ledger.take(1)
    ledger.drop(lease)
    for act in (lambda: ledger.drop(lease), lambda: ledger.grow(lease, 1)):
        with pytest.raises(AssertionError):
            act()


def test_more_than_is_free_cannot_be_taken():
    ledger = PageLedger(PAGES, PAGE_SIZE)
    assert ledger.can_take(PAGES * PAGE_SIZE) and not ledger.can_take(PAGES * PAGE_SIZE + 1)
    with pytest.raises(AssertionError, match="9 pages asked for, 8 are free"):
        ledger.take(PAGES * PAGE_SIZE + 1)


@given(st.lists(st.tuples(st.sampled_from(("take", "share", "grow", "drop", "pin", "unpin")), st.integers(0, 40))))
def test_references_are_the_leases_that_live_and_a_page_without_any_is_free(operations):
    ledger = PageLedger(PAGES, PAGE_SIZE)
    leases: list[Lease] = []
    for operation, number in operations:
        leases = [lease for lease in leases if lease.held or lease.pins]
        lease = leases[number % len(leases)] if leases else None
        if operation == "take" and ledger.can_take(number):
            leases.append(ledger.take(number))
        elif lease is not None and operation == "share":
            shared = lease.pages[: number % (len(lease.pages) + 1)]
            tokens = len(shared) * PAGE_SIZE + number % 5
            if ledger.can_take(tokens, len(shared)):
                leases.append(ledger.take(tokens, shared))
        elif lease is not None and operation == "grow" and lease.held and ledger.free:
            ledger.grow(lease, 1)
        elif lease is not None and operation == "drop" and lease.held:
            ledger.drop(lease)
        elif lease is not None and operation == "pin":
            ledger.pin(lease)
        elif lease is not None and operation == "unpin" and lease.pins:
            ledger.unpin(lease)
        ledger.check()
        living = [lease for lease in leases if lease.held or lease.pins]
        counts = [sum(page in lease.pages for lease in living) for page in range(PAGES)]
        assert [ledger.references(page) for page in range(PAGES)] == counts
        assert ledger.free == counts.count(0) and ledger.used == PAGES - ledger.free
