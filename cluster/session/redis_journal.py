"""The journal of clusters that share no disk: a Redis server has all sessions' turns.

Owns: what is stored there under which names, and how a turn is packed. Knows nothing of segments, actors or
transcripts; the connection, and what Redis's errors mean, are redis_server.py's.

Of a session there are three hashes, whose names hold only its digest: `session` (see _FIELDS; and `seat`, the node
that began its last turn: a journal that was written before there were nodes has none), `turns` (by epoch: a
row of journal_rows.py behind its checksum) and `index` (by epoch: what a commit must know of earlier turns, without
reading these). Scripts (redis_scripts.py) run on the server, so that each change is made whole or not at all, and no
two writers' mix. As durable as the server is: `appendonly yes` and `appendfsync always` for what a commit promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack

from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session import redis_scripts
from phi_cluster.cluster.session.journal import (
    Glance,
    JournalCorrupt,
    JournalInfo,
    JournalTooNew,
    filled,
    first_epoch,
    stale_epoch,
)
from phi_cluster.cluster.session.journal_rows import packed_checksum, row_to_turn, turn_to_row
from phi_cluster.cluster.session.redis_server import RedisServer

_PREFIX = "phi-cluster"
# So many sessions are asked for at once.
_BATCH = 500
_CHECKSUM_NBYTES = 5
_FIELDS = [
    "version",
    "tenant",
    "session_id",
    "ephemeral",
    "fingerprint",
    "created_at",
    "epoch",
    "turns",
    "activation",
    "recycles",
    "checksum",
    "num_tokens",
    "last_used",
]


def _names(digest: str) -> tuple[str, str, str]:
    # Braces: a session's names stay together wherever keys are spread over servers.
    stem = f"{_PREFIX}:{{{digest}}}"
    return f"{stem}:session", f"{stem}:index", f"{stem}:turns"


class RedisJournal:
    """See `Journal`."""

    def __init__(
        self, server: RedisServer, key: SessionKey, fingerprint: str, clock: Callable[[], float], node_id: str = ""
    ):
        """`node_id`: the seat of the turns that begin here ("": of none)."""
        self.key = key
        self._node_id = node_id
        self._server = server
        self._keys = _names(key.digest)
        self._fingerprint = fingerprint
        self._clock = clock

    def info(self) -> JournalInfo:
        return self._raise()

    def activate(self, *, recycled: bool) -> JournalInfo:
        return self._raise("activation", 1, "recycles", int(recycled))

    def take_epoch(self) -> JournalInfo:
        return self._raise("epoch", 1, seat=self._node_id)

    def commit(self, turn: CommitTurn) -> bool:
        row = turn_to_row(turn)
        total, data = _packed(row)
        said, *rest = self._run(
            redis_scripts.COMMIT,
            first_epoch(self._clock()),
            turn.epoch,
            turn.request_id,
            turn.num_kept_tokens,
            turn.num_kept_chars,
            total,
            data,
            turn.num_kept_tokens + len(turn.token_ids) // 4,
            repr(row[-1]),
            self._fingerprint,
        )
        if said == b"stale":
            raise stale_epoch(turn, int(rest[0]))
        return said == b"ok"

    def load(self) -> list[CommitTurn]:
        with self._server.translated(self._name) as client:
            transaction = client.pipeline(transaction=True)
            transaction.hmget(self._keys[0], "version", "checksum")
            transaction.hgetall(self._keys[2])
            (version, total), stored = transaction.execute()
        if int(version or 0) > redis_scripts.VERSION:
            raise self._too_new(int(version))
        if sum(map(self._checked, stored.values())) % redis_scripts.SUM != int(total or 0):
            raise self._corrupt("the turns' checksum is wrong")
        try:
            rows = [self._unpacked(epoch, data) for epoch, data in stored.items()]
            return [row_to_turn(self.key, row) for row in sorted(rows, key=lambda row: row[0])]
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self._corrupt(str(error)) from None

    def fill(self, turns: Sequence[CommitTurn], fingerprint: str) -> None:
        info = filled(turns, fingerprint, float(self._clock()))
        total, values = 0, []
        for row in map(turn_to_row, turns):
            one, data = _packed(row)
            total += one
            # As the script of a commit packs it.
            values += [row[0], msgpack.packb([row[1], row[2], row[3], one]), data]
        fields = self._fields(info) | {"checksum": total % redis_scripts.SUM}
        if turns:
            last = turns[-1]
            num_tokens = last.num_kept_tokens + len(last.token_ids) // 4
            fields |= {"num_tokens": num_tokens, "last_used": float(last.committed_at)}
        if self._run(redis_scripts.FILL, *_flat(fields), *values)[0] == b"there":
            raise ValueError("there is a journal of this session")

    def take_seat(self) -> None:
        """Turns belong to this journal's node from now on, until another one begins a turn."""
        if self._node_id:
            self._run(redis_scripts.SEAT, self._node_id)

    def clear(self) -> None:
        self._run(redis_scripts.CLEAR)

    def delete(self) -> None:
        with self._server.translated(self._name) as client:
            client.delete(*self._keys)

    def close(self) -> None:
        """The connection is the process's, not the session's."""

    @property
    def _name(self) -> str:
        return f"of session {self.key.digest[:12]}"

    def _raise(self, *by: Any, seat: str = "") -> JournalInfo:
        now = float(self._clock())
        new = JournalInfo(first_epoch(now), 0, 0, 0, self._fingerprint, now)
        _, flat, before = self._run(redis_scripts.RAISE, *_flat(self._fields(new)), seat, *by)
        stored = dict(zip(flat[::2], flat[1::2], strict=True))
        names = (stored[b"tenant"].decode(), stored[b"session_id"].decode(), stored[b"ephemeral"] == b"1")
        if names != (self.key.tenant, self.key.session_id, self.key.ephemeral):
            raise self._corrupt("it belongs to another session")
        epoch, turns, activation, recycles = (
            int(stored[name]) for name in (b"epoch", b"turns", b"activation", b"recycles")
        )
        fingerprint, created_at = stored[b"fingerprint"].decode(), float(stored[b"created_at"])
        return JournalInfo(epoch, turns, activation, recycles, fingerprint, created_at, before.decode() or None)

    def _fields(self, info: JournalInfo) -> dict[str, Any]:
        names = (self.key.tenant, self.key.session_id, int(self.key.ephemeral))
        counts = (info.epoch, info.turns, info.activation, info.recycles)
        values = (redis_scripts.VERSION, *names, info.fingerprint, info.created_at, *counts, 0, 0, info.created_at)
        return dict(zip(_FIELDS, values, strict=True))

    def _run(self, script: str, *arguments: Any) -> Any:
        with self._server.translated(self._name):
            answer = self._server.script(script)(keys=list(self._keys), args=list(arguments))
        if answer[0] == b"newer":
            raise self._too_new(int(answer[1]))
        return answer

    def _checked(self, data: bytes) -> int:
        """The checksum of what is stored for a turn."""
        found = packed_checksum(data[_CHECKSUM_NBYTES:])
        if found != int.from_bytes(data[:_CHECKSUM_NBYTES], "little"):
            raise self._corrupt("a turn's checksum is wrong")
        return found

    def _unpacked(self, epoch: bytes, data: bytes) -> list[Any]:
        row: list[Any] = msgpack.unpackb(data[_CHECKSUM_NBYTES:])
        if row[0] != int(epoch):
            raise self._corrupt("a turn lies under another one's epoch")
        return row

    def _corrupt(self, reason: str) -> JournalCorrupt:
        return JournalCorrupt(
            f"the journal {self._name} in Redis cannot be read ({reason}): restore it from a backup, or delete the"
            " session to begin the conversation anew"
        )

    def _too_new(self, version: int) -> JournalTooNew:
        return JournalTooNew(
            f"the journal {self._name} in Redis has version {version} and this program knows {redis_scripts.VERSION}:"
            " a later version wrote it; use that one"
        )


