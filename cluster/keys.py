"""API keys: the file that lists them, and who a key is.

Owns: the file's format, making a key, and reading the file again when it changes. Keeps hashes only. Knows nothing of
HTTP, of sessions, and of how limits are kept.

The file (YAML or JSON) holds one entry for each holder of keys, who is a tenant:

    keys:
      - name: alice
        hash: sha256:...             # or a list of them: several keys, for the time in which one replaces the other
        scopes: [admin]              # may see all tenants and renew engines
        expires: 2027-01-31          # valid until then (UTC)
        limits: {requests_per_minute: 60, tokens_per_minute: 20000, concurrent_turns: 4, sessions: 100, kv_bytes: 2GiB}

A key is 32 random bytes, so one round of SHA-256 hides it: nobody can try them all.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from phi_cluster.cluster.config_values import Bytes
from phi_cluster.cluster.errors import StartError, Unauthorized
from phi_cluster.cluster.messages import TenantLimits
from phi_cluster.cluster.turn_api import Identity

_PREFIX = "phi-"
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
NAME_RULE = "1 to 64 of the characters A-Z a-z 0-9 . _ -"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_MAX_FILE_NBYTES = 16 * 2**20
_Count = Annotated[int, Field(ge=1, le=2**53)]


def new_key() -> str:
    """A key that nobody can guess. It is shown once; only its hash is kept."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """As the file has it."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _name(given: object) -> object:
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise ValueError(f"a name is {NAME_RULE}")
    return given


def _hashes(given: object) -> object:
    hashes = [given] if isinstance(given, str) else given
    if not isinstance(hashes, list) or not hashes:
        raise ValueError("a hash, or a list of hashes, is expected")
    for one in hashes:
        if not isinstance(one, str) or not _HASH.fullmatch(one):
            raise ValueError("a hash is sha256: and 64 hexadecimal digits; make one with: phi-cluster keys new NAME")
    return hashes


