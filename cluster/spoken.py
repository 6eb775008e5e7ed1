"""What was said in a session, read back out of its text: messages, as whoever holds the conversation would send them.

Owns: finding messages by the frames that the chat template puts around them. What is found is rendered again and must
be the text that is stored, so a template whose frames are not like that yields an error and never another conversation.
Knows nothing of where sessions are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.model.tokenizer import BREAK, TemplateError

# Nobody says these, and no template changes them.
_PROBES = tuple(f"probe{word}of{word}frames" for word in ("alpha", "bravo", "charlie", "delta"))


class Template(Protocol):
    """What this needs of a tokenizer."""

    def render_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = ..., continue_final_message: bool = ...
    ) -> str: ...


@dataclass(frozen=True)
class _Frames:
    """`beginning` stands before a first user message (with what a template says on its own), `system` before a system
    message, `end` behind a last reply, and the others between two messages."""

    beginning: str
    system: str | None
    system_to_user: str
    user_to_assistant: str
    assistant_to_user: str
    end: str


class SpokenReader:
    """For any thread."""

    def __init__(self, template: Template):
        self._template = template

    def messages(self, text: str) -> list[dict[str, str]]:
        """The messages of a stored text (see Transcript.text). Raises InvalidRequest where there are none: the session
        holds a raw prompt, or what another template made."""
        if not text:
            return []
        try:
            frames = self._frames
            *before, last = _found(text, frames)
            # A reply that ended by itself may be stored with (a part of) what the template puts behind it.
            for count in range(len(frames.end) + 1):
                if last["content"].endswith(frames.end[:count]):
                    content = last["content"][: len(last["content"]) - count]
                    found = [*before, _message(last["role"], content)]
                    if self._render(found).startswith(text):
                        return found
        except (TemplateError, ValueError):
            pass
        raise InvalidRequest(
            "what was said in this session cannot be told as messages: it is a raw prompt, or of another template",
            code="not_messages",
        )

    @functools.cached_property
    def _frames(self) -> _Frames:
        user, reply, again, order = _PROBES
        chat = [_message("user", user), _message("assistant", reply), _message("user", again)]
        beginning, user_to_assistant, assistant_to_user, _ = _split(self._render(chat), user, reply, again)
        *_, end = _split(self._render(chat[:2]), user, reply)
        try:
            whole = self._render([_message("system", order), *chat[:1]])
            system, system_to_user, _ = _split(whole, order, user)
        except TemplateError:
            # Not every model can be told how to be.
            return _Frames(beginning, None, "", user_to_assistant, assistant_to_user, end)
        return _Frames(beginning, system, system_to_user, user_to_assistant, assistant_to_user, end)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._template.render_chat(messages, add_generation_prompt=False)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split(text: str, *contents: str) -> list[str]:
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError("the template does not show every message")
        parts.append(before)
    return [*parts, text]


def _found(text: str, frames: _Frames) -> list[dict[str, str]]:
    """Raises ValueError."""
    messages = []
    if text.startswith(frames.beginning):
        text = text[len(frames.beginning) :]
    elif frames.system is not None and text.startswith(frames.system):
        content, between, text = text[len(frames.system) :].partition(frames.system_to_user)
        if not between:
            raise ValueError("nothing follows the system message")
        messages.append(_message("system", content.replace(BREAK, "")))
    else:
        raise ValueError("the text does not begin as the template does")
    while True:
        for role, end in (("user", frames.user_to_assistant), ("assistant", frames.assistant_to_user)):
            content, between, text = text.partition(end)
            messages.append(_message(role, content.replace(BREAK, "")))
            if not between:
                if role == "user":
                    raise ValueError("the last message has no reply")
                return messages
