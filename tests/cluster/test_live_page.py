"""The live page over a real server, in a real browser: talking, looking after a session, and a death that it shows."""

from __future__ import annotations

import os
import re
import signal

import pytest
from playwright.async_api import expect

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> Hello.'
# A turn on a machine that does other things too.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def server(launch):
    server = launch({"sessions": {"spawn_interval": "100ms"}, "engine": {"standby_engines": 1}})
    yield server
    server.stop()


async def say(page, text):
    """One turn, and what it measured."""
    replies = await page.locator('.said[data-role="assistant"]').count()
    await page.get_by_label("Up to").fill("24")
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator('.said[data-role="assistant"]')).to_have_count(replies + 1)
    await expect(page.locator("#messages")).to_have_attribute("aria-busy", "false", timeout=PATIENCE)
    measures = page.locator("#measures")
    await expect(measures).to_have_text(re.compile(r"\d+ prompt · \d+ cached · first token \d.* generated"))
    return [int(number) for number in re.findall(r"(\d+) (?:prompt|cached)", await measures.inner_text())]


async def act(page, name):
    await page.get_by_role("button", name=name, exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name=name).click()


async def test_a_session_from_its_first_word_to_its_end(server, client, open_page):
    page = await open_page(server.url)
    await expect(page.get_by_role("status")).to_have_text("ready", timeout=PATIENCE)
    first = await say(page, HOSTILE)
    assert first[1] == 0
    session_id = await page.locator("#chat-title").inner_text()
    second = await say(page, "And now?")
    # All of the first turn but its last token, which has no keys and values yet.
    assert second[1] >= first[0]
    row = page.locator("#table tbody tr", has_text=session_id)
    await expect(row).to_contain_text(re.compile("active|held"))
    said = await page.locator(".said p").all_inner_texts()
    assert said[0] == HOSTILE

    # Whoever opens the page later finds the conversation as it is, and goes on with its cache.
    page = await open_page(server.url)
    await row_of(page, session_id).click()
    await expect(page.locator(".said p")).to_have_text(said)
    third = await say(page, "Once more.")
    assert third[1] >= second[0]
    assert await page.locator("#messages img, #messages script").count() == 0
    assert await page.evaluate("window.hacked") is None

    await act(page, "Hibernate")
    await expect(row_of(page, session_id)).to_contain_text("hibernated")
    await expect(page.locator("#events")).to_contain_text("a session hibernated")
    await page.get_by_role("button", name="Fork", exact=True).click()
    await page.get_by_label("New id").fill("the-fork")
    await page.get_by_label("New id").press("Enter")
    await expect(page.locator("#chat-title")).to_have_text("the-fork")
    await expect(page.locator(".said p").first).to_have_text(HOSTILE)
    await act(page, "Clear")
    await expect(page.locator("#messages .note")).to_contain_text("Clear: done")
    assert client.session("the-fork")["num_tokens"] == 0
    await act(page, "Delete")
    await expect(row_of(page, "the-fork")).to_have_count(0)
    assert set(client.sessions()) == {session_id}


def row_of(page, session_id):
    return page.locator("#table tbody tr", has_text=session_id)


async def test_an_engine_that_is_killed_shows_as_an_event(server, client, open_page, until):
    client.conversation("before").say("Hello.", max_tokens=4)
    until(lambda: client.http.get("/v1/cluster").json()["replicas"][0]["standby_engines"], "a standby engine", 60)
    page = await open_page(server.url)
    processes = page.locator("#processes tbody")
    await expect(processes).to_contain_text("standby engine")
    pid = client.session("before")["engine_pid"]
    await expect(processes).to_contain_text(str(pid))
    os.kill(pid, signal.SIGKILL)
    events = page.locator("#events li")
    await expect(events.filter(has_text="an engine was lost (death)")).to_have_count(1)
    await expect(events.filter(has_text=re.compile("an engine took over after .* s"))).to_have_count(1)
    await expect(processes.get_by_text(str(pid))).to_have_count(0, timeout=PATIENCE)
    await row_of(page, "before").click()
    await expect(page.locator(".said")).to_have_count(2)
    prompt, cached = await say(page, "Are you still there?")
    assert 0 < cached < prompt


def test_events_can_be_read_on(client):
    """By number, and nothing twice."""
    whole = client.http.get("/v1/events?limit=1000").json()
    middle = whole["data"][len(whole["data"]) // 2]["number"]
    rest = client.http.get(f"/v1/events?after={middle}").json()
    assert [one["number"] for one in rest["data"]] == [one["number"] for one in whole["data"] if one["number"] > middle]
    assert {"engine_started", "session_hibernated", "session_forked", "engine_died"} <= {
        one["kind"] for one in whole["data"]
    }
    assert "Hello" not in str(whole)
