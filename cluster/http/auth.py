"""Who is asking: from the key a client sends to the tenant its sessions belong to.

Owns: that mapping. Keys are not checked against a list of valid ones here; but two keys are two tenants, who
share no session, named or not. Knows nothing of sessions and keeps no key.
"""

from __future__ import annotations

import hashlib

from starlette.datastructures import Headers

from phi_cluster.cluster.errors import InvalidRequest

DEFAULT_TENANT = "default"


def tenant_of(headers: Headers) -> str:
    """`default` without a key, else `key-` and 32 hex digits made from the key.

    A scheme other than Bearer counts as a part of the key, so that it too leads to a tenant of its own.
    Raises `InvalidRequest` on several Authorization headers: which of them is meant cannot be known.
    """
    given = headers.getlist("authorization")
    if len(given) > 1:
        raise InvalidRequest("Authorization: send this header once", param="authorization")
    credentials = given[0].strip() if given else ""
    scheme, _, rest = credentials.partition(" ")
    key = rest.strip() if scheme.lower() == "bearer" else credentials
    if not key:
        return DEFAULT_TENANT
    return "key-" + hashlib.blake2b(key.encode(), digest_size=16, person=b"phi tenant").hexdigest()
