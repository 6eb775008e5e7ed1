"""A session's journal, copied from the disk while the server runs, or after it was killed.

Owns: reading the file without touching it. Knows nothing of what ought to be in it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from starlette.datastructures import Headers

from phi_cluster.cluster.http.auth import anonymous_tenant
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.sqlite_journal import journal_path
from tests.chaos.history import JournalCopy, JournalRow
from tests.chaos.talker import Conversation

# Named as JournalRow's fields are.
_TURNS = """
    SELECT epoch, request_id, num_kept_tokens, num_kept_chars, length(token_ids) / 4 AS num_new_tokens, text,
        num_completion_tokens, finish_reason
    FROM turns ORDER BY epoch
"""


def key_of(talk: Conversation) -> SessionKey:
    """Its session's full name."""
    assert talk.session is not None
    return SessionKey(anonymous_tenant(Headers(talk.headers)), talk.session)


def copy_journal(state_dir: Path, talk: Conversation, *, after_kill: bool = False) -> JournalCopy:
    """What is stored of the conversation now."""
    assert talk.session is not None
    copy = JournalCopy(
        time.monotonic(),
        talk.session,
        talk.script.name,
        epoch=0,
        rows=[],
        said=list(talk.said),
        acknowledged=list(talk.acknowledged),
        after_kill=after_kill,
    )
    path = journal_path(state_dir, key_of(talk))
    try:
        # Without `mode=ro` a missing one would be made.
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=10)) as connection:
            connection.execute("PRAGMA query_only = ON")
            copy.epoch = connection.execute("SELECT epoch FROM session").fetchone()[0]
            connection.row_factory = sqlite3.Row
            for row in connection.execute(_TURNS):
                fields = dict(row)
                copy.rows.append(JournalRow(**fields | {"text": fields["text"].decode("utf-8", "replace")}))
    except sqlite3.Error as error:
        copy.error = f"{type(error).__name__}: {error}"
    return copy
