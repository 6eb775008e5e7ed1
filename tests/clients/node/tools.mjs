// A tool loop of the official Node client, against the server whose URL is the first argument. Ends with an error at the
// first thing that is not as it should be; prints what it did.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "node", maxRetries: 0, timeout: 120_000 });
const done = [];
const model = (await client.models.list()).data[0].id;
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { name: "weather", description: "Of a city", parameters };
const ask = [{ role: "user", content: "How is the weather in Rome?" }];
const good = (text) => assert.ok(["Rome", "Oslo"].includes(JSON.parse(text).city));

{
  const tools = [{ type: "function", function: weather }];
  const fields = { model, tools, temperature: 0, parallel_tool_calls: false };
  const first = await client.chat.completions.create({ ...fields, messages: ask, tool_choice: "required" });
  const { message, finish_reason } = first.choices[0];
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  good(call.function.arguments);
  const streamed = client.chat.completions.stream({ ...fields, messages: ask, tool_choice: "required" });
  assert.deepEqual((await streamed.finalMessage()).tool_calls[0].function, call.function);
  const messages = [...ask, message, { role: "tool", tool_call_id: call.id, content: "Sunny." }];
  const second = await client.chat.completions.create({ ...fields, messages, tool_choice: "none", max_tokens: 8 });
  assert.ok(second.choices[0].message.content.length > 0);
  assert.ok(second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1);
  done.push("chat");
}

{
  const tools = [{ type: "function", ...weather, strict: true }];
  const fields = { model, tools, temperature: 0, parallel_tool_calls: false, max_output_tokens: 64 };
  const first = await client.responses.create({ ...fields, input: ask, tool_choice: "required" });
  const [call] = first.output;
  assert.equal(call.type, "function_call");
  good(call.arguments);
  const input = [{ type: "function_call_output", call_id: call.call_id, output: "Sunny." }];
  const next = { input, previous_response_id: first.id, tool_choice: "none", max_output_tokens: 16 };
  const second = await client.responses.create({ ...fields, ...next });
  assert.ok(second.output_text.length > 0);
  done.push("response");
}

console.log(JSON.stringify(done));
