"""What must hold when all is quiet again: the journals against what clients were told, and nothing left behind.

Owns: these checks. Knows nothing of how the run went.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from typing import TYPE_CHECKING

from phi_cluster.cluster.messages import CommitTurn
from phi_cluster.cluster.session.transcript import Transcript
from tests.simulation import language
from tests.simulation.loop import Violation
from tests.simulation.watch import Asked

if TYPE_CHECKING:
    from tests.simulation.world import World


def check(world: World) -> None:
    """Raises Violation."""
    _check_journals(world)
    _check_acknowledged(world)
    _check_leftovers(world)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def _check_journals(world: World) -> None:
    """All that was ever written: by whom, once, with the epoch that was his, and made of the network's tokens."""
    epochs: dict[str, int] = {}
    transcripts: dict[str, Transcript] = defaultdict(Transcript)
    seen: set[tuple[str, int, str]] = set()
    for what, digest, life, value in world.disk.history:
        if what == "epoch":
            epochs[digest] = value
        elif what == "fill":
            transcripts[digest] = Transcript.replay(value)
        elif what in ("clear", "delete"):
            transcripts.pop(digest, None)
        else:
            turn: CommitTurn = value
            name = turn.request_id
            asked = world.watch.asked.get(name)
            if asked is None:
                raise Violation(f"{name}: nobody asked for what is in the journal")
            _expect(asked.key.digest == digest, f"{name}: it is in another session's journal")
            is_new = (digest, life, name) not in seen
            _expect(is_new or asked.num_connections > 1, f"{name}: it is in the journal twice")
            seen.add((digest, life, name))
            _expect(
                turn.epoch == epochs[digest], f"{name}: its epoch {turn.epoch} was over: {epochs[digest]} had begun"
            )
            owner = world.watch.epochs.get((digest, life, turn.epoch))
            _expect(owner == name, f"{name}: the epoch it was recorded with belongs to {owner}")
            if asked.has_changed:
                transcripts[digest].apply(turn)
            else:
                _check_turn(turn, asked, transcripts[digest])
    for asked in world.watch.asked.values():
        if asked.outcome == "finished" and asked.recorded is not None and not asked.has_changed:
            _expect(asked.recorded == asked.reply, f"{asked.request_id}: tokens are missing in the journal")
    for digest, journal in world.disk.files.items():
        stored = Transcript.replay(journal.load()).token_ids
        _expect(stored == transcripts[digest].token_ids, "a journal does not hold what was written to it")


def _check_turn(turn: CommitTurn, asked: Asked, transcript: Transcript) -> None:
    name = turn.request_id
    match = transcript.match(asked.prompt_text)
    before = transcript.token_ids[: match.num_kept_tokens].tolist()
    ids = array("i")
    ids.frombytes(turn.token_ids)
    token_ids = transcript.token_ids[: turn.num_kept_tokens].tolist() + ids.tolist()
    prompt, reply = token_ids[: turn.num_prompt_tokens], token_ids[turn.num_prompt_tokens :]
    if asked.prompt_ids is None:
        # No engine took it in.
        asked.prompt_ids = prompt
    _expect(language.text_of(prompt) == asked.prompt_text, f"{name}: the journal's prompt says something else")
    _expect(prompt == asked.prompt_ids, f"{name}: another prompt is in the journal than was computed")
    _expect(prompt[: len(before)] == before, f"{name}: it was not built on the stored ids")
    _expect(reply == asked.reply[: len(reply)], f"{name}: other tokens are in the journal than were generated")
    asked.recorded = reply
    _expect(all(language.is_of(asked.owner, i) for i in token_ids), f"{name}: a foreign token is in the journal")
    transcript.apply(turn)


def _check_acknowledged(world: World) -> None:
    """Each finished turn of a named session is recorded, in the order in which clients were told."""
    places = {turn.request_id: i for i, (what, *_, turn) in enumerate(world.disk.history) if what == "commit"}
    finished = [a for a in world.watch.asked.values() if a.outcome == "finished" and not a.key.ephemeral]
    for asked in finished:
        if asked.request_id not in places:
            _expect(asked.resets != asked.resets_at_end, f"{asked.request_id}: acknowledged, and not in the journal")
    recorded = [a for a in finished if a.request_id in places]
    for one in recorded:
        for later in recorded:
            if one.key == later.key and one.ended < later.at:
                _expect(places[one.request_id] < places[later.request_id], "turns are recorded in another order")


def _check_leftovers(world: World) -> None:
    for replica in world.replicas:
        _expect(replica.turns.num_running == 0, "a turn is open")
        _expect(replica.engines.num_streams == 0, "a sequence is open")
        _expect(not replica.directory._background, "a replica still works on something")
    keeper = world.node_sessions()._custody
    _expect(world.disk.memories.keys() <= world.disk.files.keys(), "a hibernated memory of no session is left")
    entries = list(keeper.roster)
    at_home = {entry.actor.process: entry for entry in entries if entry.actor is not None}
    warm = [pooled.handle.process_.identity for pooled in keeper.hands._pool._warm]
    sessions = [entry.session for entry in entries if entry.session is not None]
    for process in world.processes.values():
        if process.kind == "actor" and process.alive:
            entry = at_home.get(process.identity)
            held = process.instance._session
            if entry is None:
                if process.up_at + 1.0 > world.loop.now:
                    # It is only being started.
                    continue
                _expect(process.identity in warm, f"{process} is left, and nobody's")
                _expect(held is None or held.describe().state == "moved", f"{process} waits and holds a session")
            else:
                _expect(held is not None and held.key == entry.key, f"{process} does not hold its session")
                sessions.append(held)
        elif process.kind == "engine" and process.alive:
            _expect(not process.fds, f"{process} still maps a session's memory")
    _expect(len({s.key.digest for s in sessions}) == len(sessions), "a session is held twice")
    resident: dict[str, int] = {}
    mapped = 0
    for session in sessions:
        stats = session.describe()
        _expect(stats.state == "active", f"{stats.key.session_id}: it is {stats.state}")
        _expect(not stats.in_turn and not session.in_turn, f"{stats.key.session_id}: a turn of it is open")
        _expect(stats.num_waiting == 0, f"{stats.key.session_id}: somebody waits for it")
        resident[stats.key.digest] = stats.kv_cache_bytes
        mapped += 1
    open_maps = sum(len(p.fds) for p in world.processes.values() if p.alive and p.kind in ("actor", "keeper"))
    kept = sum(entry.memory is not None for entry in at_home.values())
    _expect(open_maps == mapped + kept, f"{open_maps} memories are open for {mapped} sessions, {kept} of them twice")
    for entry in entries:
        _expect(entry.memory is None or entry.actor is not None, "the memory of a session without an actor is kept")
    for digest, nbytes in keeper.ledger._leases.items():
        _expect(digest in resident, f"{nbytes} bytes are leased for a session that is not there")
        _expect(nbytes == resident[digest], f"{nbytes} bytes are leased for {resident[digest]}")
    _expect(keeper.leases.num_waiting == 0, "somebody waits for memory")
