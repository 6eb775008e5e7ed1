"""Query parameters: one page of a list, and no parameter that nobody knows.

Owns: `limit`, `order` and `after` as OpenAI's lists have them, and the strictness. Knows nothing of what is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.response_api import ItemPage, Page

DEFAULT_PAGE = 20
MAX_PAGE = 100

PAGE_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "limit",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
    },
    {
        "name": "order",
        "in": "query",
        "required": False,
        "schema": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    },
    {"name": "after", "in": "query", "required": False, "schema": {"type": "string"}},
]


def parameters_of(request: Request, known: Sequence[str]) -> dict[str, str]:
    """The parameters. Raises `InvalidRequest` naming one that is unknown or repeated."""
    return _once(request.query_params.multi_items(), known)


def _once(items: Iterable[tuple[str, str]], known: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in items:
        if name not in known:
            raise InvalidRequest(f"{name[:64]} is not a parameter here: {_told(known)}", param=name[:64])
        if name in given:
            raise InvalidRequest(f"{name}: send this parameter once", param=name)
        given[name] = value
    return given


def _told(known: Sequence[str]) -> str:
    if len(known) < 2:
        return f"there is {known[0] if known else 'none'}"
    return f"there are {', '.join(known[:-1])} and {known[-1]}"


def query_of(request: Request, known: Sequence[str], includes: Sequence[str] = ()) -> dict[str, str]:
    """`parameters_of`, where OpenAI has `include` too: for what is told anyway (`includes`), without effect."""
    given = request.query_params.multi_items()
    for name, value in given:
        if name.removesuffix("[]") == "include" and value not in includes:
            raise InvalidRequest(f"include: {value[:64]} is not supported: leave it out", param="include")
    return _once([one for one in given if one[0].removesuffix("[]") != "include"], known)


def limit_of(given: dict[str, str], default: int, most: int) -> int:
    """How many are asked for. Raises `InvalidRequest`."""
    limit = given.get("limit", str(default))
    # No more digits than fit: int() of a million of them takes seconds.
    if not re.fullmatch("[0-9]{1,4}", limit, re.ASCII) or not 1 <= int(limit) <= most:
        raise InvalidRequest(f"limit must be an integer from 1 to {most}", param="limit")
    return int(limit)


def flag_of(given: dict[str, str], name: str) -> bool:
    """Raises `InvalidRequest`."""
    value = given.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value == "true"


def page_of(request: Request) -> Page:
    """Raises `InvalidRequest` naming a parameter that is wrong, unknown or repeated."""
    given = query_of(request, ("limit", "order", "after"))
    limit, order = limit_of(given, DEFAULT_PAGE, MAX_PAGE), given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    return Page(limit, given.get("after"), ascending=order == "asc")


def item_list(page: ItemPage) -> bytes:
    """OpenAI's list of items. Its ids are empty where there are none: its clients expect strings."""
    items = page.items
    return to_json(
        {
            "object": "list",
            "data": items,
            "has_more": page.has_more,
            "first_id": items[0]["id"] if items else "",
            "last_id": items[-1]["id"] if items else "",
        }
    )
