"""An engine behind a Unix socket, for one replica.

Owns: the socket, the loop and the self-test. Knows nothing of Ray, text, HTTP, who owns a session, or how a sequence
begins (intake.py's).

One thread does everything: read frames, step, send what the step brought. When there is nothing to do it waits for
frames, and every few seconds computes one token for nothing, so that "ready" means a step was really computed lately;
as long as it only stands by, once a minute. A second thread tells the replica that the first one gets on.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phi_cluster.cluster.engine.device_kv import DeviceCaches
from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.heartbeat import HEARTBEAT_SECONDS, FrameSender, Pulse
from phi_cluster.cluster.engine.intake import Intake
from phi_cluster.cluster.engine.model_runner import Model as Network
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.settings import EngineSettings
from phi_cluster.cluster.frames import (
    AbortSequence,
    AddSequence,
    EngineTotals,
    ExtendSequence,
    Frame,
    Heartbeat,
    SequenceOutput,
    StepDown,
    StepFrame,
    TakeOver,
    decode_frame,
)
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.model.flat_weights import WeightIndex, protect_read_only, view_weights
from phi_cluster.model.grammar import Grammars
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.ops import library
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM

logger = logging.getLogger(__name__)

_IDLE_STEP_SECONDS = 3.0
_STANDBY_STEP_SECONDS = 60.0


def build_engine_server(
    served: ServedModel, settings: EngineSettings, index: dict[str, Any], buffer: NDArray[np.uint8]
) -> EngineServer:
    """Takes the weights' shared buffer as it is (zero-copy, read-only from now on), tests the network and listens.

    To be called by the thread that will run it: OpenMP keeps its number of threads, and the threads, for each caller.
    Raises RuntimeError if the self-test fails.
    """
    torch.set_num_threads(settings.num_threads)
    protect_read_only(buffer)
    weights = view_weights(buffer, WeightIndex.from_dict(index))
    kv_dtype: torch.dtype = getattr(torch, served.kv_cache_dtype)
    model: Network
    if served.dtype in ("int8", "int4"):
        model = quantized = QuantizedPhi3ForCausalLM(
            served.config,
            weights,
            served.layout.kv,
            served.kv_cache_dtype,
            served.activation_dtype,
            library.load(),
            settings.num_threads,
        )
        runner = ModelRunner(quantized, served.config, quantized.draw)
    else:
        model = Phi3ForCausalLM(served.config, weights, getattr(torch, served.dtype), settings.device)
        runner = ModelRunner(model, served.config)
    self_test = SelfTest(model, served, kv_dtype, settings.device)
    self_test()
    limits = EngineLimits(settings.max_num_seqs, settings.max_num_batched_tokens, served.max_model_len)
    engine = Engine(limits, runner, time.monotonic, settings.speculation)
    caches = None
    if settings.device != "cpu":
        caches = DeviceCaches(served.layout.kv, kv_dtype, settings.device, max_idle=settings.max_num_seqs)
    intake = Intake(engine, served, kv_dtype, caches, Grammars(served.folder, served.config.vocab_size))
    # `progress` grows with every layer.
    return EngineServer(engine, intake, settings.socket_path, self_test, lambda: int(getattr(model, "progress", 0)))


class SelfTest:
    """One token through the whole network: the same logits every time, and finite."""

    def __init__(self, model: Network, served: ServedModel, dtype: torch.dtype, device: str):
        self._model = model
        self._cache = KVCache(served.layout.kv, dtype, device=device)
        self._device = device
        self._expected: torch.Tensor | None = None

    def __call__(self) -> None:
        """Raises RuntimeError."""
        token_ids = torch.zeros(1, dtype=torch.int64, device=self._device)
        logits = self._model.forward([SequenceChunk(token_ids, 0, self._cache, False)])
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError("self-test: the network's logits are not finite; the checkpoint is damaged")
        if self._expected is None:
            self._expected = logits.clone()
        elif not torch.equal(self._expected, logits):
            raise RuntimeError("self-test: the network's logits have changed; memory or CPU is not to be trusted")


class EngineServer:
    """The engine behind a socket, for one replica. `run` returns when the replica is gone."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        socket_path: str,
        self_test: Callable[[], None],
        progress: Callable[[], int],
        *,
        idle_step_seconds: float = _IDLE_STEP_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ):
        """`self_test` has passed once already. `progress` grows within a step; any thread may ask it at any time."""
        self._engine = engine
        self._intake = intake
        self._self_test = self_test
        self._progress = progress
        self._idle_step_seconds = idle_step_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._idle_steps = 1
        self._stands_by = True
        self._steps_down = False
        # Whether it is doing anything but waiting.
        self._busy = False
        # The replica has not heard yet that it is served.
        self._unanswered = False
        self._received = bytearray()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(socket_path)
        os.chmod(socket_path, 0o600)
        self._listener.listen(1)
        self._socket_path = Path(socket_path)

    def run(self) -> None:
        """Serves until the replica's end closes; whatever goes wrong here ends the process, and the replica knows
        at once."""
        try:
            connection, _ = self._listener.accept()
            self._listener.close()
            # Nobody else is to come, and whoever ends this process may not leave it the time.
            self._socket_path.unlink(missing_ok=True)
            with connection:
                # A step that never ends must not outlive its replica either.
                self.serve(connection, on_gone=lambda: os._exit(1))
        except ConnectionError:
            # The replica is gone, and its sequences with it.
            pass
        except Exception:
            logger.exception("the engine failed")
        finally:
            self._socket_path.unlink(missing_ok=True)
            sys.stderr.flush()
            # Not sys.exit: the actor's main thread would live on with a dead engine.
            os._exit(1)

    def serve(self, connection: socket.socket, on_gone: Callable[[], None]) -> None:
        """Until the end of the connection, or ConnectionError; `on_gone`: see `Pulse`."""
        sender = FrameSender(connection)
        pulse = Pulse(sender, self._look, on_gone, self._heartbeat_seconds)
        try:
            self._serve(connection, sender)
        finally:
            pulse.stop()
            self._intake.close()

    def _serve(self, connection: socket.socket, sender: FrameSender) -> None:
        last_step = time.monotonic()
        while True:
            idle_at = last_step + (_STANDBY_STEP_SECONDS if self._stands_by else self._idle_step_seconds)
            self._busy = self._engine.has_work
            wait = 0.0 if self._busy else max(idle_at - time.monotonic(), 0.0)
            sources: list[Any] = [connection, *self._intake.sources]
            readable, _, _ = select.select(sources, [], [], wait)
            self._busy = True
            if connection in readable and not self._receive(connection):
                return
            if any(source is not connection for source in readable):
                self._intake.take_compiled()
            if self._steps_down:
                # All that was computed has been sent; the memory of the sequences stays as the last step left it.
                return
            if self._engine.has_work:
                self._send(sender, self._intake.take_answers() + self._engine.step(), has_stepped=True)
                last_step = time.monotonic()
            elif self._intake.has_answers or self._unanswered:
                self._send(sender, self._intake.take_answers())
            elif time.monotonic() >= idle_at:
                self._self_test()
                self._idle_steps += 1
                self._send(sender, [])
                last_step = time.monotonic()

    def _look(self) -> Heartbeat:
        return Heartbeat(self._progress() + self._num_steps, self._busy)

    @property
    def _num_steps(self) -> int:
        return self._engine.step_count + self._idle_steps

    def _send(self, sender: FrameSender, outputs: list[SequenceOutput], *, has_stepped: bool = False) -> None:
        self._unanswered = False
        engine = self._engine
        totals = EngineTotals(engine.num_preemptions, engine.num_draft_tokens, engine.num_accepted_tokens)
        work, preempted = (engine.last_work, engine.last_preempted) if has_stepped else (None, ())
        counts = (engine.num_running, engine.num_waiting, totals, work, engine.queue_seconds, preempted)
        sender.send(StepFrame(self._num_steps, outputs, *counts))

    def _receive(self, connection: socket.socket) -> bool:
        """Takes in what has come; False at the end of the connection."""
        data = connection.recv(2**20)
        if not data:
            return False
        self._received += data
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < end:
                break
            frame = bytes(self._received[4:end])
            del self._received[:end]
            self._handle(decode_frame(frame))
        return True

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, AddSequence):
            self._intake.add(frame)
        elif isinstance(frame, AbortSequence):
            self._intake.abort(frame.sequence_id)
        elif isinstance(frame, ExtendSequence):
            self._engine.extend(frame.sequence_id, frame.max_num_tokens)
        elif isinstance(frame, TakeOver):
            self._stands_by = False
            self._unanswered = True
        elif isinstance(frame, StepDown):
            self._steps_down = True
