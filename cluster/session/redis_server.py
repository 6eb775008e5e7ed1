"""A process's connection to the Redis that has the journals.

Owns: times to wait, what is asked of a server before it is used, and Redis's errors as the journal's. Knows nothing of
what is stored. The package `redis` is only needed where one is configured.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session.journal import JournalCorrupt, JournalFull, JournalUnavailable

# Where the URL has no password.
PASSWORD_VARIABLE = "PHI_CLUSTER_JOURNAL_PASSWORD"
# Journals are asked in place, so a server that is silent holds up its process: not for long, and not for every session.
_TIMEOUT_SECONDS = 1.0
_LEFT_ALONE_SECONDS = 1.0


class RedisServer:
    """`url`: redis://, rediss:// or unix://, as the redis package takes it. Nothing is connected before the first use.
    Raises ValueError if the URL cannot be one, and ImportError without the package."""

    def __init__(self, url: str):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._redis = redis
        self._client: Any = redis.Redis.from_url(
            url,
            # A password of the URL goes first.
            password=os.environ.get(PASSWORD_VARIABLE),
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            # A connection that had been closed meanwhile is replaced. What was asked twice is as if asked once.
            retry=Retry(NoBackoff(), 1),
        )
        self._scripts: dict[str, Any] = {}
        self._silent_until = 0.0

    def close(self) -> None:
        """Its connections, of which none is in use. Idempotent; what is asked afterwards makes new ones."""
        self._client.close()

    def script(self, text: str) -> Callable[..., Any]:
        """What runs it on the server."""
        if text not in self._scripts:
            self._scripts[text] = self._client.register_script(text)
        return self._scripts[text]

    @contextlib.contextmanager
    def translated(self, whose: str) -> Iterator[Any]:
        """The client, its errors as the journal's (`whose`, in their words)."""
        errors = self._redis.exceptions
        if time.monotonic() < self._silent_until:
            raise JournalUnavailable(f"the journal {whose}: Redis did not answer a moment ago", retry_after=1.0)
        try:
            yield self._client
        except (errors.ConnectionError, errors.TimeoutError) as error:
            self._silent_until = time.monotonic() + _LEFT_ALONE_SECONDS
            raise JournalUnavailable(f"the journal {whose}: {_first_line(error)}", retry_after=2.0) from None
        except errors.OutOfMemoryError:
            raise JournalFull(f"the journal {whose}: Redis is full, nothing was written", retry_after=5.0) from None
        except errors.RedisError as error:
            # MISCONF: it cannot write to its disk.
            if "MISCONF" in str(error):
                raise JournalFull(f"the journal {whose}: {_first_line(error)}", retry_after=5.0) from None
            if "WRONGTYPE" in str(error):
                raise JournalCorrupt(
                    f"the journal {whose}: another program's data lies under its name in Redis"
                ) from None
            # Read only, loading, too few replicas, not permitted: it may pass, or be mended, and nothing was written.
            raise JournalUnavailable(f"the journal {whose}: {_first_line(error)}", retry_after=2.0) from None


def check_server(url: str) -> list[str]:
    """Asks the server whether it can hold journals; returns what the user should know of it. Raises StartError."""
    try:
        server = RedisServer(url)
    except ImportError:
        raise StartError("journal: the package redis is missing: pip install 'phi-cluster[redis]'") from None
    except ValueError as error:
        raise StartError(f"journal: {error}") from None
    with contextlib.closing(server):
        return _notes(server)


def _notes(server: RedisServer) -> list[str]:
    try:
        with server.translated("for all sessions") as client:
            client.ping()
    except (JournalUnavailable, JournalFull) as error:
        raise StartError(f"journal: Redis does not serve us ({error.message}); start it, or mend the URL") from None
    try:
        with server.translated("for all sessions") as client:
            settings = client.config_get("maxmemory-policy", "appendonly", "appendfsync", "maxmemory")
    except (JournalUnavailable, JournalFull, JournalCorrupt):
        return ["journal: Redis does not tell its settings: see to maxmemory-policy noeviction and appendfsync always"]
    if settings.get("maxmemory", "0") != "0" and settings.get("maxmemory-policy", "noeviction") != "noeviction":
        raise StartError(
            f"journal: Redis has maxmemory-policy {settings['maxmemory-policy']} and would drop conversations; "
            "set it to noeviction"
        )
    if settings.get("appendonly") != "yes" or settings.get("appendfsync") != "always":
        return [
            "journal: Redis has not appendonly yes and appendfsync always: should it die, the last turns may be lost"
        ]
    return []


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
