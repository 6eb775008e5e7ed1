"""Two servers, as on two machines, and one Redis that has their sessions: either goes on with what the other began, a
lost machine takes no turn with it, and while Redis is away there are errors that say so."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import Refused
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

QUESTIONS = (
    "My name is Odalys. Name three rivers.",
    "Which one is the longest?",
    "And the shortest?",
    "What is my name?",
)
HOW = {"temperature": 0.8, "seed": 5, "max_tokens": 24}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    process = RedisProcess(tmp_path_factory.mktemp("r"))
    yield process
    process.kill()


@pytest.fixture(scope="module")
def servers(launch, process):
    config = {"journal": process.url, "sessions": {"spawn_interval": "100ms"}}
    servers = [launch(config), launch(config)]
    yield servers
    # The last one first: what the other has in /dev/shm was there before it.
    for server in reversed(servers):
        if server.main.lives:
            server.stop()


@pytest.fixture
def second(servers, make_client):
    client = make_client(servers[1])
    yield client
    client.close()


def test_while_redis_is_away_turns_are_refused_and_afterwards_they_go_on(second, process):
    talk, unnamed = second.conversation("patient"), second.conversation(None)
    talk.say(QUESTIONS[0], **HOW)
    with process.stopped():
        with pytest.raises(Refused) as refused:
            talk.say(QUESTIONS[1], **HOW)
        assert refused.value.status == 503
        assert refused.value.error["code"] == "journal_unavailable"
        assert "retry-after" in refused.value.headers
        # What has no record needs none.
        assert unnamed.say(QUESTIONS[0], **HOW).text == talk.replies[0].text
    assert second.patient(talk, QUESTIONS[1], **HOW).cached >= talk.replies[0].prompt + talk.replies[0].completion - 1


def test_a_conversation_goes_on_wherever_it_is_continued_also_when_a_machine_is_lost(servers, second, make_client):
    first = make_client(servers[0])
    twin = second.conversation("twin")
    for question in QUESTIONS:
        twin.say(question, **HOW)
    here = first.conversation("wanderer")
    here.say(QUESTIONS[0], **HOW)
    # Made elsewhere after this server had started: it is found, listed or not.
    assert second.session("wanderer")["turns"] == 1
    there = second.resumed(here)
    assert there.say(QUESTIONS[1], **HOW).text == twin.replies[1].text
    here = first.resumed(there)
    with here.stream(QUESTIONS[2], **HOW) as torn:
        torn.read(4)
        servers[0].kill_all()
    there = second.resumed(here)
    with there.read_on(torn) as rest:
        rest.finish()
    assert "".join(torn.pieces) + there.replies[-1].text == twin.replies[2].text
    there.messages[-1]["content"] = twin.replies[2].text
    last = there.say(QUESTIONS[3], **HOW)
    assert last.text == twin.replies[3].text
    # In the memory that the second server has of it by now.
    assert last.cached >= twin.replies[2].prompt + twin.replies[2].completion - 1
    assert second.session("wanderer")["turns"] == 4
    first.close()
