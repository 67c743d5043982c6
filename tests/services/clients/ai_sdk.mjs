// The AI SDK with three of its providers: compatible (what most apps configure), openai.chat and openai.responses.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { API_KEY, BASE_URL, GREETING, MODEL, NOBODY, QUESTION, STRUCTURED, THOUGHT, Tools, tell } from "./telling.mjs";

const settings = { baseURL: BASE_URL, apiKey: API_KEY };
const compatible = createOpenAICompatible({ ...settings, name: "letta", includeUsage: true, supportsStructuredOutputs: true });
const openai = createOpenAI(settings);
const Place = z.object({ city: z.string(), people: z.number().int() });
const instructions = "You guide travellers.";
const maxRetries = 0;

const runnable = (tools) => Object.fromEntries(["get_weather", "get_time"].map((name) => [
  name,
  tool({ description: `The ${name}.`, inputSchema: z.object({ city: z.string() }), execute: tools[name] }),
]));

async function heardOf(result) {
  const pieces = [];
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") pieces.push(part.text);
    if (part.type === "error") throw part.error;
  }
  return { text: pieces.join(""), pieces: pieces.length, reasoning: (await result.reasoningText) ?? "" };
}

const stepsWith = (model) => ({
  async plain() {
    return { text: (await generateText({ model: model(MODEL), instructions, prompt: GREETING, maxRetries })).text };
  },

  async streamed() {
    return heardOf(streamText({ model: model(MODEL), instructions, prompt: GREETING, maxRetries }));
  },

  async streamed_reasoning() {
    return heardOf(streamText({ model: model(MODEL), prompt: THOUGHT, maxRetries }));
  },

  async tool_loop() {
    const tools = new Tools();
    const asked = { model: model(MODEL), instructions, prompt: QUESTION, tools: runnable(tools), stopWhen: stepCountIs(5), maxRetries };
    return { text: (await generateText(asked)).text, calls: tools.sorted };
  },

  async streamed_tool_loop() {
    const tools = new Tools();
    const asked = { model: model(MODEL), prompt: QUESTION, tools: runnable(tools), stopWhen: stepCountIs(5), maxRetries };
    return { ...(await heardOf(streamText(asked))), calls: tools.sorted };
  },

  async structured() {
    const asked = { model: model(MODEL), prompt: STRUCTURED, output: Output.object({ schema: Place }), maxRetries };
    return { text: JSON.stringify((await generateText(asked)).output) };
  },

  async unknown_model() {
    try {
      await generateText({ model: model(NOBODY), prompt: GREETING, maxRetries });
    } catch (error) {
      if (!APICallError.isInstance(error) || !error.message.includes(NOBODY)) throw error;
      return { status: error.statusCode };
    }
    throw new Error("no error was raised");
  },
});

const named = (prefix, steps) => Object.fromEntries(Object.entries(steps).map(([name, step]) => [`${prefix}${name}`, step]));

const { streamed_reasoning: _, ...chatSteps } = stepsWith((name) => openai.chat(name)); // it shows no reasoning

await tell({
  ...named("", stepsWith((name) => compatible(name))),
  ...named("chat_", chatSteps),
  ...named("responses_", stepsWith((name) => openai.responses(name))),
});
