"""What the command line asks of a server, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from phi_cluster.cluster.client import ChatAnswer, Client
from phi_cluster.cluster.errors import PhiError, Unavailable

URL = "http://server.test:8000"
Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, api_key: str | None = None) -> Client:
    return Client(URL, api_key, transport=httpx.MockTransport(handler))


def events(*data: dict[str, Any] | str) -> bytes:
    """Server-sent events as the server writes them, with a comment between."""
    lines = [one if isinstance(one, str) else f"data: {json.dumps(one)}" for one in data]
    return "".join(f"{line}\n\n" for line in lines).encode()


def delta(text: str | None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text} if text is not None else {}}], **more}


USAGE = {
    "prompt_tokens": 55,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 38},
}


def test_an_answer_is_json_or_nothing() -> None:
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json={"id": "a"})

    with client(handle, api_key="key") as one:
        assert one.ask("GET", "/v1/sessions/a") == {"id": "a"}
        assert one.ask("DELETE", "/v1/sessions/a") is None
    assert str(asked[0].url) == f"{URL}/v1/sessions/a"
    assert asked[0].headers["authorization"] == "Bearer key"


def test_without_a_key_none_is_sent() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        return httpx.Response(200, json={})

    with client(handle) as one:
        one.ask("GET", "/health")


def test_a_refusal_is_told_in_the_servers_words() -> None:
    body = {"error": {"message": "no session 'a'", "type": "x", "param": None, "code": None}}
    with (
        client(lambda request: httpx.Response(404, json=body)) as one,
        pytest.raises(PhiError, match=r"^no session 'a'$"),
    ):
        one.ask("GET", "/v1/sessions/a")


@pytest.mark.parametrize("body", ["<html>400</html>", "", "[]", '{"error": "text"}', '{"error": {}}'])
def test_a_refusal_in_other_words_is_told_by_its_status(body: str) -> None:
    with (
        client(lambda request: httpx.Response(502, text=body)) as one,
        pytest.raises(PhiError, match="status 502"),
    ):
        one.ask("GET", "/health")


def test_no_server_is_said_with_the_remedy() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(refuse) as one, pytest.raises(Unavailable, match=r"no server answers at .*phi-cluster serve"):
        one.ask("GET", "/health")


@pytest.mark.parametrize("url", ["http://[::1", "http://a:port"])
def test_a_wrong_url_is_said(url: str) -> None:
    with pytest.raises(Unavailable, match="is not a URL"):
        Client(url)


def test_a_url_without_a_scheme_reaches_nobody() -> None:
    with Client("server.test") as one, pytest.raises(Unavailable, match=r"no server answers at server\.test"):
        one.ask("GET", "/health")


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks99://nowhere")
    monkeypatch.setenv("http_proxy", "socks99://nowhere")
    with Client("http://127.0.0.1:1") as one, pytest.raises(Unavailable, match="no server answers"):
        one.ask("GET", "/health")
    with pytest.raises(ValueError, match="socks99"):
        Client("http://server.test")


def test_a_reply_is_streamed_and_summed_up() -> None:
    asked: list[httpx.Request] = []
    content = events(
        delta(""),
        ": keep-alive",
        delta("Hel"),
        delta("lo €"),
        delta(None),
        {"choices": [], "usage": USAGE, "phi": {"engine_replaced": True}},
        "data: [DONE]",
    )

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})

    with client(handle) as one:
        *texts, answer = one.chat([{"role": "user", "content": "hi"}], "demo", 0.5)
    assert texts == ["Hel", "lo €"]
    assert isinstance(answer, ChatAnswer)
    assert answer.usage == USAGE
    assert answer.details == {"engine_replaced": True}
    assert 0 < answer.time_to_first_token <= answer.seconds
    body = json.loads(asked[0].content)
    assert (body["stream"], body["temperature"], body["stream_options"]) == (True, 0.5, {"include_usage": True})
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert asked[0].headers["x-session-id"] == "demo"


def test_a_reply_that_is_refused() -> None:
    body = {"error": {"message": "too long"}}
    with (
        client(lambda request: httpx.Response(400, json=body)) as one,
        pytest.raises(PhiError, match="too long"),
    ):
        list(one.chat([], "demo", 0.0))


def test_a_reply_that_ends_in_an_error() -> None:
    content = events(delta("Hel"), {"error": {"message": "the engine gave the request up"}}, "data: [DONE]")
    seen: list[str | ChatAnswer] = []
    with (
        client(lambda request: httpx.Response(200, content=content)) as one,
        pytest.raises(PhiError, match="gave the request up"),
    ):
        seen.extend(one.chat([], "demo", 0.0))
    assert seen == ["Hel"]


def test_a_connection_that_breaks_in_the_middle() -> None:
    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            yield events(delta("Hel"))
            raise httpx.ReadError("reset")

    seen: list[str | ChatAnswer] = []
    with (
        client(lambda request: httpx.Response(200, stream=Broken())) as one,
        pytest.raises(Unavailable, match="the session keeps what was said"),
    ):
        seen.extend(one.chat([], "demo", 0.0))
    assert seen == ["Hel"]


def test_the_summary_says_only_what_is_known() -> None:
    assert ChatAnswer().summary() == "[0 prompt, 0 cached, TTFT 0 ms]"
    answer = ChatAnswer(USAGE, {}, time_to_first_token=0.024, seconds=0.124)
    assert answer.summary() == "[55 prompt, 38 cached, TTFT 24 ms, 20 tok/s]"
    answer.details = {"engine_replaced": True}
    assert answer.summary().endswith("tok/s, engine replaced]")
    one_token = USAGE | {"completion_tokens": 1, "prompt_tokens_details": None}
    assert ChatAnswer(one_token, {}, 0.5, 0.6).summary() == "[55 prompt, 0 cached, TTFT 500 ms]"
