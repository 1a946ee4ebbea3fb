"""Rectangles of matrices from the processes that hold them to those that update them, and back, within a replica."""

from __future__ import annotations

import datetime
import itertools
from typing import Sequence

import torch
import torch.distributed as dist

import lowband
from lowband._pieces import Rectangle, Team

Held = Sequence[Rectangle]  # of one matrix, by process of the team


class Moves:
    """Of some matrices: `held` as the program cuts them, several processes perhaps the same rectangle, `updated` as lowband
    does. Processes of `group` send to each other, within the team; a wait takes at most `deadline_seconds`.

    Collective: the processes of the team, in `gather` and `scatter`.
    """

    def __init__(self, team: Team, group: dist.ProcessGroup, deadline_seconds: float, held: Sequence[Held],
                 updated: Sequence[Held]) -> None:
        self._group, self._ranks, self._deadline = group, team.ranks, datetime.timedelta(seconds=deadline_seconds)
        self._own = own = team.ranks.index(dist.get_rank())
        self._held, self._updated = ([of_each[own] for of_each in layout] for layout in (held, updated))
        sources = [_sources(of_each) for of_each in held]
        peers = range(len(team.ranks))

        def common(i: int, j: int, only_from_source: bool) -> list[Rectangle]:
            """What process i holds and process j updates, by matrix."""
            return [one[i].intersection(other[j]) if i in source[j] or not only_from_source else Rectangle(0, 0, 0, 0)
                    for one, other, source in zip(held, updated, sources)]

        self._gathered = [[common(own, peer, True) for peer in peers], [common(peer, own, True) for peer in peers]]
        self._returned = [[common(peer, own, False) for peer in peers], [common(own, peer, False) for peer in peers]]

    def gather(self, held: Sequence[torch.Tensor], updated: Sequence[torch.Tensor]) -> None:
        """updated <- held. Several tensors of each matrix may be given one after the other, of all matrices each time."""
        self._move(self._gathered, held, self._held, updated, self._updated)

    def scatter(self, updated: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> None:
        """held <- updated."""
        self._move(self._returned, updated, self._updated, held, self._held)

    def _move(self, route: list[list[list[Rectangle]]], sent: Sequence[torch.Tensor], of_sent: Held,
              received: Sequence[torch.Tensor], of_received: Held) -> None:
        sends, receives = ([[part.of(tensor, whole) for part, tensor, whole in
                             zip(itertools.cycle(parts), tensors, itertools.cycle(wholes)) if part.elements > 0]
                            for parts in by_peer]
                           for by_peer, tensors, wholes in ((route[0], sent, of_sent), (route[1], received, of_received)))
        for view, own in zip(receives[self._own], sends[self._own]):
            view.copy_(own)
        packed = [torch.cat([view.reshape(-1) for view in views]) if views else None for views in sends]
        arriving = [views[0].new_empty(sum(view.numel() for view in views)) if views else None for views in receives]
        operations = [dist.P2POp(function, buffer, self._ranks[peer], self._group)
                      for function, buffers in ((dist.irecv, arriving), (dist.isend, packed))
                      for peer, buffer in enumerate(buffers) if buffer is not None and peer != self._own]
        try:
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait(self._deadline)
        except RuntimeError as error:
            raise lowband.PeerFailed(f"moving parameters within the replica of processes {self._ranks}: {error}") from error
        for peer, (buffer, views) in enumerate(zip(arriving, receives)):
            if peer != self._own and buffer is not None:
                for view, part in zip(views, buffer.split([view.numel() for view in views])):
                    view.copy_(part.view(view.shape))


def _sources(held: Held) -> list[set[int]]:
    """Of each process: those from which it gets what it updates. Of some that hold the same, itself, or each in its turn."""
    same: dict[Rectangle, list[int]] = {}
    for i, rectangle in enumerate(held):
        same.setdefault(rectangle, []).append(i)
    return [{j if j in holders else holders[j % len(holders)] for holders in same.values()} for j in range(len(held))]
