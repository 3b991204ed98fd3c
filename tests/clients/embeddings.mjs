// Vectors with the official openai client: node embeddings.mjs BASE_URL KEY. Ends with 1 at the first thing wrong.
import OpenAI from "openai";
import assert from "node:assert/strict";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 100_000 });
const model = (await client.models.list()).data[0].id;
const input = ["the cat sat on the dog", "a dog"];

const floats = (await client.embeddings.create({ model, input, encoding_format: "float" })).data;
assert.equal(floats.length, 2);
// Without a format the client asks for base64, and decodes it.
const decoded = (await client.embeddings.create({ model, input })).data;
decoded.forEach(({ embedding, index }) => {
  assert.equal(embedding.length, floats[index].embedding.length);
  embedding.forEach((number, place) => assert.ok(Math.abs(number - floats[index].embedding[place]) <= 1e-4));
});
const short = await client.embeddings.create({ model, input, dimensions: 8 });
assert.deepEqual(short.data.map(({ embedding }) => embedding.length), [8, 8]);
await assert.rejects(client.embeddings.create({ model, input, dimensions: 0 }), OpenAI.BadRequestError);
await assert.rejects(client.embeddings.create({ model: "gpt-99", input }), OpenAI.NotFoundError);
console.log("ok embeddings");
