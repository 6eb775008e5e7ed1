"""The live page: its files and their headers, and the page itself in a real browser over fakes of 5,000 sessions."""

import asyncio
import re
from dataclasses import replace

import httpx
import pytest
from playwright.async_api import expect

from phi_cluster.cluster.turn_api import Position, TextDelta, TurnFinished, TurnStarted

FILES = ("main.js", "dom.js", "api.js", "style.css", "icon.svg")
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


@pytest.mark.parametrize("path", ["/ui", "/ui/", *(f"/ui/{name}" for name in FILES)])
async def test_files_come_with_a_strict_policy(client, path):
    answer = await client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.head(path)).status_code == 200


async def test_all_files_of_the_page_are_served_and_name_no_other_host(client):
    seen, open_ = set(), ["/ui"]
    while open_:
        path = open_.pop()
        seen.add(path)
        text = (await client.get(path)).text
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert "innerHTML" not in text
        open_ += [one for one in re.findall(r'"(/ui/[a-z.]+)"', text) if one not in seen]
    assert {f"/ui/{name}" for name in FILES} <= seen
    assert (await client.get("/ui/nothing.js")).status_code == 404
    assert (await client.get("/ui/../http/door.py")).status_code == 404
    assert (await client.post("/ui")).status_code == 405


async def test_the_door(make_app, settings, keys):
    """With keys the page is for everybody, what it shows is not; without, only for this machine's names."""
    transport = httpx.ASGITransport(app=make_app(settings, keys=keys))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
        assert (await client.get("/ui")).status_code == 200
        assert (await client.get("/ui/main.js")).status_code == 200
        assert (await client.get("/uix")).status_code == 401
        assert (await client.get("/v1/sessions")).status_code == 401
    transport = httpx.ASGITransport(app=make_app(replace(settings, allowed_hosts=("edge.test",))))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
        assert (await client.get("/ui")).status_code == 200
        assert (await client.get("/ui", headers={"host": "evil.test"})).status_code == 403
        assert (await client.get("/ui", headers={"origin": "http://evil.test"})).status_code == 403


def _fill(sessions, tenant="default", count=5000):
    for number in range(count):
        session_id = f"s{number:04}"
        sessions.add(tenant, session_id)
        if number >= 64:
            more = {"state": "hibernated", "kv_cache_bytes": 0, "disk_bytes": 23_000 * number, "process_bytes": 0}
        else:
            more = {"state": "active" if number % 3 else "held", "kv_cache_bytes": 2_000_000 + 700_000 * number}
        sessions.known[tenant, session_id] |= {**more, "num_tokens": 90 * number, "turns": number % 40}


# Before `open_page` in every test: a server does not end while a browser still listens to it.
@pytest.fixture
async def url(serve, app, sessions, watch):
    _fill(sessions)
    watch.add()
    return await serve(app)


async def test_five_thousand_sessions(url, open_page):
    page = await open_page(url)
    rows = page.locator("#table tbody tr")
    await expect(rows).to_have_count(50)
    await expect(page.locator("#sessions-figures")).to_have_text("5,000 · 42 active · 22 held · 4,936 hibernated")
    await expect(page.locator("#page")).to_have_text("1–50 of 5,000")
    # The largest first.
    await expect(rows.first).to_contain_text("s0063")
    await expect(page.locator(".blocks button")).to_have_count(64)
    await page.get_by_role("button", name="Tokens", exact=True).click()
    await expect(rows.first).to_contain_text("s4999")
    await page.get_by_role("button", name="Next", exact=True).click()
    await expect(page.locator("#page")).to_have_text("51–100 of 5,000")
    await expect(rows.first).to_contain_text("s4949")
    await page.get_by_role("button", name="Previous").click()
    await expect(page.locator("#page")).to_have_text("1–50 of 5,000")
    await page.get_by_label("Sessions in this state").select_option("held")
    await expect(page.locator("#page")).to_have_text("1–22 of 22")
    await page.get_by_label("Sessions in this state").select_option("")
    await page.get_by_label("Find sessions by a part of their id").fill("s420")
    await expect(page.locator("#page")).to_have_text("1–10 of 10")
    await page.get_by_label("Find sessions by a part of their id").fill(HOSTILE[:20])
    await expect(page.get_by_text("No sessions.")).to_be_visible()


async def test_the_keyboard_is_enough(url, open_page):
    page = await open_page(url)
    await expect(page.locator("#table tbody tr")).to_have_count(50)
    await page.locator("#table tbody tr").first.focus()
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.locator("#chat-title")).to_have_text("s0062")
    await expect(page.locator('#table tr[aria-selected="true"]')).to_contain_text("s0062")
    await page.get_by_role("button", name="Clear", exact=True).focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_be_hidden()


