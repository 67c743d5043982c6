// The official SDK of Node.js: its stream helpers, and its tool runners over both APIs.

import OpenAI from "openai";
import { ResponsesToolRunner } from "openai/helpers/responses-tool-runner";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { API_KEY, BASE_URL, GREETING, MODEL, NOBODY, QUESTION, STRUCTURED, THOUGHT, Tools, check, tell } from "./telling.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const Place = z.object({ city: z.string(), people: z.number().int() });
const CITY = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const NAMES = ["get_weather", "get_time"];
const user = (content) => ({ role: "user", content });

// Chat completions

async function plain() {
  const answer = await client.chat.completions.create({ model: MODEL, messages: [user(GREETING)] });
  check(answer.usage.completion_tokens > 0, "no usage");
  return { text: answer.choices[0].message.content };
}

async function streamed() {
  return heardOf(client.chat.completions.stream({ model: MODEL, messages: [user(GREETING)], stream_options: { include_usage: true } }));
}

async function streamed_reasoning() {
  let reasoning = "";
  const stream = client.chat.completions.stream({ model: MODEL, messages: [user(THOUGHT)] });
  stream.on("chunk", (chunk) => { reasoning += chunk.choices[0]?.delta.reasoning_content ?? ""; });
  return { ...(await heardOf(stream)), reasoning };
}

async function heardOf(stream) {
  let pieces = 0;
  stream.on("content", () => { pieces += 1; });
  return { text: await stream.finalContent(), pieces };
}

const runnable = (tools) => NAMES.map((name) => ({
  type: "function",
  function: { name, description: `The ${name}.`, parameters: CITY, parse: JSON.parse, function: tools[name], strict: true },
}));

async function tool_loop() {
  const tools = new Tools();
  const runner = client.chat.completions.runTools({ model: MODEL, messages: [user(QUESTION)], tools: runnable(tools) });
  return { text: await runner.finalContent(), calls: tools.sorted };
}

async function streamed_tool_loop() {
  const tools = new Tools();
  const asked = { model: MODEL, messages: [user(QUESTION)], tools: runnable(tools), stream: true };
  return { ...(await heardOf(client.chat.completions.runTools(asked))), calls: tools.sorted };
}

async function structured() {
  const asked = { model: MODEL, messages: [user(STRUCTURED)], response_format: zodResponseFormat(Place, "place") };
  const answer = await client.chat.completions.parse(asked);
  return { text: JSON.stringify(answer.choices[0].message.parsed) };
}

async function unknown_model() {
  return errorOf(client.chat.completions.create({ model: NOBODY, messages: [user(GREETING)] }));
}

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    if (!(error instanceof OpenAI.NotFoundError)) throw error;
    check(error.code === "model_not_found" && error.message.includes(NOBODY), error.message);
    return { status: error.status };
  }
  throw new Error("no error was raised");
}

// Responses

async function responses_plain() {
  return { text: (await client.responses.create({ model: MODEL, input: GREETING })).output_text };
}

async function responses_streamed() {
  return responseOf(client.responses.stream({ model: MODEL, input: GREETING }));
}

async function responses_streamed_reasoning() {
  let reasoning = "";
  const stream = client.responses.stream({ model: MODEL, input: THOUGHT, reasoning: { summary: "auto" } });
  stream.on("response.reasoning_summary_text.delta", (event) => { reasoning += event.delta; });
  return { ...(await responseOf(stream)), reasoning };
}

async function responseOf(stream) {
  let pieces = 0;
  stream.on("response.output_text.delta", () => { pieces += 1; });
  return { text: (await stream.finalResponse()).output_text, pieces };
}

const declared = NAMES.map((name) => ({ type: "function", name, description: `The ${name}.`, parameters: CITY, strict: true }));

/** By hand, with the stream's own accumulator; the whole history goes back each time. */
async function responses_streamed_tool_loop() {
  const tools = new Tools();
  const input = [user(QUESTION)];
  for (;;) {
    let pieces = 0;
    const stream = client.responses.stream({ model: MODEL, input, tools: declared, store: false });
    stream.on("response.output_text.delta", () => { pieces += 1; });
    const response = await stream.finalResponse();
    const calls = response.output.filter((item) => item.type === "function_call");
    if (calls.length === 0) return { text: response.output_text, pieces, calls: tools.sorted };
    input.push(...response.output, ...calls.map((call) => outputOf(tools, call)));
  }
}

const outputOf = (tools, call) => ({
  type: "function_call_output",
  call_id: call.call_id,
  output: tools[call.name](JSON.parse(call.arguments)),
});

/** By the SDK's runner. */
async function responses_tool_loop() {
  const tools = new Tools();
  const functions = declared.map((tool) => ({ tool, execute: (given) => tools[tool.name](given) }));
  const response = await new ResponsesToolRunner({ functions }).run(client, { model: MODEL, input: QUESTION });
  return { text: response.output_text, calls: tools.sorted };
}

async function responses_structured() {
  const asked = { model: MODEL, input: STRUCTURED, text: { format: zodTextFormat(Place, "place") } };
  return { text: JSON.stringify((await client.responses.parse(asked)).output_parsed) };
}

async function responses_follow_up() {
  const first = await client.responses.create({ model: MODEL, input: GREETING });
  const second = await client.responses.create({ model: MODEL, input: "And now?", previous_response_id: first.id });
  check((await client.responses.retrieve(second.id)).output_text === second.output_text, "it was not stored");
  return { text: second.output_text };
}

async function responses_unknown_model() {
  return errorOf(client.responses.create({ model: NOBODY, input: GREETING }));
}

await tell({
  plain,
  streamed,
  streamed_reasoning,
  tool_loop,
  streamed_tool_loop,
  structured,
  unknown_model,
  responses_plain,
  responses_streamed,
  responses_streamed_reasoning,
  responses_tool_loop,
  responses_streamed_tool_loop,
  responses_structured,
  responses_follow_up,
  responses_unknown_model,
});
