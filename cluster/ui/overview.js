// The strip of speeds and the table of processes. Owns: how /v1/cluster is shown. Knows nothing of sessions.

import { byId, el, keyed, say, sparkline } from "/ui/dom.js";
import { bytes, count, latency, rate, seconds } from "/ui/format.js";

const TILES = [
  { name: "Tokens generated", unit: "/s", of: (s) => s.generation_tokens_per_second, show: rate },
  { name: "First token", of: (s) => s.ttft_seconds?.p50, show: latency, more: (s) => `p95 ${latency(s.ttft_seconds?.p95)}` },
  { name: "Between tokens", of: (s) => s.inter_token_seconds?.p50, show: latency, more: (s) => `p95 ${latency(s.inter_token_seconds?.p95)}` },
  { name: "Whole reply", of: (s) => s.e2e_seconds?.p50, show: latency, more: (s) => `p95 ${latency(s.e2e_seconds?.p95)}` },
  {
    name: "Prompt cached", of: (s) => (s.prompt_tokens_per_second ? s.cached_tokens_per_second / s.prompt_tokens_per_second : null),
    show: (share) => (share == null ? "–" : `${Math.round(share * 100)} %`), more: (s) => `${rate(s.prompt_tokens_per_second)} tok/s in`,
  },
  { name: "Requests", unit: "/s", of: (s) => s.requests_per_second, show: rate, more: (s, c) => `${c.requests_running} running, ${c.requests_waiting} waiting` },
];

export function showSpeeds(cluster) {
  keyed(byId("speeds"), TILES, (tile) => tile.name,
    (tile) => el("div", { class: "tile" },
      el("h3", {}, tile.name), el("p", { class: "value num" }), el("p", { class: "more num muted" }), el("div", {})),
    (child, tile) => {
      const [, value, more, chart] = child.children;
      const now = cluster?.last_minute ?? {};
      say(value, cluster ? tile.show(tile.of(now)) + (tile.unit && tile.of(now) != null ? ` ${tile.unit}` : "") : "–");
      say(more, cluster && tile.more ? tile.more(now, cluster) : "");
      chart.replaceChildren(sparkline((cluster?.history ?? []).map((s) => tile.of(s) ?? null), `${tile.name}, last five minutes`));
    });
}

/** One row a process: what it is, where, how old, how large. */
function rows(cluster) {
  const found = [];
  for (const replica of cluster.replicas) {
    const silent = replica.silent_seconds > 3 ? ` silent for ${seconds(replica.silent_seconds)}` : "";
    found.push({ kind: "replica", pid: replica.pid, node: replica.node_id, age: replica.age_seconds, size: replica.private_bytes,
      more: `${replica.requests_running} running, ${replica.requests_waiting} waiting${silent}` });
    const engine = replica.engine;
    if (engine) {
      found.push({ kind: "engine", pid: engine.pid, node: replica.node_id, age: engine.age_seconds, size: engine.private_bytes,
        more: `${count(engine.steps)} steps, +${bytes(engine.private_growth_bytes)} since settled` });
    }
    for (const standby of replica.standby_engines) {
      found.push({ kind: "standby engine", pid: standby.pid, node: replica.node_id, size: standby.private_bytes, more: "ready to take over" });
    }
  }
  for (const node of cluster.nodes) {
    found.push({ kind: "keeper", pid: node.keeper.pid, node: node.id, size: node.keeper.private_bytes, more: `${node.warm_actors} warm actors` });
    const actors = node.session_actors;
    found.push({ kind: "session actors", node: node.id, size: actors.private_bytes, more: `${actors.count} with a session` });
  }
  const controller = cluster.controller;
  found.push({ kind: "controller", pid: controller.pid, age: controller.age_seconds, size: controller.private_bytes, more: "" });
  return found;
}

export function showProcesses(cluster) {
  const table = byId("processes");
  if (!table.tHead.rows.length) {
    table.tHead.append(el("tr", {}, ...["Process", "Pid", "Node", "Age", "Private", ""].map((name, i) =>
      el("th", { scope: "col", class: [1, 3, 4].includes(i) ? "right" : null }, name))));
  }
  const found = cluster ? rows(cluster) : [];
  keyed(table.tBodies[0], found, (row) => `${row.kind}/${row.pid ?? row.node}`,
    () => el("tr", {}, el("th", { scope: "row" }), el("td", { class: "right" }), el("td", { class: "muted" }),
      el("td", { class: "right" }), el("td", { class: "right" }), el("td", { class: "muted" })),
    (child, row) => {
      const texts = [row.kind, row.pid ?? "", row.node ? row.node.slice(0, 8) : "", row.age == null ? "" : seconds(row.age), bytes(row.size), row.more];
      texts.forEach((text, i) => say(child.cells[i], text));
    });
  say(byId("processes-figures"), cluster ? `weights ${bytes(cluster.weights_bytes)} on each of ${cluster.nodes.length} node${cluster.nodes.length === 1 ? "" : "s"}` : "");
}
