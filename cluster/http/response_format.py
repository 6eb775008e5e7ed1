"""A response as OpenAI's JSON, whole and as the events of a stream.

Owns: both shapes, and the events' numbers. Knows nothing of how a response is made, read or sent.

A response has the same events whenever and wherever it is read, because they follow from how it began, from the pieces
of its text and from how it ended: so whoever reads on behind a number gets exactly the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from phi_cluster.cluster.response_api import Response, ResponseStatus, ResponseUsage, output_item
from phi_cluster.cluster.turn_api import ReplyPiece

_LAST_EVENTS: dict[str, str] = {"completed": "response.completed", "failed": "response.failed"}


def response_json(response: Response) -> dict[str, Any]:
    """OpenAI's response object."""
    asked, usage, fault = response.asked, response.usage, response.fault
    is_cut = response.status == "incomplete"
    ended_at = None if response.ended_at is None else int(response.ended_at)
    return {
        "id": response.id,
        "object": "response",
        "created_at": int(response.created_at),
        "completed_at": ended_at if response.status == "completed" else None,
        "status": response.status,
        "background": asked.background,
        "conversation": None if asked.conversation_id is None else {"id": asked.conversation_id},
        "error": None if fault is None else {"code": fault.kind, "message": fault.message},
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": response.output(),
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": asked.store,
        "tools": [],
        "top_logprobs": 0,
        "usage": None if usage is None else _usage(usage),
        **asked.settings,
    }


class ResponseEvents:
    """The events of one response, in order. `number` is the next one's."""

    def __init__(self, response: Response):
        """`response` as it stands at any time."""
        self._response = replace(response, pieces=(), usage=None, fault=None, ended_at=None)
        self._item_id = output_item(response.asked, "", "in_progress")["id"]
        self._has_item = False
        self.number = 0

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before anything is said."""
        first: ResponseStatus = "queued" if self._response.asked.background else "in_progress"
        yield self._event("response.created", response=response_json(replace(self._response, status=first)))
        status: ResponseStatus = "in_progress"
        yield self._event("response.in_progress", response=response_json(replace(self._response, status=status)))

    def said(self, pieces: tuple[ReplyPiece, ...]) -> Iterator[dict[str, Any]]:
        """More pieces of the text."""
        yield from self._item()
        for piece in pieces:
            yield self._text_event("delta", delta=piece)

    def closing(self, response: Response) -> Iterator[dict[str, Any]]:
        """How it ended. All of its pieces have been said."""
        for item in response.output():
            yield from self._item()
            yield self._text_event("done", text=response.text)
            part = item["content"][0]
            yield self._event("response.content_part.done", **self._place(), part=part)
            yield self._event("response.output_item.done", output_index=0, item=item)
        # There is no event of its own for what was cancelled: its status tells.
        kind = _LAST_EVENTS.get(response.status, "response.incomplete")
        yield self._event(kind, response=response_json(response))

    def error(self, message: str, code: str | None, param: str | None) -> dict[str, Any]:
        """The stream cannot go on, whatever becomes of the response."""
        return self._event("error", code=code, message=message, param=param)

    def _item(self) -> Iterator[dict[str, Any]]:
        """The message begins with its first piece, or with its end if nothing is said."""
        if not self._has_item:
            self._has_item = True
            item = output_item(self._response.asked, "", "in_progress")
            yield self._event("response.output_item.added", output_index=0, item={**item, "content": []})
            yield self._event("response.content_part.added", **self._place(), part=item["content"][0])

    def _text_event(self, what: str, **fields: Any) -> dict[str, Any]:
        return self._event(f"response.output_text.{what}", **self._place(), logprobs=[], **fields)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return event


def _usage(usage: ResponseUsage) -> dict[str, Any]:
    num_prompt, num_cached = usage.num_prompt_tokens, usage.num_cached_tokens
    return {
        "input_tokens": num_prompt,
        # What was computed is in the session's cache from now on.
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_prompt - num_cached},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + usage.num_completion_tokens,
    }