async def test_a_chat_is_shown_and_goes_on(url, open_page, sessions, turns):
    sessions.said["s0063"] = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": "Was it?" + HOSTILE},
    ]
    turns.script = [
        TurnStarted(31, 17),
        TextDelta(HOSTILE, 2, Position(2, 1)),
        TextDelta(" indeed", 1, Position(3, 2)),
        TurnFinished("stop", 31, 17, 4),
    ]
    page = await open_page(url)
    await page.get_by_role("button", name="s0063, 46.1 MB").click()
    said = page.locator("#messages .said p")
    await expect(said).to_have_text([HOSTILE, "Was it?" + HOSTILE])
    await page.get_by_label("Message").fill("And now?")
    await page.get_by_label("Message").press("Enter")
    await expect(said).to_have_text([HOSTILE, "Was it?" + HOSTILE, "And now?", HOSTILE + " indeed"])
    await expect(page.locator("#measures")).to_contain_text("31 prompt · 17 cached · first token")
    [request] = turns.requests
    assert request.session_id == "s0063"
    assert [one["content"] for one in request.messages] == [HOSTILE, "Was it?" + HOSTILE, "And now?"]
    assert await page.locator("img, #messages script").count() == 0
    assert await page.evaluate("window.hacked") is None


async def test_nothing_is_sent_before_what_was_said_is_known(url, open_page, sessions, turns):
    """Or the server would take it for an edited history, and cut the conversation back."""
    sessions.said["s0063"] = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    page = await open_page(url)

    async def late(route):
        await asyncio.sleep(1)
        await route.continue_()

    await page.route("**/messages", late)
    await page.get_by_role("button", name="s0063, 46.1 MB").click()
    await page.get_by_label("Message").fill("Three")
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator("#messages .said p")).to_have_text(["One", "Two", "Three", "Hello, wörld"])
    assert [one["content"] for one in turns.requests[0].messages] == ["One", "Two", "Three"]


async def test_actions_ask_first(url, open_page, sessions):
    page = await open_page(url)
    await page.locator("#table tbody tr", has_text="s0063").click()
    for name, done in (("Recycle", "recycles"), ("Hibernate", "state"), ("Clear", "num_tokens")):
        before = sessions.known["default", "s0063"][done]
        await page.get_by_role("button", name=name, exact=True).click()
        await page.get_by_role("button", name="Cancel").click()
        assert sessions.known["default", "s0063"][done] == before
        await page.get_by_role("button", name=name, exact=True).click()
        await page.get_by_role("dialog").get_by_role("button", name=name).click()
        await expect(page.locator("#messages .note").last).to_contain_text(f"{name}: done")
        assert sessions.known["default", "s0063"][done] != before
    await page.get_by_role("button", name="Fork", exact=True).click()
    await page.get_by_label("New id").fill("../x")
    await page.get_by_label("New id").press("Enter")
    await expect(page.locator("#messages .note").last).to_contain_text("Fork: id: a session id is")
    await page.get_by_role("button", name="Fork", exact=True).click()
    await page.get_by_label("New id").fill("forked")
    await page.get_by_label("New id").press("Enter")
    await expect(page.locator("#chat-title")).to_have_text("forked")
    await page.get_by_role("button", name="Delete", exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await expect(page.locator("#chat-title")).to_have_text("New session")
    assert ("default", "forked") not in sessions.known


async def test_events_come_as_they_happen(url, open_page, watch):
    page = await open_page(url)
    events = page.locator("#events li")
    await expect(events).to_have_count(1)
    watch.add("default", "s0001")
    await expect(events).to_have_count(2)
    await events.first.get_by_role("button", name="s0001").click()
    await expect(page.locator("#chat-title")).to_have_text("s0001")


async def test_keys(serve, make_app, settings, keys, usage, sessions, watch, open_page):
    """Kept in this tab, sent as a header, and nowhere else."""
    for tenant in ("alice", "bob"):
        sessions.add(tenant, f"of-{tenant}")
    page = await open_page(await serve(make_app(settings, keys=keys, usage=usage)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    await expect(page.get_by_role("alert")).to_contain_text("wants a key")
    await page.get_by_label("Key").fill("phi-bob")
    await page.get_by_label("Key").press("Enter")
    await expect(page.locator("#table tbody tr")).to_have_text(re.compile("of-bob"))
    # What only an admin may see is not there.
    await expect(page.locator(".events")).to_be_hidden()
    await page.get_by_label("Key").fill("phi-alice")
    await page.get_by_label("Key").press("Enter")
    await expect(page.locator("#table tbody tr")).to_have_text(re.compile("of-alice"))
    await expect(page.locator(".events")).to_be_visible()
    await page.get_by_label("Tenant").fill("*")
    await page.get_by_label("Tenant").press("Enter")
    await page.locator("#table tbody tr", has_text="of-bob").click()
    await expect(page.locator("#messages .note")).to_contain_text("another tenant's session")
    await expect(page.get_by_label("Message")).to_be_disabled()
    assert await page.evaluate("Object.values(sessionStorage)") == ["phi-alice"]
    assert await page.evaluate("localStorage.length + document.cookie.length") == 0
    assert not [one for one in asked if "phi-" in one.partition("/v1/")[2]]


async def test_light_and_dark(url, open_page):
    grounds = []
    for scheme in ("light", "dark"):
        page = await open_page(url, color_scheme=scheme)
        await expect(page.locator("#table tbody tr")).to_have_count(50)
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])))
    assert grounds[0] > 600 > 150 > grounds[1]
