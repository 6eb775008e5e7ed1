// The server's API. Owns: the key (in this tab's sessionStorage, and in the Authorization header; nowhere else), and
// reading streams of events.

const KEY = "phi-cluster-key";

export const key = () => sessionStorage.getItem(KEY) ?? "";
export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const given = { ...headers };
  if (key()) given.authorization = `Bearer ${key()}`;
  if (body !== undefined) given["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, signal, headers: given, cache: "no-store", credentials: "omit",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  let message = `The server answered with status ${answer.status}.`;
  try {
    message = (await answer.json()).error.message ?? message;
  } catch {
    // Not our server's words.
  }
  throw new Refused(answer.status, message);
}

/** The JSON answer. Raises `Refused`. */
export async function ask(path, options) {
  return (await send(path, options)).json();
}

/** A path with parameters; those without a value are left out. */
export function withQuery(path, parameters) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value != null && value !== ""));
  return query.size ? `${path}?${query}` : path;
}

/** The events of a stream: `{id, data}` each, data parsed; ends behind [DONE] or with the connection. */
export async function* stream(path, options) {
  const answer = await send(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let id, data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("data: ")) data += line.slice(6);
        else if (line.startsWith("id: ")) id = line.slice(4);
      }
      if (data === "[DONE]") return;
      if (data) yield { id, data: JSON.parse(data) };
    }
  }
}
