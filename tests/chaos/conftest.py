"""A fake server for the tests of the clients.

Owns: starting and ending it. Knows nothing of what it is asked.
"""

from __future__ import annotations

import pytest

from tests.chaos.fake_server import FakeServer


@pytest.fixture
async def fake():
    server = FakeServer()
    await server.start()
    yield server
    await server.close()
