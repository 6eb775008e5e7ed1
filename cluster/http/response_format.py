"""A response as OpenAI's JSON, whole and as the events of a stream.

Owns: both shapes, and the events' numbers. Knows nothing of how a response is made, read or sent.

A response has the same events whenever and wherever it is read, because they follow from how it began, from the pieces
of its text and from how it ended: so whoever reads on behind a number gets exactly the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from phi_cluster.cluster.response_api import Item, Response, ResponseStatus, ResponseUsage
from phi_cluster.cluster.response_items import call_item, message_item, output_items, piece_logprobs
from phi_cluster.cluster.turn_api import CallPiece, ReplyPiece, piece_text

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
        # What has been said of the item that comes: it has begun with the first of them.
        self._pieces: list[ReplyPiece] = []
        self._item_id = ""
        self._index = 0
        self.number = 0

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before anything is said."""
        first: ResponseStatus = "queued" if self._response.asked.background else "in_progress"
        yield self._event("response.created", response=response_json(replace(self._response, status=first)))
        status: ResponseStatus = "in_progress"
        yield self._event("response.in_progress", response=response_json(replace(self._response, status=status)))

    def said(self, pieces: tuple[ReplyPiece, ...]) -> Iterator[dict[str, Any]]:
        """More pieces of the reply."""
        for piece in pieces:
            if self._pieces and isinstance(piece, CallPiece) and piece.name is not None:
                yield from self._end(self._item("completed"))
            if not self._pieces:
                yield from self._begin(piece)
            self._pieces.append(piece)
            if not isinstance(piece, CallPiece):
                place, logprobs = self._part_place(), piece_logprobs(piece)
                yield self._event("response.output_text.delta", **place, logprobs=logprobs, delta=piece_text(piece))
            elif piece.arguments:
                place = self._item_place()
                yield self._event("response.function_call_arguments.delta", **place, delta=piece.arguments)

    def closing(self, response: Response) -> Iterator[dict[str, Any]]:
        """How it ended. All of its pieces have been said."""
        items = response.output()
        if items:
            if not self._pieces:
                # Nothing is said: the message begins with its end.
                yield from self._begin("")
                self._pieces.append("")
            yield from self._end(items[-1])
        # There is no event of its own for what was cancelled: its status tells.
        kind = _LAST_EVENTS.get(response.status, "response.incomplete")
        yield self._event(kind, response=response_json(response))

    def error(self, message: str, code: str | None, param: str | None) -> dict[str, Any]:
        """The stream cannot go on, whatever becomes of the response."""
        return self._event("error", code=code, message=message, param=param)

    def _begin(self, piece: ReplyPiece) -> Iterator[dict[str, Any]]:
        request_id = self._response.asked.request_id
        if isinstance(piece, CallPiece):
            item = call_item(request_id, piece.number, piece.name or "", "", "in_progress")
            self._item_id = item["id"]
            yield self._event("response.output_item.added", output_index=self._index, item=item)
            return
        item = message_item(request_id, "", "in_progress")
        self._item_id = item["id"]
        yield self._event("response.output_item.added", output_index=self._index, item={**item, "content": []})
        yield self._event("response.content_part.added", **self._part_place(), part=item["content"][0])

    def _end(self, item: Item) -> Iterator[dict[str, Any]]:
        if item["type"] == "message":
            part = item["content"][0]
            done = {"logprobs": part["logprobs"], "text": part["text"]}
            yield self._event("response.output_text.done", **self._part_place(), **done)
            yield self._event("response.content_part.done", **self._part_place(), part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._item_place(), **done)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._pieces.clear()
        self._index += 1

    def _item(self, status: str) -> Item:
        """The one that comes, as far as it has come."""
        first = self._pieces[0]
        request_id = self._response.asked.request_id
        if not isinstance(first, CallPiece):
            return output_items(request_id, self._pieces, status)[-1]
        arguments = "".join(piece.arguments for piece in self._pieces if isinstance(piece, CallPiece))
        return call_item(request_id, first.number, first.name or "", arguments, status)

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": self._index}

    def _part_place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}

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
