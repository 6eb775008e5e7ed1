// KV memory: the budget as a bar, and who takes it as blocks. Owns: how it is drawn. Knows nothing of chats.

import { byId, el, keyed, say } from "/ui/dom.js";
import { bytes, count, percent } from "/ui/format.js";

const nameOf = (session) => `${session.tenant ?? ""}/${session.id}`;

/** `cluster` may be null (not for this key), `largest` are the sessions with the largest caches, `total` all bytes of theirs
 *  and of those that are not listed. */
export function showMemory(cluster, largest, total, selected, onSelect) {
  const nodes = cluster?.nodes ?? [];
  const budget = sum(nodes, (node) => node.kv_cache.budget_bytes);
  const leased = sum(nodes, (node) => Math.max(node.kv_cache.leased_bytes, sum(Object.values(node.kv_cache.bytes_by_state), (n) => n)));
  const used = cluster ? sum(nodes, (node) => sum(Object.values(node.kv_cache.bytes_by_state), (n) => n)) : total;
  const unnamed = sum(nodes, (node) => node.kv_cache.bytes_by_state.unnamed);
  const asleep = sum(nodes, (node) => node.hibernated_bytes);
  say(byId("memory-figures"), cluster
    ? `${bytes(used)} in use, ${bytes(leased)} leased of ${bytes(budget)} (${percent(budget ? leased / budget : 0)})` + (asleep ? `, ${bytes(asleep)} asleep on disk` : "")
    : `${bytes(used)} in use`);
  const box = byId("memory");
  if (!box.children.length) box.append(el("div", { class: "budget", role: "img" }, el("span", { class: "used" }), el("span", { class: "leased" })), el("div", { class: "blocks" }));
  const [bar, blocks] = box.children;
  bar.hidden = !cluster;
  bar.setAttribute("aria-label", `${percent(budget ? leased / budget : 0)} of the KV budget is leased`);
  bar.dataset.high = String(budget > 0 && leased / budget > 0.9);
  bar.children[0].style.width = `${budget ? Math.min(used / budget, 1) * 100 : 0}%`;
  bar.children[1].style.width = `${budget ? Math.min(Math.max(leased - used, 0) / budget, 1) * 100 : 0}%`;

  const shown = largest.filter((session) => session.kv_cache_bytes > 0).map((session) => ({ key: nameOf(session), session, size: session.kv_cache_bytes }));
  const rest = Math.max(used - unnamed - sum(shown, (block) => block.size), 0);
  if (unnamed > 0) shown.push({ key: "//unnamed", label: "unnamed conversations", size: unnamed });
  if (rest > 65536) shown.push({ key: "//others", label: cluster ? "other sessions" : "smaller sessions", size: rest });
  blocks.classList.toggle("empty", !shown.length);
  // A name where there is room for it; all of it is in the title, and read out.
  const widest = blocks.clientWidth / sum(shown, (block) => block.size);
  const fits = (text, size) => size * widest > 24 + 6.5 * text.length;
  keyed(blocks, shown, (block) => block.key,
    (block) => block.session
      ? el("button", { type: "button", class: "block", onclick: () => onSelect(block.session.id, block.session.tenant) })
      : el("span", { class: "block other", role: "img" }, el("span", {})),
    (child, block) => {
      child.style.flexGrow = String(block.size);
      const label = block.session ? `${block.session.id}, ${bytes(block.size)}, ${count(block.session.num_tokens)} tokens, ${block.session.state}` : `${block.label}, ${bytes(block.size)}`;
      if (child.title !== label) {
        child.title = label;
        child.setAttribute("aria-label", label);
      }
      if (block.session) {
        child.dataset.state = block.session.state;
        child.setAttribute("aria-pressed", String(block.key === selected));
        say(child, fits(block.session.id, block.size) ? block.session.id : "");
      } else {
        child.firstElementChild.hidden = !fits(block.label, block.size);
        say(child.firstElementChild, block.label);
      }
    });
}

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
