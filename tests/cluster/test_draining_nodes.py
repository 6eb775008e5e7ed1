"""A node that drains is asked to send its sessions away, until none is left; one that stays after all is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phi_cluster.cluster.cluster_news import ClusterNews
from phi_cluster.cluster.draining_nodes import DrainingNodes
from phi_cluster.cluster.session.evacuation import Evacuation


class Keeper:
    """Of the node that drains; `ends` are what its rounds bring, one after the other."""

    def __init__(self, *ends: Evacuation):
        self.targets: list[Sequence[str]] = []
        self._ends = list(ends)
        self.third = asyncio.Event()
        self.evacuate = self

    async def remote(self, targets: Sequence[str], seconds: float) -> Evacuation:
        self.targets.append(targets)
        if not self._ends:
            self.third.set()
            await asyncio.Event().wait()
        return self._ends.pop(0)


async def events(news: ClusterNews) -> list[str]:
    news.look("head", [])
    return [one["kind"] for one in (await news.page(0, 100, None, 0.0)).events]


async def test_a_node_is_empty_once_a_round_has_left_nothing() -> None:
    news, keeper = ClusterNews(0), Keeper(Evacuation(3, 0, 1), Evacuation(1, 0, 0))
    drains = DrainingNodes(news, {"a": keeper}.__getitem__, again_seconds=0.0)
    drains.look(["a"], ["b", "c"])
    drains.look(["a"], ["b", "c"])
    assert not drains.is_empty("a")
    await keeper.third.wait()
    assert drains.is_empty("a")
    assert keeper.targets == [["b", "c"]] * 3
    assert (await events(news)).count("node_draining") == 1
    drains.look([], ["a", "b", "c"])
    assert not drains.is_empty("a")


async def test_one_without_a_keeper_is_not_taken_for_empty() -> None:
    def none(node_id: str) -> Keeper:
        raise ValueError(node_id)

    drains = DrainingNodes(ClusterNews(0), none)
    drains.look(["a"], ["b"])
    await asyncio.sleep(0.01)
    assert not drains.is_empty("a")
    drains.look([], [])
