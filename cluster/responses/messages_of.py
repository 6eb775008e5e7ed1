"""The prompt of a response: what was said before and what is asked now, as messages of a turn.

Owns: how items become messages, and that results of calls belong to calls. Knows nothing of sessions, templates and
storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.response_api import Item


def messages_of(instructions: str | None, context: Sequence[Item], asked: Sequence[Item]) -> list[dict[str, Any]]:
    """As `TurnRequest.messages`. Instructions stand before everything and are this response's own. Raises
    InvalidRequest for a result in what is `asked` without its call before it; in the `context` the call may have been
    deleted."""
    _check_results(context, asked)
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in (*context, *asked):
        if item["type"] == "function_call_output":
            messages.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
        elif item["type"] == "function_call":
            call = {"id": item["call_id"], "name": item["name"], "arguments": item["arguments"]}
            # What a reply says and calls is one message.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append(_message(item))
    return messages


def _message(item: Item) -> dict[str, Any]:
    """Parts are joined by line ends, as in chats. OpenAI's developer is the system's new name."""
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": "\n".join(part["text"] for part in item["content"])}


def _check_results(context: Iterable[Item], asked: Iterable[Item]) -> None:
    def ids_in(items: Iterable[Item], kind: str) -> list[str]:
        return [item["call_id"] for item in items if item["type"] == kind]

    open_calls = set(ids_in(context, "function_call")) - set(ids_in(context, "function_call_output"))
    for item in asked:
        if item["type"] == "function_call":
            open_calls.add(item["call_id"])
        elif item["type"] == "function_call_output":
            if item["call_id"] not in open_calls:
                raise InvalidRequest(
                    f"input: there is no call {item['call_id'][:64]!r} before its function_call_output, or it has been "
                    "answered: send its function_call, or previous_response_id",
                    param="input",
                )
            open_calls.remove(item["call_id"])
