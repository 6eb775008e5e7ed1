"""Who is asking: from the key a client sends to the tenant its sessions belong to.

Owns: reading the key from the headers, and who a caller is while no keys are set up. Knows nothing of the keys' file,
of sessions, and of which route wants what; keeps no key.
"""

from __future__ import annotations

import hashlib

from starlette.datastructures import Headers
from starlette.requests import Request

from phi_cluster.cluster.errors import Forbidden, InvalidRequest, Unauthorized
from phi_cluster.cluster.turn_api import Identity, Keys

DEFAULT_TENANT = "default"
ENGINES_SCOPE = "engines"
ADMIN_SCOPE = "admin"


def identify(headers: Headers, keys: Keys | None) -> Identity:
    """Who sends these headers. Without `keys` whoever reaches the server may look after its engines.

    Raises `Unauthorized`, and `InvalidRequest` on several Authorization headers: which is meant cannot be known.
    """
    if keys is None:
        return Identity(anonymous_tenant(headers), frozenset({ENGINES_SCOPE}))
    scheme, key = _credentials(headers)
    if not key or scheme != "bearer":
        raise Unauthorized("No API key was sent; send one as the header: Authorization: Bearer KEY")
    return keys.identify(key)


def anonymous_tenant(headers: Headers) -> str:
    """While no keys are set up two keys are two tenants all the same, who share no session, named or not: `default`
    without a key, else `key-` and 32 hex digits made from it.

    A scheme other than Bearer counts as a part of the key, so that it too leads to a tenant of its own.
    """
    scheme, key = _credentials(headers)
    if not key:
        return DEFAULT_TENANT
    named = key if scheme == "bearer" else f"{scheme} {key}"
    return "key-" + hashlib.blake2b(named.encode(), digest_size=16, person=b"phi tenant").hexdigest()


def identity_of(request: Request) -> Identity:
    """The caller, as the door (door.py) has found."""
    identity: Identity = request.state.identity
    return identity


def tenant_of(request: Request) -> str:
    """Whose sessions this request is about."""
    return identity_of(request).tenant


def require(request: Request, scope: str) -> None:
    """Raises `Forbidden` unless the caller has the scope."""
    if not identity_of(request).has(scope):
        raise Forbidden(f"This API key has no scope {ADMIN_SCOPE}, which this wants")


def _credentials(headers: Headers) -> tuple[str, str]:
    """(scheme in lower case, key); a key without a scheme has the scheme ""."""
    given = headers.getlist("authorization")
    if len(given) > 1:
        raise InvalidRequest("Authorization: send this header once", param="authorization")
    scheme, _, key = (given[0].strip() if given else "").partition(" ")
    if scheme.lower() == "bearer" or key:
        return scheme.lower(), key.strip()
    return "", scheme
