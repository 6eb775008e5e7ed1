"""POST /v1/completions.

Owns: the way from a completion request to a `TurnRequest`, and the JSON of its replies. Knows nothing of the
tokenizer and of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest
from phi_cluster.cluster.http.body import read_object
from phi_cluster.cluster.http.caller import RESUME_HEADER, Caller, caller_of, check_resumable
from phi_cluster.cluster.http.completion_schemas import Completion, CompletionRequest
from phi_cluster.cluster.http.edge import Edge, EdgeSettings
from phi_cluster.cluster.http.logprob_format import completion_logprobs
from phi_cluster.cluster.http.models import check_model
from phi_cluster.cluster.http.openapi import generation_docs
from phi_cluster.cluster.http.schemas import check_choices, check_token_ids, sampling_of
from phi_cluster.cluster.http.strict_model import validated
from phi_cluster.cluster.http.turn_response import SaidChoice, TurnResponse
from phi_cluster.cluster.turn_api import CallPiece, Endpoint, FinishReason, TokenLogprob, TurnRequest


def completions_router(edge: Edge) -> APIRouter:
    """The endpoint, over `edge`."""
    router = APIRouter()
    settings = edge.settings

    @router.post("/v1/completions", tags=["completions"], **generation_docs(CompletionRequest, Completion, Completion))
    async def create_completion(request: Request) -> Response:
        """Text that continues the prompt."""
        caller = caller_of(request)
        completion = validated(CompletionRequest, await read_object(request, settings))
        check_model(completion.model, settings)
        check_resumable(caller, completion.num_logprobs)
        check_choices(completion, caller, settings, "n" if completion.best_of is None else "best_of")
        _check_one_turn(completion, caller)
        reply = CompletionReply.begin(caller, edge, tells_logprobs=completion.num_logprobs is not None)
        return TurnResponse(
            edge,
            caller,
            _turns(completion, caller, settings),
            reply,
            stream=completion.stream,
            include_usage=completion.include_usage,
            continuous_usage=completion.continuous_usage,
            data_only=completion.data_only,
            pick=_pick_of(completion),
        )

    return router


def _check_one_turn(completion: CompletionRequest, caller: Caller) -> None:
    """Several prompts are several turns. Raises `InvalidRequest` where there can be one only."""
    if len(completion.prompt) > 1 and (caller.session_id is not None or caller.resume_from is not None):
        what = "a session" if caller.resume_from is None else RESUME_HEADER
        raise InvalidRequest(f"prompt: several prompts do not go with {what}; send one", param="prompt")
    if completion.echo and caller.resume_from is not None:
        raise InvalidRequest(f"echo does not go with {RESUME_HEADER}: the prompt was told already", param="echo")


def _turns(completion: CompletionRequest, caller: Caller, settings: EdgeSettings) -> list[TurnRequest]:
    """One for each prompt."""
    sampling = sampling_of(completion, settings)
    if _picks(completion) and sampling["logprobs"] is None:
        sampling["logprobs"] = 0
    return [
        TurnRequest(
            tenant=caller.tenant,
            session_id=caller.session_id,
            # The first as if it were alone.
            request_id=caller.request_id if place == 0 else f"{caller.request_id}-{place}",
            resume_from=caller.resume_from,
            sampling=sampling,
            prompt=_checked_prompt(prompt, settings),
            stop=tuple(completion.stop),
            wanted_format=completion.wanted_format,
            num_choices=completion.num_choices,
            echo=completion.echo,
            traceparent=caller.traceparent,
        )
        for place, prompt in enumerate(completion.prompt)
    ]


def _picks(completion: CompletionRequest) -> bool:
    return completion.num_choices > (completion.n or 1)


def _pick_of(completion: CompletionRequest) -> Callable[[Sequence[SaidChoice]], list[SaidChoice]] | None:
    """Of each prompt's replies the n whose tokens are likeliest on average, likeliest first; None: all are told."""
    if not _picks(completion):
        return None
    made, told = completion.num_choices, completion.n or 1

    def pick(said: Sequence[SaidChoice]) -> list[SaidChoice]:
        groups = [said[first : first + made] for first in range(0, len(said), made)]
        return [one for group in groups for one in sorted(group, key=_mean_logprob, reverse=True)[:told]]

    return pick


def _mean_logprob(one: SaidChoice) -> float:
    """A reply without text comes last: nothing is known of it."""
    known = [token.logprob for token in one.logprobs if token.logprob is not None]
    return fmean(known) if known else -math.inf


def _checked_prompt(prompt: str | list[int], settings: EdgeSettings) -> str | list[int]:
    """Token ids must exist and leave room for a reply; text is counted further down, by the tokenizer."""
    if isinstance(prompt, list):
        check_token_ids("prompt", prompt, settings.vocab_size)
        excess = len(prompt) + 1 - settings.max_model_len
        if excess > 0:
            raise ContextOverflow(
                f"prompt: the model's context length is {settings.max_model_len} tokens, a prompt of "
                f"{len(prompt)} tokens and a reply of at least one do not fit ({excess} too many)",
                param="prompt",
            )
    return prompt


@dataclass
class _Total:
    total: int = 0


@dataclass(frozen=True)
class CompletionReply:
    """A `ReplyFormat`: OpenAI's text_completion, whole and in chunks."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None
    # False: they were asked for to pick from several replies.
    tells_logprobs: bool
    index: int = 0
    endpoint: Endpoint = "completions"
    # How many characters have been told, for the offsets of the next tokens.
    _num_chars: _Total = field(default_factory=_Total)

    @classmethod
    def begin(cls, caller: Caller, edge: Edge, *, tells_logprobs: bool) -> CompletionReply:
        settings = edge.settings
        return cls(
            id=f"cmpl-{caller.request_id}",
            created=int(edge.clock.time()),
            model=settings.served_model_names[0],
            system_fingerprint=settings.system_fingerprint,
            tells_logprobs=tells_logprobs,
        )

    def of_choice(self, index: int) -> CompletionReply:
        return replace(self, index=index, _num_chars=_Total())

    def opening(self) -> None:
        return None

    def delta(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, calls: Sequence[CallPiece] = ()
    ) -> dict[str, Any]:
        return self._completion([self._choice(text, None, logprobs)])

    def closing(self, finish_reason: FinishReason) -> dict[str, Any]:
        return self._completion([self._choice("", finish_reason)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._completion([]), "usage": usage}

    def whole(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: FinishReason,
        usage: dict[str, Any],
        calls: Sequence[CallPiece] = (),
    ) -> dict[str, Any]:
        return {**self._completion([self._choice(text, finish_reason, logprobs)]), "usage": usage}

    def _choice(
        self,
        text: str,
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        told = None
        if logprobs is not None and self.tells_logprobs:
            told = completion_logprobs(logprobs, self._num_chars.total)
            self._num_chars.total += sum(map(len, told["tokens"]))
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": finish_reason}

    def _completion(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }
