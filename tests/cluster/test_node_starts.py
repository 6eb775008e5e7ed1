"""Each node is started once; one that cannot be is told of, and tried again after a while."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from phi_cluster.cluster.cluster_news import ClusterNews
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.node_starts import NodeStarts
from phi_cluster.cluster.served_model import ServedModel


class Fixture:
    def __init__(self, *ends: StartError | None):
        self.now = 0.0
        self.asked: list[str] = []
        self.may_end = asyncio.Event()
        self._ends = list(ends)
        self.news = ClusterNews(0)
        self.starts = NodeStarts(
            cast(ServedModel, None), Config(), self.news, self._start, here=lambda: "head", clock=lambda: self.now
        )

    async def _start(self, node_id: str, source: str, served: ServedModel, config: Config) -> list[str]:
        assert source == "head"
        self.asked.append(node_id)
        await self.may_end.wait()
        if error := self._ends.pop(0):
            raise error
        return []

    async def told(self) -> list[tuple[str, Any]]:
        self.may_end.set()
        await asyncio.sleep(0.01)
        self.news.look("head", [])
        page = await self.news.page(0, 100, None, 0.0)
        return [(one["kind"], one["reason"]) for one in page.events if one["kind"].startswith("node")]


async def test_a_node_that_has_joined_is_started_once() -> None:
    fixture = Fixture(None)
    for _ in range(3):
        fixture.starts.wanted("abc")
        fixture.starts.wanted("head")
        await asyncio.sleep(0)
    assert await fixture.told() == [("node_joined", "abc")]
    assert fixture.asked == ["abc"]


async def test_what_kept_a_node_from_starting_is_told_and_tried_again_later() -> None:
    fixture = Fixture(StartError("too little memory"), None)
    fixture.starts.wanted("abc")
    assert await fixture.told() == [("node_refused", "abc: too little memory")]
    fixture.now = 9.0
    fixture.starts.wanted("abc")
    fixture.now = 10.0
    fixture.starts.wanted("abc")
    assert (await fixture.told())[1:] == [("node_joined", "abc")]
    assert fixture.asked == ["abc", "abc"]
