"""What takes time in a request, as a span: what is measured calls these, and what becomes of it is elsewhere.

Owns: the protocols of a span and of whoever makes them, and the span that nobody looks at. A leaf: it imports nothing
of ours. Knows nothing of OpenTelemetry, of turns or of processes.

Never text of prompts and replies in a name or an attribute: spans leave the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol, TypeAlias

Attributes: TypeAlias = "Mapping[str, str | bool | int | float | tuple[str, ...]]"

NO_ATTRIBUTES: Attributes = MappingProxyType({})


class Span(Protocol):
    """Something that takes time. `at` is wall clock in seconds, None: now."""

    @property
    def traceparent(self) -> str | None:
        """As W3C has it: for whoever goes on with it elsewhere; None: nobody looks at it."""
        ...

    def begin(self, name: str, attributes: Attributes = NO_ATTRIBUTES, *, at: float | None = None) -> Span:
        """A part of it begins."""
        ...

    def note(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Something happens in it, now."""
        ...

    def end(self, error: str | None = None, *, at: float | None = None) -> None:
        """Once. `error`: what kind of error ended it."""
        ...


class Tracer(Protocol):
    """Whoever makes the spans."""

    def begin(self, name: str, parent: str | None, attributes: Attributes) -> Span:
        """A request begins; `parent` is what its client sent as W3C `traceparent`, whatever that is."""
        ...


class _Untraced:
    """Nothing is measured, of its parts neither."""

    traceparent = None

    def begin(self, name: str, attributes: Attributes = NO_ATTRIBUTES, *, at: float | None = None) -> Span:
        return self

    def note(self, attributes: Attributes) -> None:
        pass

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        pass

    def end(self, error: str | None = None, *, at: float | None = None) -> None:
        pass


UNTRACED: Span = _Untraced()


@contextmanager
def spanning(parent: Span, name: str, attributes: Attributes = NO_ATTRIBUTES) -> Iterator[Span]:
    """A part that is as long as the block."""
    span = parent.begin(name, attributes)
    try:
        yield span
    except BaseException as error:
        span.end(error_type(error))
        raise
    span.end()


def error_type(error: BaseException) -> str:
    """What kind of error it is: our code, or the class's name. Never its message, which may quote what was sent."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return getattr(error, "code", None) or type(error).__name__