class RedisJournals:
    """All of a server's; implements custody.Journals."""

    # Other servers write there, too.
    shared = True

    def __init__(self, server: RedisServer, fingerprint: str, clock: Callable[[], float], node_id: str = ""):
        """`node_id`: see RedisJournal."""
        self._server = server
        self._fingerprint = fingerprint
        self._clock = clock
        self._node_id = node_id

    def open(self, key: SessionKey) -> RedisJournal:
        return RedisJournal(self._server, key, self._fingerprint, self._clock, self._node_id)

    def take_seat(self, key: SessionKey) -> None:
        """See Journals.take_seat."""
        self.open(key).take_seat()

    def keys(self) -> list[SessionKey]:
        """Raises JournalUnavailable."""
        found = []
        for names in self._batches("session"):
            for row in self._asked(names, "HMGET", "tenant", "session_id", "ephemeral"):
                # Deleted since it was found.
                if None not in row:
                    found.append(SessionKey(row[0].decode(), row[1].decode(), row[2] == b"1"))
        return found

    def nbytes(self) -> int:
        """Memory that Redis has for them, by its own estimate."""
        sizes = (self._asked(names, "MEMORY USAGE") for names in self._batches("*"))
        return sum(size or 0 for some in sizes for size in some)

    def glance(self, key: SessionKey) -> Glance | None:
        fields = ("num_tokens", "turns", "activation", "recycles", "created_at", "last_used")
        *row, seat = self._asked([_names(key.digest)[0]], "HMGET", *fields, "seat")[0]
        if None in row:
            return None
        tokens, turns, activation, recycles, created_at, last_used = row
        return Glance(
            *(int(tokens), int(turns), int(activation), int(recycles)),
            created_at=float(created_at),
            last_used=float(last_used),
            seat=seat and seat.decode(),
        )

    def _batches(self, kind: str) -> Iterator[list[Any]]:
        with self._server.translated("of all sessions") as client:
            names = list(client.scan_iter(match=f"{_PREFIX}:{{*}}:{kind}", count=1000))
        for first in range(0, len(names), _BATCH):
            yield names[first : first + _BATCH]

    def _asked(self, names: Sequence[Any], command: str, *arguments: str) -> list[Any]:
        """The answers to the same command for each name."""
        with self._server.translated("of all sessions") as client:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.execute_command(command, name, *arguments)
            return pipeline.execute()


def _packed(row: tuple[Any, ...]) -> tuple[int, bytes]:
    """The row's checksum, and what is stored."""
    packed = msgpack.packb(row)
    total = packed_checksum(packed)
    return total, total.to_bytes(_CHECKSUM_NBYTES, "little") + packed


def _flat(fields: dict[str, Any]) -> list[Any]:
    """Their number, with the values, and they."""
    return [2 * len(fields), *(one for pair in fields.items() for one in pair)]
