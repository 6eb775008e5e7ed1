"""The command line's client side: talks to a running server over HTTP, as any other client would.

Owns: the requests of `phi-cluster chat`, `sessions`, `top` and `events`. Knows nothing of the server's inside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import httpx

from phi_cluster.cluster.errors import PhiError, Unavailable

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Of a file, in memory at once.
_CHUNK_NBYTES = 2**18


@dataclass
class ChatAnswer:
    """What a streamed answer told besides its text. Seconds, tokens."""

    usage: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    def summary(self) -> str:
        """`[55 prompt, 38 cached, TTFT 24 ms, 61 tok/s]`"""
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        parts = [f"{self.usage.get('prompt_tokens', 0)} prompt", f"{cached} cached"]
        parts.append(f"TTFT {self.time_to_first_token * 1000:.0f} ms")
        tokens = self.usage.get("completion_tokens", 0)
        if tokens > 1 and self.seconds > self.time_to_first_token:
            parts.append(f"{(tokens - 1) / (self.seconds - self.time_to_first_token):.0f} tok/s")
        if self.details.get("engine_replaced"):
            parts.append("engine replaced")
        return f"[{', '.join(parts)}]"


class Client:
    """Raises Unavailable if no server answers, PhiError with the server's message if it refuses."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None):
        """`transport` is for tests; None: the network."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise Unavailable(f"{url} is not a URL ({error}); write for example http://127.0.0.1:8000") from None
        self._http = httpx.Client(
            base_url=base,
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=5.0),
            transport=transport,
            # A proxy from the environment cannot reach a server on this machine.
            trust_env=base.host not in _LOOPBACK,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request, with a JSON body if there is anything in it; returns the JSON answer (None if it is empty)."""
        try:
            answer = self._http.request(method, path, json=body or None)
        except httpx.TransportError:
            raise Unavailable(f"no server answers at {self._url}; start one with: phi-cluster serve") from None
        if answer.is_error:
            raise _refusal(answer.status_code, answer.content)
        return answer.json() if answer.content else None

    def download(self, path: str) -> Iterator[bytes]:
        """What a GET brings, a piece at a time."""
        try:
            with self._http.stream("GET", path) as stream:
                if stream.is_error:
                    raise _refusal(stream.status_code, stream.read())
                yield from stream.iter_bytes(_CHUNK_NBYTES)
        except httpx.ConnectError:
            raise Unavailable(f"no server answers at {self._url}; start one with: phi-cluster serve") from None
        except httpx.TransportError:
            raise Unavailable(f"the connection to {self._url} broke before all had come") from None

    def upload(self, path: str, file: BinaryIO, nbytes: int) -> Any:
        """A POST of so many bytes that a file has; returns the JSON answer."""
        pieces = iter(lambda: file.read(_CHUNK_NBYTES), b"")
        try:
            answer = self._http.request("POST", path, content=pieces, headers={"content-length": str(nbytes)})
        except httpx.TransportError:
            raise Unavailable(f"no server answers at {self._url}; start one with: phi-cluster serve") from None
        if answer.is_error:
            raise _refusal(answer.status_code, answer.content)
        return answer.json()

    def events(self, after: int) -> Iterator[dict[str, Any]]:
        """What happens to the cluster behind the event numbered `after`, until the server ends the stream."""
        try:
            with self._http.stream("GET", "/v1/events?stream=true", headers={"last-event-id": str(after)}) as stream:
                if stream.is_error:
                    raise _refusal(stream.status_code, stream.read())
                yield from _data(stream)
        except httpx.TransportError:
            raise Unavailable(f"the connection to {self._url} broke") from None

    def chat(self, messages: list[dict[str, str]], session_id: str, temperature: float) -> Iterator[str | ChatAnswer]:
        """Streams the reply's text, then one ChatAnswer."""
        body = {
            "messages": messages,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = ChatAnswer()
        begin = time.monotonic()
        headers = {"x-session-id": session_id, "x-phi-details": "1"}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
                if stream.is_error:
                    raise _refusal(stream.status_code, stream.read())
                for event in _data(stream):
                    answer.usage = event.get("usage") or answer.usage
                    answer.details = event.get("phi") or answer.details
                    for choice in event["choices"]:
                        text = choice["delta"].get("content")
                        if text:
                            answer.time_to_first_token = answer.time_to_first_token or time.monotonic() - begin
                            yield text
        except httpx.TransportError:
            raise Unavailable(f"the connection to {self._url} broke; the session keeps what was said") from None
        answer.seconds = time.monotonic() - begin
        yield answer


def _data(stream: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events. Raises PhiError for one that is an error."""
    for line in stream.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise PhiError(event["error"]["message"])
            yield event


def _refusal(status: int, content: bytes) -> PhiError:
    try:
        return PhiError(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return PhiError(f"the server answered with status {status}")
