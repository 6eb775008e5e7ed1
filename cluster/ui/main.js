// The page. Owns: who tells whom, and how often the server is asked: not at all while nobody looks.

import { ask, key, setKey, withQuery } from "/ui/api.js";
import { Chat } from "/ui/chat.js";
import { byId, say } from "/ui/dom.js";
import { EventList } from "/ui/events.js";
import { showMemory } from "/ui/memory.js";
import { showProcesses, showSpeeds } from "/ui/overview.js";
import { SessionTable } from "/ui/sessions.js";

const CLUSTER_MS = 2000;
const SESSIONS_MS = 4000;
const LARGEST = 150;

let model = "";
let cluster = null;
// Whether this key may see the whole cluster: not known yet, or no.
let mayWatch = true;
let largest = { data: [], totals: { kv_cache_bytes: 0 } };

const tenant = () => byId("tenant").value.trim();
const chat = new Chat(() => model, select, (id) => {
  if (id != null) table.select(id, own());
  refreshSessions();
});
const table = new SessionTable(tenant, select, failed);
const events = new EventList(select, (event) => {
  if (event.kind.startsWith("session_")) soon();
});

/** One's own tenant, as the rows name it. */
let ownName = null;
const own = () => ownName ?? "";

function select(id, owner) {
  const isOwn = id == null || owner == null || owner === "" || owner === ownName || ownName == null;
  table.select(id, owner ?? own());
  chat.show(id, isOwn ? "" : owner);
  drawMemory();
  if (id == null) byId("message").focus();
}

function drawMemory() {
  showMemory(cluster, largest.data, largest.totals.kv_cache_bytes, table.selected, select);
}

function failed(error) {
  const wantsKey = error.status === 401;
  say(byId("notice"), wantsKey ? "This server wants a key: enter one above." : error.message);
  byId("notice").hidden = false;
  if (wantsKey && document.activeElement === document.body) byId("key").focus();
}

function status(state, text) {
  byId("status").dataset.state = state;
  say(byId("status"), text);
}

async function refreshCluster() {
  try {
    const answer = await fetch("/ready", { cache: "no-store" });
    status(answer.ok ? "ready" : "starting", answer.ok ? "ready" : (await answer.json()).error?.message ?? "not ready");
  } catch {
    return status("lost", "no answer");
  }
  if (mayWatch) {
    try {
      cluster = await ask("/v1/cluster");
    } catch (error) {
      cluster = null;
      if (error.status === 401 || error.status === 403) mayWatch = false;
      else if (error.status !== 503) failed(error);
    }
  }
  document.body.dataset.watches = String(mayWatch);
  showSpeeds(cluster);
  showProcesses(cluster);
  drawMemory();
}

async function refreshSessions() {
  const asked = tenant();
  try {
    const page = await ask(withQuery("/v1/sessions", { sort: "kv_cache_bytes", limit: LARGEST, tenant: asked }));
    if (asked !== tenant()) return;
    largest = page;
    if (!asked && page.data.length) ownName = page.data[0].tenant;
    byId("notice").hidden = true;
  } catch (error) {
    return failed(error);
  }
  drawMemory();
  await table.refresh();
}

let pending = null;
function soon() {
  pending ??= setTimeout(() => {
    pending = null;
    refreshSessions();
    chat.refresh();
  }, 400);
}

/** Again and again, one after the other, while the page is seen. */
async function every(milliseconds, work) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, milliseconds));
    if (!document.hidden) await work().catch(failed);
  }
}

async function begin() {
  mayWatch = true;
  cluster = null;
  ownName = null;
  byId("notice").hidden = true;
  try {
    const models = await ask("/v1/models");
    model = models.data[0]?.id ?? "";
    const context = models.data[0]?.max_model_len;
    if (context) {
      byId("most").max = String(context);
      byId("most").value = String(Math.min(byId("most").valueAsNumber || 256, Math.ceil(context / 4)));
    }
    say(byId("model"), model);
  } catch (error) {
    failed(error);
  }
  events.restart();
  await Promise.all([refreshCluster(), refreshSessions()]);
  const usage = key() ? await ask("/v1/usage").catch(() => null) : null;
  // With keys an admin may look at all tenants: only then is more than one's own told.
  byId("tenant-label").hidden = !(usage && mayWatch);
}

byId("key").value = key();
byId("key").addEventListener("change", () => {
  setKey(byId("key").value.trim());
  byId("tenant").value = "";
  select(null);
  begin();
});
byId("tenant").addEventListener("change", () => {
  select(null);
  refreshSessions();
  table.restart();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    refreshCluster();
    refreshSessions();
  }
});

showSpeeds(null);
begin();
every(CLUSTER_MS, refreshCluster);
every(SESSIONS_MS, async () => {
  await refreshSessions();
  await chat.refresh();
});
