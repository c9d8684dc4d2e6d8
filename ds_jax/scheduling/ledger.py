"""The page ledger of one instance: who holds which KV pages, and what in flight still needs them.

Pages are held through a `Lease`: one sequence's pages on one instance, in order of position. A step or copy in flight
pins the leases that it names. The pages of a lease go back to the free list when nobody holds it and nothing pins it,
so that a page can never be handed out while a device may still read or write it.

Pins are kept per lease and not per page, so that pinning a sequence costs the same for ten tokens as for ten thousand.
A lease lives while it is held or pinned, a page is free when no living lease contains it, and leases of sequences with
the same prompt may share its pages (copy on write: a page that will be written to again is never shared).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ds_jax.protocol import pages_for


class Lease:
    """One sequence's pages on one instance, in order of position."""

    __slots__ = ("held", "leaving", "ledger", "pages", "pins")

    def __init__(self, pages: list[int], ledger: PageLedger):
        self.pages = pages
        self.ledger = ledger
        self.leaving = 0
        """Pages that come free with it, once it is dropped and only pinned."""
        self.held = True
        self.pins = 0


class PageLedger:
    """Ask with `can_take`, act with `take`, `grow`, `drop`, `pin`, `unpin`."""

    def __init__(self, pages: int, page_size: int):
        self.pages = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        self._leases: set[Lease] = set()
        self._shares: dict[int, int] = {}
        """References beyond the first, of pages in more than one lease. The rest need no count: so that taking and
        giving back many pages runs at the speed of list slices."""
        self._leaving = 0
        self.promised = 0
        """Pages that running sequences wait for: they come before whatever asks `can_take`."""

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    @property
    def leaving(self) -> int:
        """Pages that nobody holds any more and that come free when what pins them is done."""
        return self._leaving

    def can_take(self, tokens: int, shared: int = 0) -> bool:
        """Whether pages for `tokens` tokens are free, `shared` of them not counted, and those that are promised."""
        return pages_for(tokens, self.page_size) - shared + self.promised <= len(self._free)

    def take(self, tokens: int, shared: Sequence[int] = ()) -> Lease:
        """Lease the pages for `tokens` tokens, the first of them `shared` with a living lease; `can_take` must hold."""
        pages = self._pop(pages_for(tokens, self.page_size) - len(shared))
        if shared:
            for page in shared:
                self._shares[page] = self._shares.get(page, 0) + 1
            pages = [*shared, *pages]
        lease = Lease(pages, self)
        self._leases.add(lease)
        return lease

    def grow(self, lease: Lease, pages: int) -> tuple[int, ...]:
        """Add `pages` pages to a lease; returns the new ones."""
        assert lease.held, "only a held lease grows"
        new = self._pop(pages)
        lease.pages += new
        return tuple(new)

    def grow_each(self, leases: dict[int, Lease]) -> dict[int, tuple[int, ...]]:
        """`grow` each by one page: what happens at every decode step; so many must be free."""
        grown: dict[int, tuple[int, ...]] = {}
        free = self._free
        for id, lease in leases.items():
            page = free.pop()
            lease.pages.append(page)
            grown[id] = (page,)
        return grown

    def drop(self, lease: Lease) -> None:
        """The sequence lets go of its pages."""
        assert lease.held, "a lease is dropped once"
        lease.held = False
        if lease.pins:
            lease.leaving = len(lease.pages)
            if self._shares:
                lease.leaving -= sum(page in self._shares for page in lease.pages)
            self._leaving += lease.leaving
        else:
            self._reclaim(lease)

    def pin(self, lease: Lease) -> None:
        """A step or copy that names the lease is in flight."""
        lease.pins += 1

    def unpin(self, lease: Lease) -> None:
        """That step or copy is done."""
        lease.pins -= 1
        if not lease.pins and not lease.held:
            self._leaving -= lease.leaving
            self._reclaim(lease)

    def shared(self, page: int) -> bool:
        """Whether more than one living lease contains the page."""
        return page in self._shares

    def references(self, page: int) -> int:
        """Living leases that contain the page. Looks through all of them: for tests."""
        return sum(page in lease.pages for lease in self._leases)

    def check(self) -> None:
        """Recount everything.

        Raises:
            AssertionError: the accounts do not balance.
        """
        counts = Counter(page for lease in self._leases for page in lease.pages)
        assert all(lease.held or lease.pins > 0 for lease in self._leases), "a lease lives without holder or pin"
        assert all(lease.pins >= 0 for lease in self._leases), "a lease was unpinned too often"
        assert all(len(set(lease.pages)) == len(lease.pages) for lease in self._leases), "a lease has a page twice"
        shares = {page: count - 1 for page, count in counts.items() if count > 1}
        assert self._shares == shares, "counts of shared pages are off"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not counts.keys() & set(self._free), "a leased page is free"
        assert len(self._free) + len(counts) == self.pages, "a page is neither free nor leased"
        assert self._leaving == sum(lease.leaving for lease in self._leases if not lease.held), "leaving is off"

    def _pop(self, pages: int) -> list[int]:
        assert pages <= len(self._free), f"{pages} pages asked for, {len(self._free)} are free"
        if not pages:
            return []
        new = self._free[-pages:][::-1]
        del self._free[-pages:]
        return new

    def _reclaim(self, lease: Lease) -> None:
        self._leases.remove(lease)
        if not self._shares:
            self._free += reversed(lease.pages)
            return
        for page in reversed(lease.pages):
            if page not in self._shares:
                self._free.append(page)
            elif self._shares[page] > 1:
                self._shares[page] -= 1
            else:
                del self._shares[page]
