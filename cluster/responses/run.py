"""One response that is being made here: its turn, and what has come of it.

Owns: the way from a turn's events to pieces of text and an end, trying again where nobody waits, and that a response
which is made a second time says the same. Knows nothing of storage, of who reads and of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from phi_cluster.cluster.errors import (
    InvalidRequest,
    LimitReached,
    Overloaded,
    PhiError,
    ReplyGone,
    SessionBusy,
    Unavailable,
)
from phi_cluster.cluster.observation import Observation
from phi_cluster.cluster.response_api import Response, ResponseFault, ResponseStatus, ResponseUsage
from phi_cluster.cluster.responses.messages_of import messages_of
from phi_cluster.cluster.responses.store import Begun
from phi_cluster.cluster.turn_api import (
    BEGINNING,
    CallPiece,
    Clock,
    Rates,
    ReplyPiece,
    RequestObserver,
    TextDelta,
    TurnFinished,
    TurnRequest,
    TurnRunner,
    TurnStarted,
    piece_text,
)

logger = logging.getLogger(__name__)

# What may be otherwise in a while. In the background nobody waits, so it is tried again.
_PASSING = (Overloaded, Unavailable, SessionBusy)
_PATIENCE_SECONDS = 600.0
_LONGEST_PAUSE_SECONDS = 10.0


@dataclass(frozen=True)
class Tools:
    """What all runs use."""

    turns: TurnRunner
    observer: RequestObserver
    clock: Clock


class Run:
    """`go` makes the response; meanwhile `pieces` grow, and who waits in `changed` is told. Then either `response` is
    over, or `error` says what kept it from starting. For one event loop."""

    def __init__(self, tools: Tools, begun: Begun, *, is_second: bool = False):
        """`is_second`: another process began it. It has to say the same up to where that one came."""
        self._tools = tools
        self._begun = begun
        self._is_second = is_second
        self._turn: asyncio.Task[TurnFinished] | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        # It is to end.
        self.left = asyncio.Event()
        self.response = begun.response
        self.claim = begun.claim
        self.pieces: list[ReplyPiece] = list(begun.response.pieces)
        # So many of them are stored.
        self.num_saved = len(self.pieces)
        self.has_started = bool(self.pieces)
        self.error: PhiError | None = None
        # As its turn was told when it started.
        self.rates: Rates | None = None
        self.is_done = False
        # It is about to be in the store as it ended, or not at all.
        self.is_stored = False
        # Somebody else makes it by now, or it is to be gone on with later.
        self.is_given_up = False

    @property
    def name(self) -> tuple[str, str]:
        return self.response.asked.tenant, self.response.id

    def cancel(self) -> None:
        """It ends with what has been said."""
        self.left.set()
        if self._turn is not None:
            self._turn.cancel()

    def give_up(self) -> None:
        """It ends here, and is left as it is."""
        self.is_given_up = True
        self.cancel()

    async def changed(self) -> None:
        """Until something has happened."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    def tell(self) -> None:
        """Something has happened."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def go(self) -> Response | None:
        """The response when it is over; None: it never started (`error` says why, or the client left), or was given
        up."""
        asked = self.response.asked
        observation = Observation(self._tools.observer, "responses", self._tools.clock, asked.request_id)
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        while True:
            if self.left.is_set():
                observation.finish("abort")
                return self._over("cancelled") if self.has_started or asked.background else None
            self._turn = asyncio.ensure_future(self._speak(observation))
            await asyncio.wait({self._turn})
            if self._turn.cancelled():
                self.left.set()
                continue
            error = self._turn.exception()
            if error is None:
                finished = self._turn.result()
                observation.finish(finished.finish_reason)
                return self._finished(finished)
            is_patient = asked.background and asyncio.get_running_loop().time() < deadline
            if is_patient and isinstance(error, PhiError) and _passes(error):
                self._is_second = True
                pause = min(error.retry_after or 1.0, _LONGEST_PAUSE_SECONDS)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.left.wait(), pause)
                continue
            told = self._told(error)
            observation.fail(told)
            return self._failed(told)

    def end(self, response: Response | None, error: PhiError | None = None) -> None:
        """Nothing more will happen."""
        if response is not None:
            self.response = response
        self.error = error or self.error
        self.is_done = True
        self.tell()

    async def _speak(self, observation: Observation) -> TurnFinished:
        finished = None
        num_said = 0
        async with aclosing(self._tools.turns.run(self._request())) as events:
            async for event in events:
                observation.see(event)
                if isinstance(event, TextDelta):
                    for piece in event.pieces or filter(None, (event.text,)):
                        self._say(num_said, piece)
                        num_said += 1
                elif isinstance(event, TurnStarted):
                    self.has_started = True
                    self.rates = event.rates
                    self.response = replace(self.response, status="in_progress")
                elif isinstance(event, TurnFinished):
                    finished = event
                self.tell()
        if finished is None:
            raise RuntimeError("the turn ended without TurnFinished")
        if num_said < len(self.pieces):
            raise _another()
        return finished

    def _say(self, index: int, piece: ReplyPiece) -> None:
        if index == len(self.pieces):
            self.pieces.append(piece)
        elif _plain(self.pieces[index]) != _plain(piece):
            raise _another()

    def _request(self) -> TurnRequest:
        begun, asked = self._begun, self.response.asked
        return TurnRequest(
            tenant=asked.tenant,
            session_id=begun.session_id if asked.store else None,
            request_id=asked.request_id,
            sampling=asked.sampling,
            messages=messages_of(asked.settings.get("instructions"), begun.context, asked.input),
            stop=asked.stop,
            wanted_format=asked.wanted_format,
            tool_use=asked.tool_use,
            resume_from=BEGINNING if self._is_second else None,
            truncate=asked.truncate,
            cache_hint=asked.settings.get("prompt_cache_key"),
            traceparent=asked.traceparent,
        )

    def _finished(self, finished: TurnFinished) -> Response:
        usage = ResponseUsage(finished.num_prompt_tokens, finished.num_cached_tokens, finished.num_completion_tokens)
        over = self._over("incomplete" if finished.finish_reason == "length" else "completed")
        return replace(over, usage=usage)

    def _told(self, error: BaseException) -> PhiError:
        if isinstance(error, PhiError):
            return error
        logger.error("response %s failed unexpectedly", self.response.id, exc_info=error)
        return PhiError("The server failed to make this response; its id is in the server's log")

    def _failed(self, error: PhiError) -> Response | None:
        asked = self.response.asked
        if not asked.background:
            # Who waits for a whole reply, or for its first word, is told by an error.
            self.error = error
            if not self.has_started:
                return None
        return replace(self._over("failed"), fault=fault_of(error))

    def _over(self, status: ResponseStatus) -> Response:
        return replace(
            self.response, status=status, pieces=tuple(self.pieces), ended_at=float(self._tools.clock.time())
        )


def _plain(piece: ReplyPiece) -> CallPiece | str:
    """What is said: log probabilities may be computed otherwise, in the last bits, where dtypes promise no bits."""
    return piece if isinstance(piece, CallPiece) else piece_text(piece)


def _passes(error: PhiError) -> bool:
    """Whether it may be otherwise in a while, also of a key's limits: those by the minute."""
    return isinstance(error, _PASSING) or (isinstance(error, LimitReached) and error.retry_after is not None)


def fault_of(error: PhiError) -> ResponseFault:
    """As OpenAI's kinds go."""
    kind = "server_error"
    if isinstance(error, Overloaded | LimitReached):
        kind = "rate_limit_exceeded"
    elif isinstance(error, InvalidRequest):
        kind = "invalid_prompt"
    return ResponseFault(kind, error.message_told)


def _another() -> ReplyGone:
    return ReplyGone("the response was interrupted, and made again it is another one; create it anew")
