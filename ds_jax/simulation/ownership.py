"""Who holds which page: a model that trusts no scheduler's ledger."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ds_jax.protocol import Copy, Instance, Request, Step


class Violation(AssertionError):
    """The contract was broken; the message says by whom and how."""


@dataclass(eq=False, slots=True)
class Table:
    """One sequence's pages on one life of an instance, in order of position."""

    sequence: Sequence
    life: Life
    pages: list[int] = field(default_factory=list)
    planned: int = 0
    """Tokens whose KV is in the pages, or will be when what is in flight is done."""
    written: int = 0
    """Tokens whose KV is in the pages."""
    unusable: str = ""
    """Why no step or copy may name this table any more."""
    source: Table | None = None
    """Where a series of copies into this table comes from, until its last copy."""
    landing: int = 0
    """Copies into this table in flight."""

    def give(self, pages: Iterable[int], what: Step | Copy) -> None:
        """Append pages that are this table's alone; whoever held them must not use them any more."""
        life = self.life
        for page in pages:
            if not 0 <= page < life.instance.pages:
                raise Violation(f"{what}: page {page} of a pool of {life.instance.pages}")
            if life.pins[page]:
                raise Violation(f"{what}: page {page} is given away while something in flight names it")
            if self in life.holders[page]:
                raise Violation(f"{what}: page {page} is given twice to sequence {self.sequence.id}")
            for before in life.holders[page]:
                before.unusable = f"page {page} was given to sequence {self.sequence.id}"
            life.holders[page] = [self]
            self.pages.append(page)

    def join(self, pages: Iterable[int]) -> None:
        """Append pages that others hold too."""
        for page in pages:
            self.life.holders[page].append(self)
            self.pages.append(page)

    def share(self, copy: Copy) -> None:
        """Begin with pages that another sequence of the request has here: full of the prompt, and landed."""
        request = self.sequence.request
        for index, page in enumerate(copy.shared):
            if (index + 1) * self.life.instance.page_size > request.prompt_tokens:
                raise Violation(f"{copy}: page {page} is not full of the prompt, it will be written")
            if not any(held.lends(request, index, page) for held in self.life.holders[page]):
                raise Violation(f"{copy}: no sequence of the same request has page {page} as its page {index}")
        self.join(copy.shared)

    def lends(self, request: Request, index: int, page: int) -> bool:
        usable = not self.unusable and not self.landing
        return usable and self.sequence.request is request and self.pages[index] == page


@dataclass(eq=False, slots=True)
class Life:
    """One epoch of an instance, with the pages of its devices; those of its host memory are a `Life` without lanes."""

    instance: Instance
    holders: list[list[Table]]
    """Of each page."""
    pins: list[int]
    lanes: list[deque[Step]]
    tables: set[Table] = field(default_factory=set)
    decodes: dict[int, Step] = field(default_factory=dict)
    """By lane: the last step that has decodes."""


@dataclass(eq=False, slots=True)
class Sequence:
    """What has been done of a sequence, and what is in flight."""

    id: int
    request: Request
    confirmed: int = 0
    """Output tokens that were kept."""
    sampling: int = 0
    """Output tokens that steps in flight will sample."""
    steps: list[int] = field(default_factory=list)
    """Steps in flight that name it, in the order of their commands."""
    last: tuple[Life, int, int] | None = None
    """Life, lane and slot (-1 for a prefill) of the step that sampled or will sample its newest token."""
    over: bool = False
    """It has ended, and the scheduler knows."""
    tables: dict[Life, Table] = field(default_factory=dict)
    """Its page table in each pool of pages."""

    def forget(self, why: str) -> None:
        """Its page tables are void."""
        for table in self.tables.values():
            table.unusable = why
            table.life.tables.discard(table)
        self.tables.clear()
