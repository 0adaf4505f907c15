// openai for JavaScript against a server: node clients.mjs URL KEY MESSAGES. A chat, a stream, and errors; one line says what came.

import assert from "node:assert";
import { createRequire } from "node:module";

const require = createRequire(new URL("../build/clients/", import.meta.url));
const { OpenAI, BadRequestError } = require("openai");

const [baseURL, apiKey, messages] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const asked = { model: "needle", messages: JSON.parse(messages), max_tokens: 8 };

const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.strictEqual(streamed, whole);

const long = [{ role: "user", content: "dog ".repeat(99_999) }];
await assert.rejects(client.chat.completions.create({ ...asked, messages: long }), (error) => {
  assert(error instanceof BadRequestError);
  assert.strictEqual(error.code, "context_length_exceeded");
  return true;
});
console.log(`answers ${JSON.stringify(whole)}`);
