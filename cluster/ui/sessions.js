// The table of sessions. Owns: its order, filter and page, which the server carries out. Knows nothing of what is done with a
// session.

import { byId, el, keyed, say } from "/ui/dom.js";
import { ask, withQuery } from "/ui/api.js";
import { bytes, count, seconds } from "/ui/format.js";

const PAGE = 50;
const COLUMNS = [
  { name: "Session", sort: "id", ascends: true, of: (s) => s.id },
  { name: "Tenant", of: (s) => s.tenant, foreign: true },
  { name: "State", of: (s) => s.state },
  { name: "Tokens", sort: "tokens", right: true, of: (s) => count(s.num_tokens) },
  { name: "KV", sort: "kv_cache_bytes", right: true, of: (s) => bytes(s.kv_cache_bytes) },
  { name: "Disk", right: true, of: (s) => bytes(s.disk_bytes) },
  { name: "Process", right: true, of: (s) => (s.process_bytes ? bytes(s.process_bytes) : "–") },
  { name: "Turns", sort: "turns", right: true, of: (s) => count(s.turns) },
  { name: "Recycles", right: true, of: (s) => count(s.recycles) },
  { name: "Idle", sort: "idle", right: true, of: (s) => seconds(s.idle_seconds) },
  { name: "Age", sort: "age", right: true, of: (s) => seconds(s.age_seconds) },
];
const STATES = ["active", "held", "hibernated", "stored"];

export class SessionTable {
  /** `tenantOf()`: whose sessions, "" for one's own. `onSelect(id, tenant)`, `onError(error)`. */
  constructor(tenantOf, onSelect, onError) {
    this._tenantOf = tenantOf;
    this._onSelect = onSelect;
    this._onError = onError;
    this._sort = "kv_cache_bytes";
    this._descending = true;
    // Where each page before this one began.
    this._cursors = [];
    this._after = null;
    this._answer = null;
    this.selected = null;
    this._asked = 0;
    const table = byId("table");
    this._head = table.tHead;
    this._body = table.tBodies[0];
    this._head.append(el("tr", {}, ...COLUMNS.map((column) => this._headCell(column))));
    this._body.addEventListener("keydown", (event) => this._onKey(event));
    byId("state").append(el("option", { value: "" }, "all states"), ...STATES.map((state) => el("option", { value: state }, state)));
    byId("state").addEventListener("change", () => this.restart());
    let typing;
    byId("search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.restart(), 200);
    });
    byId("next").addEventListener("click", () => {
      this._cursors.push(this._after);
      this._after = this._answer.last_id;
      this.refresh();
    });
    byId("previous").addEventListener("click", () => {
      this._after = this._cursors.pop() ?? null;
      this.refresh();
    });
  }

  /** From the first page. */
  restart() {
    this._cursors = [];
    this._after = null;
    return this.refresh();
  }

  async refresh() {
    const mine = ++this._asked;
    // What cannot be in an id is found nowhere; the server would say so as an error.
    const search = byId("search").value.trim();
    try {
      const answer = await ask(withQuery("/v1/sessions", {
        limit: PAGE, after: this._after, sort: this._sort, order: this._descending ? "desc" : "asc",
        state: byId("state").value, search, tenant: this._tenantOf(),
      }));
      if (mine === this._asked) this._show(answer);
    } catch (error) {
      if (mine !== this._asked) return;
      if (error.status === 400 && this._after) return this.restart();
      if (error.status === 400 && search) return this._show({ data: [], has_more: false, totals: { sessions: 0, by_state: {}, kv_cache_bytes: 0, disk_bytes: 0 } });
      this._onError(error);
    }
  }

  select(id, tenant) {
    this.selected = id == null ? null : `${tenant ?? ""}/${id}`;
    for (const row of this._body.rows) row.setAttribute("aria-selected", String(row.dataset.key === this.selected));
  }

  _show(answer) {
    this._answer = answer;
    const isForeign = this._tenantOf() !== "";
    this._head.rows[0].cells[1].hidden = !isForeign;
    COLUMNS.forEach((column, i) => {
      if (column.sort) this._head.rows[0].cells[i].setAttribute("aria-sort", column.sort !== this._sort ? "none" : this._descending ? "descending" : "ascending");
    });
    keyed(this._body, answer.data, (session) => `${session.tenant ?? ""}/${session.id}`, (session) => this._row(session), (row, session) => {
      COLUMNS.forEach((column, i) => say(i === 2 ? row.cells[i].firstElementChild : row.cells[i], column.of(session)));
      row.cells[1].hidden = !isForeign;
      row.cells[2].firstElementChild.dataset.state = session.state;
      row.setAttribute("aria-selected", String(row.dataset.key === this.selected));
    });
    const rows = [...this._body.rows];
    if (!rows.some((row) => row.tabIndex === 0) && rows.length) rows[0].tabIndex = 0;
    const totals = answer.totals;
    const first = this._cursors.length * PAGE;
    byId("no-sessions").hidden = answer.data.length > 0;
    say(byId("page"), answer.data.length ? `${count(first + 1)}–${count(first + answer.data.length)} of ${count(totals.sessions)}` : "");
    const states = STATES.filter((state) => totals.by_state[state]).map((state) => `${count(totals.by_state[state])} ${state}`);
    say(byId("sessions-figures"), [count(totals.sessions), ...states].join(" · "));
    byId("next").disabled = !answer.has_more;
    byId("previous").disabled = !this._cursors.length;
  }

  _headCell(column) {
    const attributes = { scope: "col", class: column.right ? "right" : null };
    if (!column.sort) return el("th", attributes, column.name);
    return el("th", attributes, el("button", { type: "button", class: "sort", onclick: () => {
      this._descending = this._sort === column.sort ? !this._descending : !column.ascends;
      this._sort = column.sort;
      this.restart();
    } }, column.name));
  }

  _row(session) {
    const choose = () => this._onSelect(session.id, session.tenant);
    const row = el("tr", { tabindex: -1, onclick: choose },
      ...COLUMNS.map((column, i) => el(i ? "td" : "th", { class: column.right ? "right" : null, scope: i ? null : "row" })));
    row.cells[2].append(el("span", { class: "state" }));
    row.title = session.id;
    return row;
  }

  _onKey(event) {
    const row = event.target.closest("tr");
    const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling, Home: this._body.firstElementChild, End: this._body.lastElementChild }[event.key];
    if (next) {
      row.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else if (event.key === "Enter" || event.key === " ") row?.click();
    else return;
    event.preventDefault();
  }
}
