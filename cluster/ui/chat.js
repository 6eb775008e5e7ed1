// The conversation with one session. Owns: what was said, sending, and what a turn measured. Everything that anybody says is
// put in as text.

import { ask, stream, withQuery } from "/ui/api.js";
import { byId, el, say } from "/ui/dom.js";
import { bytes, count, latency, seconds } from "/ui/format.js";

const ACTIONS = [
  { name: "recycle", label: "Recycle", text: "Its actor is renewed; memory and conversation stay." },
  { name: "hibernate", label: "Hibernate", text: "Its memory is given back, its cache goes to the disk; the next turn wakes it." },
  { name: "fork", label: "Fork", text: "A new session with the same conversation and a copy of the cache.", wantsId: true },
  { name: "clear", label: "Clear", text: "Conversation and cache are forgotten; the session's name stays.", isGrave: true },
  { name: "delete", label: "Delete", text: "Session, cache and journal are forgotten. This cannot be undone.", isGrave: true },
];

export class Chat {
  /** `model()` names the model, `onChange(id, tenant)` when there is another session to look at, `onTurn()` when one changed. */
  constructor(model, onChange, onTurn) {
    this._model = model;
    this._onChange = onChange;
    this._onTurn = onTurn;
    this._messages = [];
    this._running = null;
    this._forget();
    byId("new").addEventListener("click", () => onChange(null));
    byId("send").addEventListener("click", () => (this._running ? this._running.abort() : this._send()));
    byId("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this._running) this._send();
    });
    for (const action of ACTIONS) {
      byId("actions").append(el("button", { type: "button", "data-action": action.name, class: action.isGrave ? "grave" : null, onclick: () => this._act(action) }, action.label));
    }
  }

  /** Another session (null: a new one). `tenant` is "" for one's own: others are looked after, not read. */
  async show(id, tenant = "") {
    this._running?.abort();
    this._forget();
    [this.id, this.tenant] = [id, tenant];
    byId("actions").hidden = id == null;
    say(byId("chat-title"), id ?? "New session");
    say(byId("chat-state"), "");
    say(byId("measures"), "");
    byId("messages").replaceChildren();
    byId("message").disabled = byId("send").disabled = tenant !== "";
    if (id == null) return;
    if (tenant !== "") this._note("This is another tenant's session: it can be looked after, not read.");
    else this._loading = this._load(id);
    await this.refresh();
  }

  /** What was said before. */
  async _load(id) {
    try {
      const said = await ask(`/v1/sessions/${encodeURIComponent(id)}/messages`);
      if (this.id !== id) return;
      this._messages = said.data.map(({ role, content }) => ({ role, content }));
      for (const message of this._messages) this._bubble(message.role, message.content);
    } catch (error) {
      if (this.id !== id) return;
      this._isReadable = error.status === 404;
      if (!this._isReadable) this._note(error.message);
    }
  }

  /** What is known of the session now. */
  async refresh() {
    const { id } = this;
    if (id == null) return;
    try {
      const session = await ask(this._path());
      if (this.id === id) {
        say(byId("chat-state"), `${session.state} · ${count(session.num_tokens)} tokens · KV ${bytes(session.kv_cache_bytes)}` + (session.disk_bytes ? ` · disk ${bytes(session.disk_bytes)}` : "") +
          ` · ${count(session.turns)} turns · activation ${session.activation} · idle ${seconds(session.idle_seconds)}`);
      }
    } catch (error) {
      if (this.id === id && error.status === 404) say(byId("chat-state"), "not there (any more)");
    }
  }

  _forget() {
    this._messages = [];
    this._isReadable = true;
    this._loading = null;
  }

  _path(action = "") {
    return withQuery(`/v1/sessions/${encodeURIComponent(this.id)}${action}`, { tenant: this.tenant });
  }

  async _send() {
    const text = byId("message").value.trim();
    if (!text) return;
    // Who does not know what was said would cut the conversation back to what he says.
    const asked = this.id;
    await this._loading;
    if (!this._isReadable || this.id !== asked || this._running) return;
    byId("message").value = "";
    const isNew = this.id == null;
    if (isNew) this.id = `ui-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
    const { id } = this;
    const messages = [...this._messages, { role: "user", content: text }];
    this._bubble("user", text);
    const bubble = this._bubble("assistant", "");
    const running = (this._running = new AbortController());
    this._setRunning(true);
    if (isNew) say(byId("chat-title"), id);
    let said = "", usage = null, details = {};
    const began = performance.now();
    let first = null;
    try {
      const body = { model: this._model(), messages, max_tokens: byId("most").valueAsNumber || 256, stream: true, stream_options: { include_usage: true } };
      const headers = { "x-session-id": id, "x-phi-details": "1" };
      for await (const { data } of stream("/v1/chat/completions", { method: "POST", body, headers, signal: running.signal })) {
        if (data.error) throw new Error(data.error.message);
        usage = data.usage ?? usage;
        details = data.phi ?? details;
        for (const choice of data.choices) {
          if (!choice.delta?.content) continue;
          first ??= performance.now();
          said += choice.delta.content;
          if (this.id === id) {
            bubble.lastElementChild.textContent = said;
            this._scroll();
          }
        }
      }
    } catch (error) {
      if (this.id === id) this._note(error.name === "AbortError" ? "Stopped." : error.message, bubble);
    }
    if (this._running === running) {
      this._running = null;
      this._setRunning(false);
    }
    if (this.id !== id) return;
    // What was generated before a stop is part of the conversation; a turn that was refused is not.
    if (said || usage) this._messages = [...messages, { role: "assistant", content: said }];
    if (!said && !usage) bubble.remove();
    this._measure(usage, details, (first - began) / 1000, (performance.now() - first) / 1000);
    byId("actions").hidden = false;
    if (isNew) this._onTurn(id);
    else this._onTurn();
    await this.refresh();
  }

  _measure(usage, details, ttft, rest) {
    if (!usage) return say(byId("measures"), "");
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const parts = [`${count(usage.prompt_tokens)} prompt`, `${count(cached)} cached`, `first token ${latency(ttft)}`, `${count(usage.completion_tokens)} generated`];
    if (usage.completion_tokens > 1 && rest > 0) parts.push(`${((usage.completion_tokens - 1) / rest).toFixed(1)} tok/s`);
    if (details.engine_replaced) parts.push("engine replaced");
    say(byId("measures"), parts.join(" · "));
  }

  _setRunning(isRunning) {
    say(byId("send"), isRunning ? "Stop" : "Send");
    byId("messages").setAttribute("aria-busy", String(isRunning));
  }

  _bubble(role, text) {
    const bubble = el("div", { class: "said", "data-role": role }, el("span", { class: "who" }, role), el("p", {}, text));
    byId("messages").append(bubble);
    this._scroll();
    return bubble;
  }

  _note(text, before = null) {
    const note = el("p", { class: "note" }, text);
    if (before) before.after(note);
    else byId("messages").append(note);
    this._scroll();
  }

  _scroll() {
    const log = byId("messages");
    log.scrollTop = log.scrollHeight;
  }

  async _act(action) {
    const { id } = this;
    const answer = await confirmed(action, id);
    if (!answer || this.id !== id) return;
    try {
      if (action.name === "delete") {
        await ask(this._path(), { method: "DELETE" });
        this._onTurn();
        return this._onChange(null);
      }
      const made = await ask(this._path(`/${action.name}`), { method: "POST", body: answer.newId ? { id: answer.newId } : {} });
      if (action.name === "fork") {
        this._onTurn();
        return this._onChange(made.id, this.tenant);
      }
      if (action.name === "clear") {
        this._forget();
        byId("messages").replaceChildren();
      }
      this._note(`${action.label}: done, now ${made.state}.`);
    } catch (error) {
      this._note(`${action.label}: ${error.message}`);
    }
    this._onTurn();
    await this.refresh();
  }
}

/** Asks; null for no, else what was entered. */
function confirmed(action, id) {
  const dialog = byId("dialog");
  say(byId("dialog-title"), `${action.label} ${id}?`);
  say(byId("dialog-text"), action.text);
  byId("dialog-field").hidden = !action.wantsId;
  byId("dialog-input").value = "";
  const yes = byId("dialog-yes");
  say(yes, action.label);
  yes.classList.toggle("grave", Boolean(action.isGrave));
  dialog.showModal();
  (action.wantsId ? byId("dialog-input") : yes).focus();
  return new Promise((resolve) => {
    const done = new AbortController();
    const end = (answer) => {
      done.abort();
      dialog.close();
      resolve(answer);
    };
    const agree = () => end({ newId: byId("dialog-input").value.trim() });
    yes.addEventListener("click", agree, { signal: done.signal });
    byId("dialog-input").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      // Else it would press the button as well that gets the focus back.
      event.preventDefault();
      agree();
    }, { signal: done.signal });
    byId("dialog-no").addEventListener("click", () => end(null), { signal: done.signal });
    dialog.addEventListener("cancel", () => end(null), { signal: done.signal });
  });
}
