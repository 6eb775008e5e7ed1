"""From a frame to a sequence in the engine: its grammar compiled, its segment mapped, its ids in it.

Owns: that way, and the answers to those that cannot go it. Knows nothing of sockets, steps, Ray, text or who owns a
session.
"""

from __future__ import annotations

from typing import Protocol

import torch

from phi_cluster.cluster.engine.device_kv import DeviceCaches, DeviceKV
from phi_cluster.cluster.engine.grammar_queue import GrammarQueue, GrammarSource
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import ReplyMatcher, Sequence
from phi_cluster.cluster.frames import AddSequence, SequenceOutput
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.cluster.session.segment import SegmentGone
from phi_cluster.model.sampling_params import SamplingParams


class Engine(Protocol):
    """Of the engine, what is needed here."""

    def add(self, sequence: Sequence) -> None: ...

    def abort(self, sequence_id: int) -> None: ...


class Intake:
    """For the engine's thread, which may wait for `sources` to become readable and then calls `take_compiled`.

    Without `grammars` sequences that follow one are refused.
    """

    def __init__(
        self,
        engine: Engine,
        served: ServedModel,
        dtype: torch.dtype,
        device_caches: DeviceCaches | None = None,
        grammars: GrammarSource | None = None,
    ):
        self._engine = engine
        self._served = served
        self._dtype = dtype
        self._device_caches = device_caches
        self._compiling = None if grammars is None else GrammarQueue(grammars)
        self._answers: list[SequenceOutput] = []

    @property
    def sources(self) -> list[GrammarQueue]:
        return [] if self._compiling is None else [self._compiling]

    @property
    def has_answers(self) -> bool:
        return bool(self._answers)

    def add(self, frame: AddSequence) -> None:
        """At once, or when its grammar is there."""
        if frame.sampling.get("grammar") is None:
            self._add(frame, None)
        elif self._compiling is None:
            self._refuse(frame, "bad_grammar", "this engine follows no grammars")
        else:
            self._compiling.submit(frame)

    def abort(self, sequence_id: int) -> None:
        if self._compiling is not None and self._compiling.cancel(sequence_id):
            self._answers.append(SequenceOutput(sequence_id, [], "abort", released=True))
        else:
            self._engine.abort(sequence_id)

    def take_compiled(self) -> None:
        """Adds those whose grammars are there."""
        if self._compiling is None:
            return
        for frame, result in self._compiling.take():
            if isinstance(result, Exception):
                self._refuse(frame, "bad_grammar", str(result))
            else:
                self._add(frame, result)

    def take_answers(self) -> list[SequenceOutput]:
        """To those that the engine will never have."""
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        if self._compiling is not None:
            self._compiling.close()

    def _add(self, frame: AddSequence, matcher: ReplyMatcher | None) -> None:
        try:
            self._engine.add(self._open(frame, matcher))
        except (OSError, ValueError) as error:
            self._refuse(frame, "gone" if isinstance(error, SegmentGone) else "error", str(error))

    def _refuse(self, frame: AddSequence, reason: str, why: str) -> None:
        self._answers.append(SequenceOutput(frame.sequence_id, [], reason, released=True, error=why))

    def _open(self, frame: AddSequence, matcher: ReplyMatcher | None) -> Sequence:
        """Maps the segment and makes it hold the sequence's ids: what it holds of them keeps its keys and values.

        Raises SegmentGone (OSError), and ValueError for ids or numbers that cannot be.
        """
        params = SamplingParams.from_dict(frame.sampling)
        kv = self._open_kv(frame)
        try:
            token_ids = splice(kv, frame.num_kept_tokens, frame.token_ids)
            return Sequence(
                sequence_id=frame.sequence_id,
                kv=kv,
                token_ids=token_ids,
                num_prompt_tokens=frame.num_prompt_tokens,
                params=params,
                max_num_tokens=frame.max_num_tokens,
                matcher=matcher,
                request_id=frame.request_id,
            )
        except BaseException:
            kv.close()
            raise

    def _open_kv(self, frame: AddSequence) -> SegmentKV:
        served = self._served
        if self._device_caches is not None:
            # Keys and values are not in segments: each sequence computes its own.
            return DeviceKV(frame.segment, served.layout, served.fingerprint, self._device_caches, frame.epoch)
        return SegmentKV(frame.segment, served.layout, served.fingerprint, self._dtype, frame.epoch, frame.shared)
