"""An engine's socket from the replica's side: signs of life while it stands by, rests, computes, and hangs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from phi_cluster.cluster.engine.heartbeat import FrameSender
from phi_cluster.cluster.engine.intake import Intake
from phi_cluster.cluster.engine.server import EngineServer
from phi_cluster.cluster.frames import (
    AbortSequence,
    AddSequence,
    ExtendSequence,
    Frame,
    Heartbeat,
    SequenceOutput,
    StepDown,
    StepFrame,
    StepWork,
    TakeOver,
    decode_frame,
    encode_frame,
)
from phi_cluster.cluster.messages import SegmentRef

# Only a hang ends in it.
PATIENCE = 10.0


class FakeEngine:
    """Has as many steps to do as it was extended by. While `may_step` is not set a step does not end."""

    def __init__(self) -> None:
        self.step_count = 0
        self.num_running = 1
        self.num_waiting = 0
        self.queue_seconds = 0.25
        self.last_work = StepWork(1, 1, 0.5)
        self.last_preempted = (5,)
        self.num_preemptions = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.progress = 100
        self.may_step = threading.Event()
        self.may_step.set()
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return self._steps > 0

    def add(self, sequence: Any) -> None:
        raise ValueError("not here")

    def abort(self, sequence_id: int) -> None:
        self._steps += 1

    def extend(self, sequence_id: int, max_num_tokens: int) -> None:
        self._steps += max_num_tokens

    def step(self) -> list[SequenceOutput]:
        assert self.may_step.wait(PATIENCE)
        self._steps -= 1
        self.step_count += 1
        return [SequenceOutput(1, [self.step_count])]


class Replica:
    """The other end of an engine's socket."""

    def __init__(self, folder: Path, *, grammars: Any = None, **options: Any):
        self.engine = FakeEngine()
        self.self_tests = 0
        self.gone = threading.Event()
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE)
        self._received = b""
        server = EngineServer(
            cast(Any, self.engine),
            Intake(self.engine, cast(Any, None), torch.float32, None, grammars),
            str(folder / "engine.sock"),
            self._self_test,
            lambda: self.engine.progress,
            **({"heartbeat_seconds": 0.01} | options),
        )
        server._listener.close()

        def run() -> None:
            with theirs, contextlib.suppress(ConnectionError):
                server.serve(theirs, self.gone.set)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def _self_test(self) -> None:
        self.self_tests += 1

    def send(self, frame: Frame) -> None:
        self.socket.sendall(encode_frame(frame))

    def read(self) -> Frame:
        while len(self._received) < 4 or len(self._received) < 4 + int.from_bytes(self._received[:4], "big"):
            data = self.socket.recv(2**16)
            assert data, "the engine has closed"
            self._received += data
        end = 4 + int.from_bytes(self._received[:4], "big")
        frame, self._received = self._received[4:end], self._received[end:]
        return decode_frame(frame)

    def next(self, kind: type[Any], check: Callable[[Any], bool] = lambda frame: True) -> Any:
        """The next frame of a kind for which `check` is true; others are passed over."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            frame = self.read()
            if isinstance(frame, kind) and check(frame):
                return frame
        raise AssertionError(f"no such {kind.__name__} in time")

    def close(self) -> None:
        self.engine.may_step.set()
        self.socket.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def connect(**options: Any) -> Replica:
        made.append(Replica(tmp_path, **options))
        return made[-1]

    yield connect
    for replica in made:
        replica.close()


def test_an_engine_that_stands_by_beats_and_does_nothing_else(connect: Callable[..., Replica]) -> None:
    replica = connect(idle_step_seconds=0.02)
    assert [replica.read() for _ in range(10)] == [Heartbeat(101, False)] * 10
    assert replica.self_tests == 0


def test_it_takes_over_when_it_is_told_and_then_steps_also_when_idle(connect: Callable[..., Replica]) -> None:
    replica = connect(idle_step_seconds=0.05)
    replica.send(TakeOver())
    # At once, and it has computed before.
    frame = replica.next(StepFrame)
    assert (frame.step, frame.outputs, replica.self_tests) == (1, [], 0)
    assert [replica.next(StepFrame).step for _ in range(3)] == [2, 3, 4]
    assert replica.self_tests >= 3


def test_work_that_comes_with_the_take_over_is_done_first(connect: Callable[..., Replica]) -> None:
    replica = connect()
    replica.socket.sendall(encode_frame(TakeOver()) + encode_frame(ExtendSequence(1, 2)))
    frames = [replica.next(StepFrame), replica.next(StepFrame)]
    assert [frame.outputs for frame in frames] == [[SequenceOutput(1, [1])], [SequenceOutput(1, [2])]]
    assert [frame.step for frame in frames] == [2, 3]


def test_it_beats_in_the_middle_of_a_step_and_tells_how_far_it_is(connect: Callable[..., Replica]) -> None:
    replica = connect()
    replica.engine.may_step.clear()
    replica.send(TakeOver())
    replica.next(StepFrame)
    replica.send(ExtendSequence(1, 1))
    assert replica.next(Heartbeat, lambda beat: beat.busy).progress == 101
    replica.engine.progress += 7
    assert replica.next(Heartbeat, lambda beat: beat.progress == 108).busy
    # It does not get on, and says so.
    assert [replica.read() for _ in range(5)] == [Heartbeat(108, True)] * 5
    replica.engine.may_step.set()
    assert replica.next(StepFrame).outputs == [SequenceOutput(1, [1])]
    assert replica.next(Heartbeat, lambda beat: not beat.busy).progress == 109


def test_a_step_that_never_ends_does_not_outlive_its_replica(connect: Callable[..., Replica]) -> None:
    replica = connect()
    replica.engine.may_step.clear()
    replica.send(ExtendSequence(1, 1))
    replica.next(Heartbeat, lambda beat: beat.busy)
    replica.socket.close()
    assert replica.gone.wait(PATIENCE)


def test_frames_of_two_threads_never_run_into_each_other() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Much smaller than a frame: each is sent in pieces.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sender = FrameSender(ours)
        frames = [StepFrame(n, [SequenceOutput(n, list(range(5000)))], 1, 0) for n in range(50)]
        threads = [
            threading.Thread(target=lambda: [sender.send(frame) for frame in frames]),
            threading.Thread(target=lambda: [sender.send(Heartbeat(n, True)) for n in range(2000)]),
        ]
        for thread in threads:
            thread.start()
        found: list[Frame] = []
        with theirs.makefile("rb") as reader:
            for _ in range(2050):
                found.append(decode_frame(reader.read(int.from_bytes(reader.read(4), "big"))))
        for thread in threads:
            thread.join()
    assert [frame for frame in found if isinstance(frame, StepFrame)] == frames
    assert [f.progress for f in found if isinstance(f, Heartbeat)] == list(range(2000))


def test_it_steps_down_between_two_steps(connect: Callable[..., Replica]) -> None:
    """With all that the step in flight brought, and with nothing of the next."""
    replica = connect()
    replica.engine.may_step.clear()
    replica.send(TakeOver())
    replica.send(ExtendSequence(1, 5))
    replica.next(Heartbeat, lambda beat: beat.busy)
    replica.send(StepDown())
    replica.engine.may_step.set()
    assert replica.next(StepFrame, lambda frame: frame.outputs).outputs == [SequenceOutput(1, [1])]
    replica.thread.join(PATIENCE)
    assert not replica.thread.is_alive()
    assert replica.engine.step_count == 1


# Grammars.


class Grammars:
    """Compiles when it may; then says that it is wrong."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def matcher(self, grammar: str, end_ids: tuple[int, ...]) -> Any:
        assert self.may.wait(PATIENCE)
        raise ValueError(f"{grammar} is wrong")


