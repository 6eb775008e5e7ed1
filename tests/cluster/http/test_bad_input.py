"""What is wrong gets an OpenAI-style error that names the field, and the server lives."""

import json
from dataclasses import replace

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def chat(**fields):
    return CHAT, json.dumps({"messages": HELLO, **fields}).encode()


def message(**fields):
    return CHAT, json.dumps({"messages": [fields]}).encode()


def completion(**fields):
    return COMPLETIONS, json.dumps({"prompt": "a", **fields}).encode()


def raw(text, path=CHAT):
    body = text if isinstance(text, bytes) else text.encode()
    return path, b'{"messages": [{"role": "user", "content": "Hi"}], ' + body + b"}"


# (request, status, param, a part of the message)
CASES = {
    # wrong types
    "number as string": (chat(temperature="1"), 400, "temperature", "must be a number, not a string"),
    "number as bool": (chat(temperature=True), 400, "temperature", "must be a number, not true"),
    "integer as float": (chat(max_tokens=1.0), 400, "max_tokens", "must be an integer, not 1.0"),
    "integer as bool": (chat(max_tokens=True), 400, "max_tokens", "must be an integer, not true"),
    "integer as object": (chat(seed={}), 400, "seed", "not an object"),
    "bool as integer": (chat(stream=1), 400, "stream", "must be true or false, not 1"),
    "bool as string": (chat(stream="true"), 400, "stream", "must be true or false"),
    "model as number": (chat(model=5), 400, "model", "must be a string"),
    "messages as string": (chat(messages="Hi"), 400, "messages", "must be an array, not a string"),
    "message as string": (chat(messages=["Hi"]), 400, "messages[0]", "must be an object"),
    "content as number": (message(role="user", content=5), 400, "messages[0].content", "must be a string"),
    "stop as number": (chat(stop=5), 400, "stop", "must be a string or an array of strings"),
    "stop with a number": (chat(stop=["a", 5]), 400, "stop", "array of strings"),
    "logit_bias as array": (chat(logit_bias=[1]), 400, "logit_bias", "must be an object"),
    "stream_options as bool": (chat(stream=True, stream_options=True), 400, "stream_options", "an object"),
    "prompt as number": (completion(prompt=5), 400, "prompt", "must be a string or an array"),
    "prompt as object": (completion(prompt={}), 400, "prompt", "must be a string or an array"),
    "prompt with a bool": (completion(prompt=[1, True]), 400, "prompt", "must be integers"),
    "prompt with a float": (completion(prompt=[1, 2.0]), 400, "prompt", "must be integers"),
    "prompt mixed": (completion(prompt=[1, "a"]), 400, "prompt", "must be integers"),
    "metadata with a number": (chat(metadata={"a": 1}), 400, "metadata.a", "must be a string"),
    # numbers that are none, or out of range
    "NaN": (raw('"temperature": NaN'), 400, None, "not valid JSON"),
    "Infinity": (raw('"temperature": Infinity'), 400, None, "not valid JSON"),
    "minus Infinity": (raw('"top_p": -Infinity'), 400, None, "not valid JSON"),
    "1e999": (raw('"temperature": 1e999'), 400, "temperature", "must be a finite number"),
    "1e999 as a count": (raw('"max_tokens": 1e999'), 400, "max_tokens", "must be an integer"),
    "1e999 as a bias": (raw('"logit_bias": {"1": -1e999}'), 400, "logit_bias[1]", "finite"),
    "a number of 5,000 digits": (raw('"seed": ' + "9" * 5000), 400, None, "not valid JSON"),
    "a number of 4,000 digits": (raw('"seed": ' + "9" * 4000), 400, "seed", "seed must be"),
    "a float of 4,000 digits": (raw('"top_p": ' + "9" * 4000), 400, "top_p", "top_p must be"),
    "negative temperature": (chat(temperature=-0.1), 400, "temperature", "at least 0, not -0.1"),
    "hot temperature": (chat(temperature=2.5), 400, "temperature", "at most 2"),
    "top_p of zero": (chat(top_p=0), 400, "top_p", "greater than 0"),
    "top_k of minus two": (chat(top_k=-2), 400, "top_k", "at least -1"),
    "min_p above one": (chat(min_p=1.5), 400, "min_p", "at most 1"),
    "penalty out of range": (chat(presence_penalty=2.1), 400, "presence_penalty", "at most 2"),
    "repetition_penalty of zero": (chat(repetition_penalty=0), 400, "repetition_penalty", "at least 0.01, not 0"),
    "denormal repetition_penalty": (chat(repetition_penalty=5e-324), 400, "repetition_penalty", "at least 0.01"),
    "max_tokens of zero": (chat(max_tokens=0), 400, "max_tokens", "at least 1"),
    "negative max_tokens": (chat(max_tokens=-5), 400, "max_tokens", "at least 1, not -5"),
    "huge max_tokens": (chat(max_tokens=10**18), 400, "max_tokens", "at most"),
    "max_tokens beyond the context": (chat(max_tokens=130), 400, "max_tokens", "(2 too many)"),
    "negative min_tokens": (chat(min_tokens=-1), 400, "min_tokens", "at least 0"),
    "min_tokens beyond the context": (chat(min_tokens=129), 400, "min_tokens", "(1 too many)"),
    "min_tokens above max_tokens": (
        chat(min_tokens=5, max_tokens=4),
        400,
        "min_tokens",
        "at most max_tokens, 4",
    ),
    "two limits": (chat(max_tokens=5, max_completion_tokens=6), 400, "max_completion_tokens", "one limit"),
    "seed beyond 64 bits": (chat(seed=2**63), 400, "seed", "at most"),
    # ids
    "negative id": (completion(prompt=[-1]), 400, "prompt", "from 0 to 999"),
    "id beyond the vocabulary": (completion(prompt=[1, 1000]), 400, "prompt", "from 0 to 999"),
    "id beyond 64 bits": (completion(prompt=[2**70]), 400, "prompt", "from 0 to 999"),
    "bias beyond the vocabulary": (chat(logit_bias={"1000": 1}), 400, "logit_bias", "from 0 to 999"),
    "bias of a word": (chat(logit_bias={"the": 1}), 400, "logit_bias", "token ids"),
    "bias of a negative id": (chat(logit_bias={"-1": 1}), 400, "logit_bias", "token ids"),
    "bias of a huge id": (chat(logit_bias={"9" * 5000: 1}), 400, "logit_bias", "token ids"),
    "bias out of range": (chat(logit_bias={"1": 101}), 400, "logit_bias[1]", "at most 100"),
    "bias as bool": (chat(logit_bias={"1": True}), 400, "logit_bias[1]", "must be a number"),
    "too many biases": (chat(logit_bias={str(i): 1 for i in range(1025)}), 400, "logit_bias", "at most 1024"),
    "negative stop id": (chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "at least 0"),
    "stop id beyond the vocabulary": (chat(stop_token_ids=[1000]), 400, "stop_token_ids", "from 0 to 999"),
    "stop id as bool": (chat(stop_token_ids=[True]), 400, "stop_token_ids[0]", "integer"),
    # stop strings
    "empty stop": (chat(stop=""), 400, "stop", "1 to 1024 characters"),
    "one empty stop": (chat(stop=["a", ""]), 400, "stop", "1 to 1024 characters"),
    "too many stops": (chat(stop=["a"] * 17), 400, "stop", "at most 16"),
    # prompts and messages
    "no messages": ((CHAT, b"{}"), 400, "messages", "messages is required"),
    "null messages": (chat(messages=None), 400, "messages", "messages is required"),
    "empty messages": (chat(messages=[]), 400, "messages", "messages must not be empty"),
    "too many messages": (chat(messages=[{}] * 5000), 400, "messages", "at most 4096"),
    "no role": (message(content="a"), 400, "messages[0].role", "is required"),
    "no content": (message(role="user"), 400, "messages[0].content", "is required"),
    "null content": (message(role="assistant", content=None), 400, "messages[0].content", "is required"),
    "unknown role": (message(role="robot", content="a"), 400, "messages[0].role", "'system', 'developer'"),
    "role as array": (message(role=["user"], content="a"), 400, "messages[0].role", "'system', 'developer'"),
    "tool message": (message(role="tool", content="a"), 400, "messages[0].tool_call_id", "is required"),
    "tool calls": (
        message(role="assistant", content="a", tool_calls=[{}]),
        400,
        "messages[0].tool_calls[0].id",
        "is required",
    ),
    "image": (
        message(role="user", content=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        400,
        "messages[0].content",
        "image_url, which is not supported: this model reads text only",
    ),
    "part without a type": (message(role="user", content=[{}]), 400, "messages[0].content", "part 0 must be"),
    "part without text": (
        message(role="user", content=[{"type": "text"}]),
        400,
        "messages[0].content",
        "part 0",
    ),
    "no parts": (message(role="user", content=[]), 400, "messages[0].content", "at least one part"),
    "misspelt in a message": (
        message(role="user", contents="a"),
        400,
        "messages[0].contents",
        "did you mean content?",
    ),
    "no prompt": ((COMPLETIONS, b"{}"), 400, "prompt", "prompt is required"),
    "empty prompt": (completion(prompt=""), 400, "prompt", "must not be empty"),
    "empty array prompt": (completion(prompt=[]), 400, "prompt", "must not be empty"),
    "empty array in an array": (completion(prompt=[[]]), 400, "prompt", "must not be empty"),
    "65 prompts": (completion(prompt=["a"] * 65), 400, "prompt", "at most 64"),
    "prompts with an empty one": (completion(prompt=["a", ""]), 400, "prompt", "must not be empty"),
    "prompts of two kinds, one wrong": (completion(prompt=[[1], 1.5]), 400, "prompt", "a string or an array"),
    "129 replies": (completion(prompt=["a"] * 43, n=3), 400, "prompt", "at most 128 replies"),
    "continue a user's message": (
        chat(continue_final_message=True),
        400,
        "continue_final_message",
        "must be the assistant's",
    ),
    "continue and begin": (
        chat(
            messages=[{"role": "assistant", "content": "a"}],
            continue_final_message=True,
            add_generation_prompt=True,
        ),
        400,
        "continue_final_message",
        "excludes",
    ),
    # fields
    "misspelt": (chat(max_token=5), 400, "max_token", "did you mean max_tokens?"),
    "unknown": (chat(zzzz=5), 400, "zzzz", "zzzz is not a field here: leave it out"),
    "unknown and null": (chat(zzzz=None), 400, "zzzz", "not a field here"),
    "name of a method": (chat(model_dump=1), 400, "model_dump", "not a field here"),
    "a name with braces": (chat(**{"{message}{0}": 1}), 400, "{message}{0}", "not a field here"),
    "a name of 10 KB": (chat(**{"x" * 10_000: 1}), 400, "x" * 64, "not a field here"),
    "misspelt stream option": (
        chat(stream=True, stream_options={"include_usag": True}),
        400,
        "stream_options.include_usag",
        "did you mean include_usage?",
    ),
    "stream options without stream": (
        chat(stream_options={}),
        400,
        "stream_options",
        "only allowed with stream",
    ),
    "messages for completions": (completion(messages=HELLO), 400, "messages", "not a field here"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools[0].function", "is required"),
    "json output": (
        chat(response_format={"type": "xml"}),
        400,
        "response_format.type",
        "json_object",
    ),
    "17 choices": (chat(n=17), 400, "n", "at most 16"),
    "no choice": (chat(n=0), 400, "n", "at least 1"),
    "true choices": (chat(n=True), 400, "n", "must be an integer, not true"),
    "best of fewer than n": (completion(n=3, best_of=2), 400, "best_of", "at least n, 3"),
    "best of a stream": (completion(best_of=2, stream=True), 400, "best_of", "stream"),
    "logprobs": (chat(logprobs=1), 400, "logprobs", "must be true or false"),
    "logprobs of completions": (completion(logprobs=True), 400, "logprobs", "must be an integer"),
    "too many logprobs": (completion(logprobs=21), 400, "logprobs", "must be at most 20"),
    "audio": (chat(audio={"voice": "a"}), 400, "audio", "not supported yet"),
    "stored": (chat(store=True), 400, "store", "not supported yet"),
    "echo of a chat": (chat(echo=True), 400, "echo", "not supported yet"),
    "no token without echo": (completion(max_tokens=0), 400, "max_tokens", "at least 1 without echo"),
    "fewer than no tokens": (completion(max_tokens=-1, echo=True), 400, "max_tokens", "at least 0"),
    "unknown model": (
        chat(model="gpt-5"),
        404,
        "model",
        "'gpt-5' does not exist here; served: phi, org/phi-alias",
    ),
    "model with a line end": (chat(model="phi\r\nx: y"), 404, "model", "does not exist"),
    # bodies
    "no body": ((CHAT, b""), 400, None, "not valid JSON"),
    "broken JSON": ((CHAT, b'{"messages": ['), 400, None, "not valid JSON"),
    "two values": ((CHAT, b"{} {}"), 400, None, "not valid JSON"),
    "an array": ((CHAT, b"[]"), 400, None, "must be a JSON object"),
    "a string": ((COMPLETIONS, b'"a"'), 400, None, "must be a JSON object"),
    "null": ((CHAT, b"null"), 400, None, "must be a JSON object"),
    "broken UTF-8": (raw(b'"user": "\xff\xfe"'), 400, None, "not valid JSON"),
    "a surrogate in UTF-8": (raw(b'"user": "\xed\xa0\x80"'), 400, None, "not valid JSON"),
    "UTF-16": ((CHAT, '{"messages": []}'.encode("utf-16")), 400, None, "not valid JSON"),
    "a lone surrogate": (raw(r'"stop": "\ud800"'), 400, None, "not valid JSON"),
    "a lone low surrogate": (raw(r'"stop": "\udc00x"'), 400, None, "not valid JSON"),
    "a lone surrogate as a name": (raw(r'"\ud800": 1'), 400, None, "not valid JSON"),
    "deep arrays": ((CHAT, b"[" * 60_000), 400, None, "not valid JSON"),
    "deep objects": ((CHAT, b'{"a":' * 10_000), 400, None, "not valid JSON"),
    "deep but closed": (raw('"metadata": ' + "[" * 150 + "]" * 150), 400, "metadata", "must be an object"),
    "too large": (raw('"user": "' + "x" * 70_000 + '"'), 413, None, "larger than the 65536 bytes"),
}


@pytest.mark.parametrize("name", CASES)
async def test_bad_input(client, turns, name):
    (path, body), status, param, part = CASES[name]
    response = await client.post(path, content=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert part in error["message"]
    assert len(error["message"]) < 300
    for secret in ("Traceback", ".py", "pydantic", "phi_cluster", "/root", "{param}"):
        assert secret not in response.text
    assert turns.requests == []
    bystander = await client.post(CHAT, json={"messages": HELLO})
    assert bystander.json()["choices"][0]["message"]["content"] == "Hello, wörld"


@pytest.mark.parametrize(
    "session_id",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a b",
        "a\r\nx-evil: 1",
        "a\n",
        "ä",
        "x" * 129,
        "x" * 10_240,
        "a%2fb",
        "a\x00",
    ],
)
async def test_bad_session_ids(connect, turns, session_id):
    """As an ASGI server would hand them over, whatever its own checks."""
    connection = connect(CHAT, {"messages": HELLO}, headers={"x-session-id": session_id})
    start = await connection.next()
    assert start["status"] == 400
    error = json.loads((await connection.next())["body"])["error"]
    assert error["param"] == "x-session-id"
    assert error["message"].startswith("x-session-id: ")
    assert not any(name == b"x-session-id" for name, _ in start["headers"])
    assert turns.requests == []


@pytest.mark.parametrize("session_id", ["x", "x" * 128, "SERVE_CONTROLLER_ACTOR", "a.b_c:d-e", "...", "-"])
async def test_good_session_ids_come_back(client, turns, session_id):
    for stream in (False, True):
        response = await client.post(
            CHAT, json={"messages": HELLO, "stream": stream}, headers={"x-session-id": session_id}
        )
        assert response.status_code == 200
        assert response.headers["x-session-id"] == session_id
    assert {turn.session_id for turn in turns.requests} == {session_id}


@pytest.mark.parametrize("name", ["x-session-id", "authorization"])
async def test_a_header_that_decides_must_not_come_twice(client, turns, name):
    response = await client.post(CHAT, json={"messages": HELLO}, headers=[(name, "a"), (name, "b")])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert turns.requests == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=UTF-8"}, 200),
        ({"content-type": "application/vnd.x+json"}, 200),
        ({}, 200),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-encoding": "gzip"}, 415),
    ],
)
async def test_media_types(client, headers, status):
    response = await client.post(CHAT, content=json.dumps({"messages": HELLO}).encode(), headers=headers)
    assert response.status_code == status
    if status == 415:
        assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nope", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/sessions/a", 405),
        ("GET", "/v1/sessions/a/clear", 405),
        ("BREW", CHAT, 405),
    ],
)
async def test_routes_that_are_not(client, method, path, status):
    response = await client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert response.headers["x-request-id"]
    assert ("allow" in response.headers) == (status == 405)


