"""Values of the configuration that are written in words: durations (`10m`), sizes (`2GiB`), headers' names, origins,
addresses.

Owns: what is accepted, and what is said of anything else. Knows nothing of the fields that have such values.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_DURATION = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _seconds(value: object) -> object:
    """`90`, `1.5` (seconds), `"2s"`, `"10m"`, `"6h"`, `"30d"` -> seconds."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(ms|s|m|h|d)?\s*", value)
        if not match:
            raise ValueError(f"{value!r} is not a duration; write for example 30s, 10m or 6h")
        return float(match[1]) * _DURATION[match[2] or "s"]
    return value


def _bytes(value: object) -> object:
    """`1000`, `"64MB"`, `"2GiB"` -> bytes."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in _SIZE:
            raise ValueError(f"{value!r} is not a size; write for example 64MB or 2GiB")
        return int(float(match[1]) * _SIZE[match[2].upper()])
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]


def _header(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise ValueError("a header's name is expected, such as x-session-id")
    name = value.lower()
    if name in _TAKEN_HEADERS:
        raise ValueError(f"{name} means something else already")
    return name


def _origin(value: object) -> object:
    if value != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", str(value)):
        raise ValueError(f"{value!r} is not an origin; write for example https://app.example.com")
    return value


def _http_url(value: object) -> object:
    if value is not None and not re.fullmatch(r"https?://[^/\s?#@]+/[^\s?#]*", str(value)):
        raise ValueError(
            f"{value!r} is not the address of a collector; write for example http://127.0.0.1:4318/v1/traces"
        )
    return value


def _redis_url(value: object) -> object:
    # The value is not repeated: it may hold a password.
    if value is not None and not re.match(r"(rediss?://[^/\s]+|unix://(\S*@)?/)", str(value)):
        raise ValueError("a Redis is expected, such as redis://10.0.0.5:6379/0 or unix:///run/redis.sock")
    return value


def _ip_address(value: object) -> object:
    if value is None:
        return None
    try:
        address = ipaddress.ip_address(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is not an IP address; write for example 10.0.0.5") from None
    if address.is_loopback or address.is_unspecified:
        raise ValueError(f"{value} is not an address at which other machines reach this one; leave it unset for one")
    return str(address)


_TAKEN_HEADERS = frozenset(
    {"authorization", "connection", "content-encoding", "content-length", "content-type", "cookie", "host", "origin"}
    | {"traceparent", "transfer-encoding", "x-phi-details", "x-request-id", "x-resume-from"}
)
HeaderName = Annotated[str, BeforeValidator(_header)]
Origin = Annotated[str, BeforeValidator(_origin)]
# With a path, and without secrets in it.
HttpUrl = Annotated[str, BeforeValidator(_http_url)]
RedisUrl = Annotated[str, BeforeValidator(_redis_url)]
# That other machines reach.
IPAddress = Annotated[str, BeforeValidator(_ip_address)]
