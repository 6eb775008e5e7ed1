"""What other processes say took time, as spans of whoever called them.

Owns: the way from a `Stretch` to a span. The processes of sessions are kept small, so they export nothing themselves:
they answer with what they measured, and clocks of one machine agree. Knows nothing of what was called.
"""

from __future__ import annotations

from collections.abc import Iterable

from phi_cluster.cluster.messages import Stretch
from phi_cluster.cluster.span import Span


def tell_stretches(span: Span, stretches: Iterable[Stretch]) -> None:
    """As parts of the span in which the call was made."""
    for one in stretches:
        span.begin(one.name, at=one.began).end(at=one.began + one.seconds)
