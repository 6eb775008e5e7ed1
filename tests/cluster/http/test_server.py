"""Models, health, request ids, tenants, the OpenAPI document, and that apps share nothing."""

import subprocess
import sys

import httpx
import pytest

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.http.auth import DEFAULT_TENANT
from phi_cluster.cluster.http.edge import EdgeSettings

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_models(official, client):
    listed = [model async for model in official.models.list()]
    assert [model.id for model in listed] == ["phi", "org/phi-alias"]
    assert {model.owned_by for model in listed} == {"phi-cluster"}
    one = (await client.get("/v1/models/org/phi-alias")).json()
    assert one == {
        "id": "org/phi-alias",
        "object": "model",
        "created": 1_750_000_000,
        "owned_by": "phi-cluster",
        "root": "phi",
        "max_model_len": 128,
    }
    missing = await client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_health_and_readiness_are_two_things(client, health):
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ready"}
    health.not_ready_because = "The engine is starting"
    response = await client.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The engine is starting"
    assert response.headers["retry-after"] == "1"
    assert (await client.get("/health")).status_code == 200
    health.is_live = False
    assert (await client.get("/health")).status_code == 503
    assert (await client.head("/health")).status_code == 503


async def test_request_ids_are_ours(client, turns):
    given = {"x-request-id": "../../etc/passwd"}
    responses = [await client.post(CHAT, json=HELLO, headers=given) for _ in range(2)]
    ids = [response.headers["x-request-id"] for response in responses]
    assert ids == [turn.request_id for turn in turns.requests]
    assert len(set(ids)) == 2
    assert all(len(one) == 32 and one.isalnum() for one in ids)
    assert "passwd" not in repr(turns.requests)


async def test_a_failing_room_below_becomes_a_bare_500(client, health, caplog):
    def broken() -> bool:
        raise OSError("/secret/socket is gone")

    health.live = broken
    response = await client.get("/health")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] in caplog.text
    assert "/secret/socket" in caplog.text


async def test_what_is_for_the_operator_is_logged_and_not_told(client, turns, caplog):
    class Secretive(PhiError):
        told = "something is wrong"

    turns.script = [Secretive("/secret/journal is broken")]
    for stream in (False, True):
        response = await client.post(CHAT, json={**HELLO, "stream": stream})
        assert "something is wrong" in response.text
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in caplog.text
    assert caplog.text.count("/secret/journal") == 2


async def test_keys_reach_the_runner_as_tenants_only(client, turns):
    for key in ("sk-canary-1", "sk-canary-2"):
        await client.post(CHAT, json=HELLO, headers={"authorization": f"Bearer {key}"})
    await client.post(CHAT, json=HELLO)
    tenants = [turn.tenant for turn in turns.requests]
    assert len(set(tenants)) == 3
    assert tenants[2] == DEFAULT_TENANT
    assert "canary" not in repr(turns.requests)


async def test_openapi_document(client):
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    operation = document["paths"][CHAT]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert "x-session-id" in {parameter["name"] for parameter in operation["parameters"]}
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["ChatRequest"]["properties"]["stop"]["anyOf"][0]["type"] == "string"
    assert set(document["paths"]) == {
        CHAT,
        "/v1/completions",
        "/v1/conversations",
        "/v1/conversations/{conversation_id}",
        "/v1/conversations/{conversation_id}/items",
        "/v1/conversations/{conversation_id}/items/{item_id}",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/engines/recycle",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/sessions",
        "/v1/sessions/{session_id}",
        "/v1/sessions/{session_id}/messages",
        "/v1/sessions/import",
        "/v1/sessions/{session_id}/clear",
        "/v1/sessions/{session_id}/export",
        "/v1/sessions/{session_id}/fork",
        "/v1/sessions/{session_id}/hibernate",
        "/v1/sessions/{session_id}/recycle",
        "/v1/usage",
        "/v1/cluster",
        "/tokenize",
        "/detokenize",
        "/v1/events",
        "/health",
        "/ready",
    }
    responses = document["paths"]["/v1/responses"]["post"]
    assert responses["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert responses["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ResponseRequest")
    assert {
        parameter["name"] for parameter in document["paths"]["/v1/responses/{response_id}"]["get"]["parameters"]
    } == {*("response_id", "stream", "starting_after", "include", "include_obfuscation")}
    for ref in references(document):
        assert ref.removeprefix("#/components/schemas/") in schemas
    assert "HTTPValidationError" not in schemas


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


async def test_two_apps_share_nothing(make_app, settings):
    other = EdgeSettings(("other",), max_model_len=8, vocab_size=10)
    names = []
    for app in (make_app(settings), make_app(other)):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://a") as client:
            names.append([one["id"] for one in (await client.get("/v1/models")).json()["data"]])
    assert names == [["phi", "org/phi-alias"], ["other"]]


@pytest.mark.parametrize(
    "wrong", [{"served_model_names": ()}, {"vocab_size": 0}, {"max_model_len": -1}, {"keep_alive_seconds": 0}]
)
def test_settings_are_checked(wrong):
    given = {"served_model_names": ("phi",), "max_model_len": 8, "vocab_size": 10, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EdgeSettings(**given)


def test_the_edge_loads_neither_ray_nor_torch():
    code = (
        "import sys, phi_cluster.cluster.http.server; "
        "sys.exit(', '.join({'ray', 'torch', 'tokenizers', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


async def test_refusals_and_failures_are_counted_by_status_and_code(client, health, turns, observer):
    await client.post(CHAT, json={**HELLO, "max_tokens": -1})
    await client.get("/nothing")
    await client.get("/v1/sessions/unknown")
    turns.script = [PhiError("secret")]
    await client.post(CHAT, json=HELLO)
    assert observer.errors == [(400, None), (404, "not_found"), (404, "not_found"), (500, None)]
    # Whoever looks whether the server is ready has not been refused anything.
    health.not_ready_because = "The engine is starting"
    assert (await client.get("/ready")).status_code == 503
    assert len(observer.errors) == 4
