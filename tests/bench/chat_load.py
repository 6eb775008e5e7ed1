"""Turns over HTTP, with the moments at which their tokens came.

Owns: the client, one streamed turn, and conversations that go on turn after turn. Knows nothing of the server's
processes.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field

import httpx
from httpx_aiohttp import HttpxAiohttpClient

PROMPTS = (
    "Tell me about the sea.",
    "And what lives in it?",
    "Which of these is the largest, and how large is it?",
    "Explain that again, to a child.",
)


class Refused(RuntimeError):
    """The server's answer was an error. Its message is the server's words; `retry_after` in seconds."""

    def __init__(self, status: int, message: str, retry_after: float):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass
class Turn:
    """What one turn brought; moments in seconds since some fixed one. `times` are those of the pieces of text."""

    begin: float
    times: list[float] = field(default_factory=list)
    reply: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.times[0] - self.begin


def open_client(url: str, num_connections: int, timeout: float = 600.0) -> httpx.AsyncClient:
    """A context. It shares the server's cores: parsing HTTP in Python would cost as much as all that the server does
    for a token outside of its engine. `timeout` in seconds."""
    limits = httpx.Limits(max_connections=num_connections)
    return HttpxAiohttpClient(base_url=url, timeout=timeout, limits=limits)


async def send(client: httpx.AsyncClient, session: str, messages: list[dict[str, str]], tokens: int) -> Turn:
    """One streamed turn of exactly `tokens` tokens, greedy. Raises Refused, and RuntimeError for what breaks later."""
    body = {
        "messages": messages,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    turn = Turn(time.perf_counter())
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": session}) as response:
        if response.is_error:
            words = (await response.aread()).decode(errors="replace")
            raise Refused(response.status_code, words, float(response.headers.get("retry-after", 1)))
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            now = time.perf_counter()
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    turn.times.append(now)
                    turn.reply += text
            if usage := event.get("usage"):
                turn.tokens = usage["completion_tokens"]
                turn.prompt_tokens = usage["prompt_tokens"]
                turn.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    if not turn.times:
        raise RuntimeError("a turn without text")
    return turn


class Conversation:
    """A named session, new, and what was said in it so far."""

    def __init__(self, client: httpx.AsyncClient):
        self.session = f"bench-{uuid.uuid4().hex[:12]}"
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._num_turns = 0

    async def say(self, tokens: int, prompt: str | None = None) -> Turn:
        """The next turn, with the next of PROMPTS if there is no `prompt`."""
        prompt = prompt or PROMPTS[self._num_turns % len(PROMPTS)]
        self._num_turns += 1
        self.messages.append({"role": "user", "content": prompt})
        try:
            turn = await send(self._client, self.session, self.messages, tokens)
        except BaseException:
            # It may be said again.
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": turn.reply})
        return turn

    async def gets_actor(self, seconds: float) -> bool:
        """Waits until the session is in a process of its own, but not longer; whether it is."""
        deadline = time.monotonic() + seconds
        while True:
            described = (await self._client.get(f"/v1/sessions/{self.session}")).raise_for_status().json()
            if described["actor_pid"] is not None:
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.5)

    async def clear(self) -> None:
        """The server forgets history and cache, as if the session were new; `messages` stay."""
        (await self._client.post(f"/v1/sessions/{self.session}/clear")).raise_for_status()

    async def delete(self) -> None:
        (await self._client.delete(f"/v1/sessions/{self.session}")).raise_for_status()