def _moment(given: object) -> object:
    if isinstance(given, str):
        try:
            given = datetime.fromisoformat(given)
        except ValueError:
            raise ValueError("a date such as 2027-01-31 or 2027-01-31T12:00:00 is expected") from None
    if isinstance(given, datetime):
        return (given if given.tzinfo else given.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(given, date):
        return datetime(given.year, given.month, given.day, tzinfo=timezone.utc).timestamp()
    raise ValueError("a date such as 2027-01-31 is expected")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyLimits(_Part):
    """What a tenant may use; what is left out has no limit of its own."""

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent_turns: _Count | None = None
    sessions: _Count | None = None
    kv_bytes: Annotated[Bytes, Field(ge=1)] | None = None


class KeyEntry(_Part):
    """A holder of keys. `expires` is in seconds since 1970."""

    name: Annotated[str, BeforeValidator(_name)]
    hash: Annotated[tuple[str, ...], BeforeValidator(_hashes)]
    scopes: tuple[Literal["admin"], ...] = ()
    expires: Annotated[float, BeforeValidator(_moment)] | None = None
    limits: KeyLimits = KeyLimits()


class _KeysFile(_Part):
    keys: tuple[KeyEntry, ...]


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Raises StartError in one sentence that names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o002:
                raise StartError(f"{path} may be written to by everybody: chmod o-w {path}")
            raw = file.read(_MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise StartError(f"cannot read the keys in {path}: {error.strerror}") from None
    if len(raw) > _MAX_FILE_NBYTES:
        raise StartError(f"{path} has more than {_MAX_FILE_NBYTES} bytes: that is no file of keys")
    try:
        data = json.loads(raw) if path.suffix == ".json" else yaml.safe_load(raw.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise StartError(f"{path} is not valid {kind}: {' '.join(str(error).split())[:200]}") from None
    try:
        entries = _KeysFile.model_validate(data).keys
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StartError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    _check_unique(path, "name", [entry.name for entry in entries])
    _check_unique(path, "hash", [one for entry in entries for one in entry.hash])
    return entries


def _check_unique(path: Path, field: str, values: list[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise StartError(f"{path}: {field} {value} is there twice; each belongs to one entry")
        seen.add(value)


class KeyFile:
    """The keys of a file, as it was when it was last whole (implements turn_api.Keys)."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        equal: Callable[[bytes, bytes], bool] = hmac.compare_digest,
    ):
        """`clock` is wall time in seconds. Raises StartError."""
        self._path = path
        self._clock = clock
        self._equal = equal
        self._seen = self._loaded = self._look()
        self._take(read_keys(path))

    @property
    def names(self) -> list[str]:
        """The tenants', in the order of the file."""
        return list(self._limits)

    def identify(self, key: str) -> Identity:
        """See turn_api.Keys."""
        given = hash_of(key).encode()
        found: KeyEntry | None = None
        # All of them, whichever it is.
        for known, entry in self._hashes:
            if self._equal(known, given):
                found = entry
        if found is None:
            raise Unauthorized("This API key is not valid here")
        if found.expires is not None and self._clock() >= found.expires:
            raise Unauthorized("This API key has expired")
        return Identity(found.name, frozenset(found.scopes))

    def limits_of(self, tenant: str) -> TenantLimits:
        """Of a tenant that has no key (any more): none."""
        return self._limits.get(tenant, TenantLimits())

    def refresh(self) -> str | None:
        """To be called now and then: reads a file that has changed, once it rests. Returns what there is to say.

        A version that is broken changes nothing: whoever wrote half a file must not lock all out, or let them in.
        """
        now = self._look()
        rests, self._seen = now == self._seen, now
        if not rests or now == self._loaded:
            return None
        self._loaded = now
        try:
            self._take(read_keys(self._path))
        except StartError as error:
            return f"the former API keys stay valid: {error.message}"
        return f"API keys were read again: {len(self._limits)} in {self._path}"

    def _take(self, entries: tuple[KeyEntry, ...]) -> None:
        self._hashes = [(one.encode(), entry) for entry in entries for one in entry.hash]
        self._limits = {entry.name: TenantLimits(**entry.limits.model_dump()) for entry in entries}

    def _look(self) -> tuple[int, int, int]:
        """What changes with the file; zeros if there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino


def entry_text(name: str, key: str, scopes: tuple[str, ...] = ()) -> str:
    """The key's entry, to be put under `keys:` of a YAML file. Raises StartError on a name that cannot be."""
    if not _NAME.fullmatch(name):
        raise StartError(f"{name[:80]!r} cannot be the name of a key: {NAME_RULE}")
    # A name may look like a number, or like `no`.
    quoted = yaml.safe_dump(name).splitlines()[0]
    lines = [f"  - name: {quoted}", f"    hash: {hash_of(key)}"]
    if scopes:
        lines.append(f"    scopes: [{', '.join(scopes)}]")
    return "\n".join(lines) + "\n"


def append_entry(path: Path, text: str) -> None:
    """Adds an entry to a YAML file of keys, or makes the file (0600); what is there stays as it is written.

    Raises StartError, with the file as it was, if the result would not be a file of keys.
    """
    if path.suffix == ".json":
        raise StartError(f"{path}: entries are added to YAML files only; put the entry there by hand")
    before = ""
    if path.exists():
        read_keys(path)
        before = path.read_text(encoding="utf-8")
    beginning = before if before.endswith("\n") or not before else before + "\n"
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write((beginning or "keys:\n") + text)
        try:
            read_keys(fresh)
        except StartError as error:
            remedy = "put it there by hand" if before else "report this"
            raise StartError(
                f"{path}: the entry does not fit behind what is there ({error.message}); {remedy}"
            ) from None
        if before:
            os.chmod(fresh, path.stat().st_mode & 0o7777)
        os.replace(fresh, path)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from None
    finally:
        fresh.unlink(missing_ok=True)
