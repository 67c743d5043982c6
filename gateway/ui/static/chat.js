// A conversation with an agent, as /v1/chat/completions has it: its words, its reasoning, its errors as they are.

import { ApiError, ask, send, wordsOf } from "./api.js";
import { byId, element } from "./dom.js";

let transcript = [];
let chatKey = newKey();
let running = null;

function newKey() {
  return `page-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
}

export async function enter() {
  const select = byId("chat-agent");
  byId("chat-problem").textContent = "";
  try {
    const { data } = await ask("GET", "models");
    const before = select.value;
    select.replaceChildren(...data.map((model) => element("option", { value: model.id, text: model.id })));
    if (data.some((model) => model.id === before)) select.value = before;
    if (!data.length) byId("chat-problem").textContent = "Letta has no agents. Make one, then come back.";
  } catch (error) {
    byId("chat-problem").textContent = wordsOf(error);
  }
}

function begin() {
  running?.abort();
  transcript = [];
  chatKey = newKey();
  byId("chat-log").replaceChildren();
}

byId("chat-new").addEventListener("click", () => {
  begin();
  byId("chat-message").focus();
});
byId("chat-agent").addEventListener("change", begin);
byId("chat-stop").addEventListener("click", () => running?.abort());
byId("chat-message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("chat-form").requestSubmit();
});
byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId("chat-message");
  const text = field.value.trim();
  if (!text || running) return;
  field.value = "";
  field.focus();
  answer(text);
});

async function answer(text) {
  const mine = transcript; // a new conversation has a transcript of its own
  mine.push({ role: "user", content: text });
  entry("You", "me").append(element("div", { class: "words", text }));
  const reply = new Reply(byId("chat-agent").value);
  running = new AbortController();
  busy(true);
  const { signal } = running;
  try {
    const body = {
      model: byId("chat-agent").value,
      messages: mine,
      stream: true,
      stream_options: { include_usage: true },
    };
    const response = await send("POST", "chat", body, { signal, headers: { "X-Letta-Chat-Key": chatKey } });
    reply.requestId = response.headers.get("X-Request-Id");
    await reply.read(response.body);
  } catch (error) {
    if (signal.aborted) reply.note("Stopped.");
    else reply.fail(error instanceof ApiError ? error : null);
  } finally {
    if (reply.text) mine.push({ role: "assistant", content: reply.text });
    running = null;
    busy(false);
  }
}

function busy(is) {
  byId("chat-stop").disabled = !is;
  byId("chat-send").disabled = is;
  byId("chat-log").setAttribute("aria-busy", String(is));
}

function entry(who, kind) {
  const made = element("article", { class: kind }, element("h3", { text: who }));
  const log = byId("chat-log");
  log.append(made);
  log.scrollTop = log.scrollHeight;
  return made;
}

class Reply {
  constructor(agent) {
    this.entry = entry(agent, "agent");
    this.text = "";
    this.requestId = "";
    this.isComplete = false;
    this.hasFailed = false;
  }

  async read(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) this.take(line.slice(6).trim());
      }
    }
    if (!this.isComplete && !this.hasFailed) this.fail(null);
  }

  take(data) {
    if (data === "[DONE]") {
      this.isComplete = true;
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) {
      this.fail(new ApiError("In the stream:", chunk.error, this.requestId));
      return;
    }
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    for (const call of delta.tool_calls ?? []) this.think(`${call.function?.name ?? ""}${call.function?.arguments ?? ""}`);
    if (delta.content) this.say(delta.content);
    if (chunk.usage) {
      const { prompt_tokens: read, completion_tokens: written } = chunk.usage;
      this.note(`${read} tokens read, ${written} written · ${this.requestId}`);
    }
  }

  think(text) {
    if (!this.thoughts) {
      this.thoughts = element("pre");
      const shown = element("details", { open: true }, element("summary", { text: "Reasoning and tools" }), this.thoughts);
      this.entry.append(shown);
    }
    this.append(this.thoughts, this.thoughts.textContent ? text : text.trimStart());
  }

  say(text) {
    this.text += text;
    if (!this.words) {
      this.words = element("div", { class: "words" });
      this.entry.append(this.words);
    }
    this.append(this.words, text);
  }

  note(text) {
    this.entry.append(element("p", { class: "usage", text }));
    this.follow();
  }

  fail(error) {
    this.hasFailed = true;
    const words = error ? error.words : "The connection broke off before the answer was complete.";
    this.entry.append(element("p", { class: "failure", text: words }));
    this.follow();
  }

  append(place, text) {
    place.append(text);
    this.follow();
  }

  follow() {
    const log = byId("chat-log");
    log.scrollTop = log.scrollHeight;
  }
}
