// The official openai client against a running endpoint: node client.mjs BASE_URL KEY. Ends with 1 at the first thing wrong.
import OpenAI from "openai";
import assert from "node:assert/strict";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 100_000 });
const user = (content) => [{ role: "user", content }];
const model = (await client.models.list()).data[0].id;

const tests = {
  async chat() {
    const question = { model, messages: user("Name three colours."), max_tokens: 40, temperature: 0 };
    const whole = await client.chat.completions.create(question);
    const stream = await client.chat.completions.create({ ...question, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
  },
  async completions() {
    const answer = await client.completions.create({ model, prompt: "The opposite of hot is", max_tokens: 8, temperature: 0 });
    assert.match(answer.choices[0].text, /cold/);
    const question = { model, prompt: "The opposite of hot is", max_tokens: 8, temperature: 0, stream: true };
    let text = "";
    for await (const chunk of await client.completions.create(question)) text += chunk.choices[0]?.text ?? "";
    assert.equal(text, answer.choices[0].text);
  },
  async schema() {
    const schema = {
      type: "object", properties: { n: { type: "integer" } }, required: ["n"], additionalProperties: false,
    };
    const answer = await client.chat.completions.create({
      model, messages: user("A number, as JSON."), max_tokens: 60, temperature: 0,
      response_format: { type: "json_schema", json_schema: { name: "n", schema, strict: true } },
    });
    assert.equal(typeof JSON.parse(answer.choices[0].message.content).n, "number");
  },
  async tools() {
    const tool = {
      type: "function",
      function: {
        name: "add", strict: true,
        parameters: {
          type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } }, required: ["a", "b"],
          additionalProperties: false,
        },
      },
    };
    const question = { model, tools: [tool], max_tokens: 100, temperature: 0 };
    const messages = user("What is 2 plus 3?");
    const answer = await client.chat.completions.create({ ...question, messages, tool_choice: "required" });
    const call = answer.choices[0].message.tool_calls[0];
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["a", "b"]);
    let streamed = "";
    const stream = await client.chat.completions.create({ ...question, messages, tool_choice: "required", stream: true });
    for await (const chunk of stream) {
      for (const delta of chunk.choices[0]?.delta?.tool_calls ?? []) {
        if (delta.index === 0) streamed += delta.function?.arguments ?? "";
      }
    }
    assert.equal(streamed, call.function.arguments);
    const told = [...messages, answer.choices[0].message];
    for (const { id } of answer.choices[0].message.tool_calls) told.push({ role: "tool", tool_call_id: id, content: "5" });
    const last = await client.chat.completions.create({ ...question, messages: told, tool_choice: "none" });
    assert.ok(last.choices[0].message.content.length > 0);
  },
  async responses() {
    const question = { model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 32 };
    const whole = await client.responses.create(question);
    assert.match(whole.output_text, /Paris/);
    let text = "";
    for await (const event of await client.responses.create({ ...question, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, whole.output_text);
    const next = await client.responses.create({ ...question, input: "And of Italy?", previous_response_id: whole.id });
    assert.ok(next.output_text.length > 0);
    await client.responses.delete(whole.id);
    await assert.rejects(client.responses.retrieve(whole.id), OpenAI.NotFoundError);
  },
  async errors() {
    const wrong = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
    const create = (body) => client.chat.completions.create({ model, messages: user("Hi"), ...body });
    await assert.rejects(create({ model: "gpt-99" }), OpenAI.NotFoundError);
    await assert.rejects(create({ temperature: 9 }), OpenAI.BadRequestError);
    await assert.rejects(create({ messages: [] }), OpenAI.BadRequestError);
    await assert.rejects(create({ messages: user("x".repeat(17 << 20)) }), (error) => error.status === 413);
    await assert.rejects(create({ messages: user("word ".repeat(20000)) }), /context/);
    await assert.rejects(create({ stream: true, guided_json: { type: "nonsense" } }), OpenAI.BadRequestError);
    await assert.rejects(client.get("/nothing"), OpenAI.NotFoundError);
  },
  async abort() {
    const messages = user("Count to one thousand.");
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 3000, stream: true });
    for await (const chunk of stream) {
      if (chunk.choices.length > 0) break;
    }
    stream.controller.abort();
  },
};

for (const [name, run] of Object.entries(tests)) {
  await run();
  console.log(`ok ${name}`);
}
