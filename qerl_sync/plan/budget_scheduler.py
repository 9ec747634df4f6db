"""Follow a source within a byte capacity: the algorithm of `within_budget`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from math import inf


class Groups:
    """The tensors of a stream by what must be whole before their memory is free: a parent layer, or
    several that share tensors. Groups go by number, tensors by their place in the source.

    Attributes:
        of: the group of each tensor; None: no layer waits for it.
        weights: the bytes that each tensor adds to what its group pins.
        nbytes: the bytes that are sent for each tensor.
        ranked: the tensors, group by group, in the source's order within each.
        start, end: of each group in `ranked`.
        totals: the most bytes that each group pins. Where a group is of several layers these may be
            fewer than its weights, of which some are free again before the last has come.
    """

    def __init__(
        self, of: Sequence[int | None], weights: Sequence[int], nbytes: Sequence[int], count: int
    ) -> None:
        self.of = of
        self.weights = weights
        self.nbytes = nbytes
        members: list[list[int]] = [[] for _ in range(count)]
        self.totals = [0] * count
        for place, (group, weight) in enumerate(zip(of, weights, strict=True)):
            if group is not None:
                members[group].append(place)
                self.totals[group] += weight
        self.ranked = [place for places in members for place in places]
        self.end: list[int] = []
        for places in members:
            self.end.append(len(places) + (self.end[-1] if self.end else 0))
        self.start = [0, *self.end[:-1]]

    def places(self, group: int) -> list[int]:
        return self.ranked[self.start[group] : self.end[group]]


class BudgetScheduler:
    """Follows the source within `capacity` bytes.

    At each moment the rest can be delivered: it can if the open groups can be completed one after
    the other, the one that lacks the fewest bytes first, each finding what it lacks in what is
    available by then (the safe state of the banker's algorithm).

    Attributes:
        next: of each group, where its first tensor that is not delivered stands in `ranked`.
        held: the bytes that each group pins now.
        open: (bytes that it lacks, group) of each open group, ascending.
        slack: a lower bound of what each of them finds beyond what it lacks. A tensor that is
            handed over lowers it by its weight at most, a group that is completed never does;
            so the open groups are looked at only when it is used up.
        run_bytes: bytes sent, or still to be sent for open groups, since none was open.
    """

    def __init__(self, groups: Groups, capacity: int, chunk_bytes: float = inf) -> None:
        self.groups = groups
        self.capacity = self.available = capacity
        self.chunk_bytes = chunk_bytes
        self.next = list(groups.start)
        self.held = [0] * len(groups.totals)
        self.open: list[tuple[int, int]] = []
        self.slack: float = inf
        self.run_bytes = 0
        self.sent = bytearray(len(groups.of))
        self.order: list[int] = []

    def follow(self, stream: Iterable[int]) -> list[int]:
        """Return the tensors in `stream`, which are in the source's order, in that of delivery."""
        of = self.groups.of
        for place in stream:
            group = of[place]
            if group is None:
                self._begin(self.groups.nbytes[place])
                self.order.append(place)
            elif not self.sent[place]:
                if self.chunk_bytes < inf and self.next[group] == self.groups.start[group]:
                    self._begin(sum(self.groups.nbytes[p] for p in self.groups.places(group)))
                self._reach(place, group)
        return self.order

    def _begin(self, nbytes: int) -> None:
        """Begin `nbytes` that are sent together; complete what is open first if the run would
        become longer than a chunk, which can be cut only where no group is open."""
        if self.open and self.run_bytes + nbytes > self.chunk_bytes:
            while self.open:
                self._complete(self.open[0][1])
        self.run_bytes = nbytes + (self.run_bytes if self.open else 0)

    def _reach(self, place: int, group: int) -> None:
        """Hand over the tensor at `place`, the next of `group`; before it what must come first."""
        while (slack := self._slack_with_next(group)) < 0:
            self._complete(self.open[0][1])  # it lacks the fewest bytes: there is room for it
            if self.sent[place]:
                return
        if self._closes_next(group):
            self._complete(group)
        else:
            self._forget(group)  # it stands elsewhere among the open ones afterwards
            weight = self.groups.weights[place]
            self.order.append(place)
            self.next[group] += 1
            self.held[group] += weight
            self.available -= weight
            insort(self.open, (self._lacks(group), group))
        self.slack = slack

    def _closes_next(self, group: int) -> bool:
        return self.next[group] == self.groups.end[group] - 1

    def _lacks(self, group: int) -> int:
        return self.groups.totals[group] - self.held[group]

    def _slack_with_next(self, group: int) -> float:
        """Return `slack` after the group's next tensor; negative: it must not be handed over."""
        groups = self.groups
        if self._closes_next(group):
            return self.slack if self._lacks(group) <= self.available else -1
        room = self.capacity - groups.totals[group]
        if not self.open or (len(self.open) == 1 and self.open[0][1] == group):
            return room  # no other group is in its way
        weight = groups.weights[groups.ranked[self.next[group]]]
        bound = min(self.slack, room) - weight
        return bound if bound >= 0 else self._exact_slack_with(group, weight)

    def _exact_slack_with(self, group: int, weight: int) -> float:
        slack: float = inf
        lacks, available = self._lacks(group) - weight, self.available - weight
        most = max(lacks, self.open[-1][0] if self.open else 0)
        at = bisect_left(self.open, (lacks, group))
        for lacking, number in chain(
            islice(self.open, at), [(lacks, group)], islice(self.open, at, None)
        ):
            if number == group and lacking > lacks:
                continue  # where the group stands before the tensor
            slack = min(slack, available - lacking)
            available += self.held[number] + (weight if number == group else 0)
            if slack < 0:
                break
            if available >= most:  # none of the rest lacks more: each of them finds enough
                return min(slack, available - most)
        return slack

    def _complete(self, group: int) -> None:
        groups = self.groups
        self._forget(group)
        outstanding = groups.ranked[self.next[group] : groups.end[group]]
        self.order += outstanding
        for place in outstanding:
            self.sent[place] = True
        self.next[group] = groups.end[group]
        self.available += self.held[group]
        self.held[group] = 0

    def _forget(self, group: int) -> None:
        if self.next[group] > self.groups.start[group]:
            del self.open[bisect_left(self.open, (self._lacks(group), group))]
