// What the official Node client is used for, against the server whose URL is the first argument. Ends with an error at
// the first thing that is not as it should be; prints what it did.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "node", maxRetries: 0, timeout: 120_000 });
const done = [];
const step = async (name, work) => {
  await work();
  done.push(name);
};
const model = (await client.models.list()).data[0].id;
const short = { model, temperature: 0, max_output_tokens: 16 };

await step("chain", async () => {
  const first = await client.responses.create({ ...short, input: "My name is Odalys." });
  assert.ok(first.output_text.length > 0);
  const second = await client.responses.create({ ...short, input: "What is my name?", previous_response_id: first.id });
  assert.ok(second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens);
  assert.equal((await client.responses.retrieve(second.id)).output_text, second.output_text);
  const items = [];
  for await (const item of client.responses.inputItems.list(second.id)) items.push(item);
  assert.deepEqual(items.map((item) => item.content[0].text), ["What is my name?"]);
  await client.responses.delete(second.id);
  await assert.rejects(client.responses.retrieve(second.id), OpenAI.NotFoundError);
});

await step("stream", async () => {
  const events = [];
  for await (const event of await client.responses.create({ ...short, input: "Hello.", stream: true })) events.push(event);
  assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
  assert.equal(events[0].type, "response.created");
  assert.match(events.at(-1).type, /^response\.(completed|incomplete)$/);
  const text = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
  assert.equal(text, events.find((event) => event.type === "response.output_text.done").text);
  const managed = client.responses.stream({ ...short, input: "Hello." });
  assert.equal((await managed.finalResponse()).output_text, text);
});

await step("conversation", async () => {
  const conversation = await client.conversations.create({
    metadata: { topic: "demo" },
    items: [{ type: "message", role: "user", content: "My name is Odalys." }],
  });
  assert.deepEqual((await client.conversations.retrieve(conversation.id)).metadata, { topic: "demo" });
  await client.responses.create({ ...short, input: "What is my name?", conversation: conversation.id });
  const roles = [];
  for await (const item of client.conversations.items.list(conversation.id, { order: "asc", limit: 2 })) roles.push(item.role);
  assert.deepEqual(roles, ["user", "user", "assistant"]);
  assert.equal((await client.conversations.delete(conversation.id)).deleted, true);
  await assert.rejects(client.conversations.retrieve(conversation.id), OpenAI.NotFoundError);
});

await step("background", async () => {
  const ask = { model, temperature: 0, input: "Tell me a story.", max_output_tokens: 60, ignore_eos: true, background: true };
  const seen = [];
  let response;
  for await (const event of await client.responses.create({ ...ask, stream: true })) {
    seen.push(event);
    if (event.type === "response.created") response = event.response;
    if (event.type === "response.output_text.delta") break;
  }
  const after = seen.at(-1).sequence_number;
  for await (const event of await client.responses.retrieve(response.id, { stream: true, starting_after: after })) {
    seen.push(event);
  }
  assert.deepEqual(seen.map((event) => event.sequence_number), seen.map((_, index) => index));
  const over = await client.responses.retrieve(response.id);
  assert.equal(over.status, "incomplete");
  const deltas = seen.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
  assert.equal(deltas.join(""), over.output_text);
});

await step("cancel", async () => {
  const ask = { model, input: "Tell me a story.", max_output_tokens: 900, ignore_eos: true, background: true };
  const response = await client.responses.create(ask);
  assert.match(response.status, /^(queued|in_progress)$/);
  assert.equal((await client.responses.cancel(response.id)).status, "cancelled");
});

console.log(JSON.stringify(done));
