"""An engine is ready once it has made a step, and as long as it makes one now and then."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from phi_cluster.cluster.engine_health import START_SECONDS, EngineHealth
from phi_cluster.cluster.frames import StepFrame


@dataclass
class Engines:
    """Of EngineClient, what is asked."""

    ready: bool = True
    replacements: int = 0
    last_step: StepFrame = field(default_factory=lambda: StepFrame(0, [], 0, 0))

    def step(self, number: int) -> None:
        self.last_step = StepFrame(number, [], 0, 0)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engines() -> Any:
    return Engines()


@pytest.fixture
def started() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def health(engines: Any, started: asyncio.Event, clock: Clock) -> EngineHealth:
    return EngineHealth(engines, started, clock)


def test_it_is_ready_once_it_has_made_a_step(health: EngineHealth, engines: Any, started: asyncio.Event) -> None:
    assert health.ready() == (False, "the engine is starting")
    assert not started.is_set()
    engines.step(1)
    assert health.ready() == (True, "ready")
    assert started.is_set()
    engines.ready = False
    assert health.ready() == (False, "the engine is starting")


def test_without_steps_it_is_first_not_ready_then_not_alive(health: EngineHealth, engines: Any, clock: Clock) -> None:
    engines.step(1)
    assert health.ready()[0]
    clock.now += 14
    assert health.ready()[0]
    clock.now += 2
    assert health.ready() == (False, "the engine has made no step for 16 s")
    assert health.live()
    clock.now += START_SECONDS
    assert not health.live()
    engines.step(2)
    assert health.live()
    assert health.ready()[0]


def test_the_first_step_of_another_engine_is_a_step(health: EngineHealth, engines: Any, clock: Clock) -> None:
    engines.step(1)
    assert health.silence() == 0
    clock.now += 20
    assert health.silence() == 20
    engines.replacements += 1
    assert health.silence() == 0
