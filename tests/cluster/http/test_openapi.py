"""The OpenAPI document is right: requests made from it, and from its contrary, are answered as it says."""

import asyncio
import contextlib
from dataclasses import replace

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

ALICE = {"authorization": "Bearer phi-alice"}
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    ignored_auth,
)


@pytest.fixture
async def url(make_app, serve, settings, sessions, keys, usage, watch):
    """Of the app behind a real server: it belongs to one event loop, and requests come from another thread."""
    for owner in ("alice", "bob"):
        sessions.add(owner, "0")
    # Or its events would be waited for.
    watch.is_ending = True
    # What is too large is not what the document's contrary is about.
    return await serve(make_app(replace(settings, max_body_bytes=2**26), keys=keys, usage=usage))


def ask_all(url, mode):
    """The routes that were asked."""
    api = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=ALICE)
    seen = set()
    for found in api.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            seen.add(case.operation.label)
            case.call_and_validate(headers=ALICE, checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):
            # Where nothing can be sent, nothing wrong can be.
            ask()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
async def test_every_route_does_what_the_document_says(url, mode):
    seen = await asyncio.to_thread(ask_all, url, mode)
    assert {"POST /v1/chat/completions", "POST /v1/responses", "GET /v1/sessions"} <= seen


async def test_every_route_is_in_the_document(app):
    """But /openapi.json itself and HEAD."""
    documented = {(method.upper(), path) for path, found in app.openapi()["paths"].items() for method in found}
    assert ("POST", "/v1/chat/completions") in documented
    assert ("GET", "/v1/usage") in documented
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in ("/health", "/ready"))
            assert "500" in operation["responses"]