@pytest.fixture
def app(make_app, settings):
    return make_app(replace(settings, session_headers=("x-session-id", "x-correlation-id")))


@pytest.mark.parametrize(
    ("headers", "status", "session"),
    [
        ({"x-correlation-id": "c"}, 200, "c"),
        ({"x-session-id": "s"}, 200, "s"),
        ({"X-Correlation-Id": "s", "x-session-id": "s"}, 200, "s"),
        ({"session-id": "other"}, 200, None),
        ({"x-correlation-id": "c", "x-session-id": "s"}, 400, "x-session-id"),
        ({"x-correlation-id": "a b"}, 400, "x-correlation-id"),
        ({"x-correlation-id": ""}, 400, "x-correlation-id"),
    ],
)
async def test_other_headers_may_name_a_session(client, turns, headers, status, session):
    response = await client.post(CHAT, json={"messages": HELLO}, headers=headers)
    assert response.status_code == status
    if status == 200:
        assert [turn.session_id for turn in turns.requests] == [session]
        assert response.headers.get("x-session-id") == session
    else:
        assert response.json()["error"]["param"] == session


async def test_of_a_name_that_comes_twice_the_last_one_counts(client, turns):
    body = b'{"max_tokens": 5, "messages": [{"role": "user", "content": "a", "content": "b"}], "max_tokens": 7}'
    assert (await client.post(CHAT, content=body)).status_code == 200
    [turn] = turns.requests
    assert (turn.sampling["max_tokens"], turn.messages) == (7, [{"role": "user", "content": "b"}])
    doubled = b'{"messages": [{"role": "user", "content": "a"}], "temperature": "x", "temperature": 1}'
    assert (await client.post(CHAT, content=doubled)).status_code == 200


