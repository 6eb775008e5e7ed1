// Events as they happen. Owns: the list, and following the stream for as long as the page is open.

import { ask, stream } from "/ui/api.js";
import { byId, el, say } from "/ui/dom.js";
import { clock } from "/ui/format.js";

const MOST = 300;
const GRAVE = /died|lost|hung|refused|replaced/;
const NOTABLE = /took_over|recycled|given_way/;

export class EventList {
  /** `onSelect(id, tenant)` when a session's name is clicked, `onEvent(event)` for each one that comes. */
  constructor(onSelect, onEvent) {
    this._onSelect = onSelect;
    this._onEvent = onEvent;
    this._list = byId("events");
    this._seen = new Set();
    this._following = null;
  }

  /** Begins anew: with another key other events are seen. */
  restart() {
    this._following?.abort();
    this._following = new AbortController();
    this._list.replaceChildren();
    this._seen.clear();
    this._follow(this._following.signal);
  }

  async _follow(signal) {
    let last = null;
    while (!signal.aborted) {
      try {
        if (last == null) {
          const page = await ask("/v1/events?limit=100", { signal });
          page.data.forEach((event) => this._add(event));
          last = page.last;
        }
        say(byId("events-state"), "");
        for await (const { data } of stream("/v1/events?stream=true", { headers: { "last-event-id": String(last) }, signal })) {
          if (data.error) break;
          last = data.number;
          this._add(data);
          this._onEvent(data);
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401 || error.status === 403) return say(byId("events-state"), "only for an admin's key");
        say(byId("events-state"), "connection lost, trying again");
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }

  _add(event) {
    // A new controller tells again what it has heard.
    if (this._seen.has(event.id)) return;
    this._seen.add(event.id);
    const weight = GRAVE.test(event.kind) ? "grave" : NOTABLE.test(event.kind) ? "notable" : "plain";
    const item = el("li", { "data-weight": weight, "data-kind": event.kind },
      el("time", { datetime: new Date(event.time * 1000).toISOString() }, clock(event.time)), el("span", { class: "text" }, event.text));
    if (event.session_id) item.append(el("button", { type: "button", class: "link", onclick: () => this._onSelect(event.session_id, event.tenant) }, event.session_id));
    this._list.prepend(item);
    while (this._list.children.length > MOST) this._list.lastElementChild.remove();
  }
}
