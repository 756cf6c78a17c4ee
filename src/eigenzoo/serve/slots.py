"""Which slot each model has, and which slots requests still use."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from eigenzoo.errors import UsageError
from eigenzoo.serve.route import BASE, BASE_SLOT
from eigenzoo.weights.renames import nearest


@dataclass(eq=False)
class Ticket:
    """A model's slot for one request. The slot keeps its numbers until `release`, also if the model is removed or replaced.

    Attributes:
        name: the model's name when the request began.
        slot: its slot.
    """

    name: str
    slot: int
    table: SlotTable

    def release(self) -> None:
        """Let the slot be used again once no other request has it. A second call does nothing."""
        self.table.release(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()


class SlotTable:
    """Slots by the names of models. All methods may be called by several threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._slots = {name: slot for slot, name in enumerate(names, BASE_SLOT + 1)}
        self._free: list[int] = []
        self._num_slots = len(names) + 1
        self._users: Counter[int] = Counter()
        self._tickets: set[Ticket] = set()
        self._gone: set[int] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models, without the base."""
        with self._lock:
            return tuple(self._slots)

    @property
    def num_slots(self) -> int:
        """Number of slots, also of free ones and the base's."""
        return self._num_slots

    def acquire(self, name: str) -> Ticket:
        """Return a model's slot for a request. Raises UsageError for an unknown name, with the nearest ones."""
        with self._lock:
            slot = BASE_SLOT if name == BASE else self._slots.get(name)
            if slot is None:
                raise UsageError(*self._unknown(name), next_step=self._hint(name))
            ticket = Ticket(name, slot, self)
            self._tickets.add(ticket)
            self._users[slot] += 1
            return ticket

    def release(self, ticket: Ticket) -> None:
        """See `Ticket.release`."""
        with self._lock:
            if ticket not in self._tickets:
                return
            self._tickets.remove(ticket)
            self._users[ticket.slot] -= 1
            self._recycle(ticket.slot)

    def reserve(self, more: int) -> tuple[int, int | None]:
        """Return a free slot, and the number of slots to grow to first if there was none; `more` are added then."""
        with self._lock:
            if self._free:
                return self._free.pop(), None
            slot = self._num_slots
            self._num_slots += more
            self._free.extend(range(self._num_slots - 1, slot, -1))
            return slot, self._num_slots

    def give(self, name: str, slot: int) -> None:
        """Give a model its slot. The slot that it had becomes free when no request uses it."""
        with self._lock:
            before = self._slots.get(name)
            self._slots[name] = slot
            if before is not None:
                self._leave(before)

    def remove(self, name: str) -> None:
        """Take a model's name away. Raises UsageError for an unknown one."""
        with self._lock:
            if name not in self._slots:
                raise UsageError(*self._unknown(name), next_step=self._hint(name))
            self._leave(self._slots.pop(name))

    def _leave(self, slot: int) -> None:
        self._gone.add(slot)
        self._recycle(slot)

    def _recycle(self, slot: int) -> None:
        if slot in self._gone and not self._users[slot]:
            self._gone.remove(slot)
            del self._users[slot]
            self._free.append(slot)

    def _unknown(self, name: str) -> tuple[str]:
        return (f"no model is called {name!r}",)

    def _hint(self, name: str) -> str:
        known = {other.casefold(): other for other in [*self._slots, BASE]}
        near = nearest(name.casefold(), known, cutoff=0.6)
        if near is not None:
            return f"did you mean {known[near]!r}?"
        listed = ", ".join(list(self._slots)[:5])
        return f"the {len(self._slots)} models are {listed}{', …' if len(self._slots) > 5 else ''}"