async def test_a_hint_is_passed_on(client, turns):
    for key in ("mine", None):
        await client.post(CHAT, json={"messages": HELLO, "prompt_cache_key": key})
    assert [turn.cache_hint for turn in turns.requests] == ["mine", None]
    assert "mine" not in repr(turns.requests)
    long = await client.post(CHAT, json={"messages": HELLO, "prompt_cache_key": "x" * 513})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "prompt_cache_key")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/files"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/assistants"),
        ("POST", "/v1/threads/runs"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/vector_stores/x/files"),
        ("POST", "/v1/uploads"),
        ("GET", "/v1/engines"),
    ],
)
async def test_what_openai_has_and_we_have_not_is_said(client, method, path):
    response = await client.request(method, path, content=b"x")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "unsupported_endpoint"
    assert f"{method} {path} is not served here: " in error["message"]
    assert "There are /v1/chat/completions, " in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "evil.test/v1/models?", "\u00e9", "a@b:c:d", "x" * 5000, ""])
async def test_hosts_that_are_none_change_nothing(connect, host):
    for path, status in ((CHAT, 200), ("/v1/none", 404), ("/v1/embeddings", 404)):
        connection = connect(path, {"messages": HELLO}, headers={"host": host})
        assert (await connection.next())["status"] == status