def add_with_grammar(sequence_id: int) -> AddSequence:
    sampling = {"grammar": "this", "grammar_end_ids": [2]}
    return AddSequence(sequence_id, SegmentRef(1, 2, b""), 1, 0, [1], sampling, 10, 1)


def test_steps_go_on_while_a_grammar_is_compiled(connect: Callable[..., Replica]) -> None:
    grammars = Grammars()
    replica = connect(grammars=grammars)
    replica.send(TakeOver())
    replica.send(add_with_grammar(7))
    replica.send(ExtendSequence(1, 3))
    for step in (1, 2, 3):
        assert replica.next(StepFrame, lambda f: bool(f.outputs)).outputs == [SequenceOutput(1, [step])]
    grammars.may.set()
    refused = replica.next(StepFrame, lambda f: bool(f.outputs)).outputs
    assert refused == [SequenceOutput(7, [], "bad_grammar", released=True, error="this is wrong")]


def test_one_that_waits_for_its_grammar_can_be_aborted(connect: Callable[..., Replica]) -> None:
    grammars = Grammars()
    replica = connect(grammars=grammars)
    replica.send(TakeOver())
    replica.send(add_with_grammar(7))
    replica.send(AbortSequence(7))
    aborted = replica.next(StepFrame, lambda f: bool(f.outputs)).outputs
    assert aborted == [SequenceOutput(7, [], "abort", released=True)]
    grammars.may.set()
    replica.send(ExtendSequence(1, 1))
    assert replica.next(StepFrame, lambda f: bool(f.outputs)).outputs == [SequenceOutput(1, [1])]


def test_an_engine_without_grammars_says_so(connect: Callable[..., Replica]) -> None:
    replica = connect()
    replica.send(TakeOver())
    replica.send(add_with_grammar(7))
    [refused] = replica.next(StepFrame, lambda f: bool(f.outputs)).outputs
    assert (refused.finish_reason, refused.released) == ("bad_grammar", True)
