// What goes on now: asked for every few seconds while it is looked at.

import { ask, wordsOf } from "./api.js";
import { byId, date, element, fillTable, number, time } from "./dom.js";

const PERIOD = 2000;
const AGENTS_PERIOD = 15000;
const SVG = "http://www.w3.org/2000/svg";
let timer = 0;
let agentsAt = 0;
let toldAt = "";

export function enter() {
  agentsAt = 0;
  look();
}

export function leave() {
  clearTimeout(timer);
}

async function look() {
  clearTimeout(timer);
  try {
    if (!document.hidden) {
      tell(await ask("GET", "overview"));
      await lookAtAgents();
    }
    fresh("");
  } catch (error) {
    if (error.status === 401) return;
    fresh(`${wordsOf(error)}${toldAt ? ` What is shown is of ${toldAt}.` : ""}`);
  }
  if (!byId("overview").hidden) timer = setTimeout(look, PERIOD);
}

// An alert is read out when it changes: the same one again is not set again.
function fresh(problem) {
  const shown = byId("overview-problem");
  if (shown.textContent !== problem) shown.textContent = problem;
  byId("overview").classList.toggle("stale", problem !== "");
}

async function lookAtAgents() {
  if (Date.now() < agentsAt) return;
  agentsAt = Date.now() + AGENTS_PERIOD;
  try {
    const { data } = await ask("GET", "models");
    const rows = data.map((model) => [{ class: "wide", text: model.id }, date(model.created)]);
    fillTable(byId("agents"), ["model", "made"], rows, "Letta has no agents.");
  } catch (error) {
    fillTable(byId("agents"), [], [], wordsOf(error));
  }
}

function tell(now) {
  toldAt = time(now.now);
  const draining = now.draining ? " It is being stopped: open turns come to their end." : "";
  const note = now.note ? ` Letta runs on this machine: ${now.note}.` : "";
  byId("overview-note").textContent = `Version ${now.version}, at ${time(now.now)}.${note}${draining}`;
  tellFigures(now);
  tellTraffic(now.traffic);
  const parts = now.dependencies.map((part) => [
    part.name,
    { class: part.status === "ok" ? "ok" : "bad", text: part.code ?? part.status },
    `${number(part.latency_ms, 1)} ms`,
  ]);
  fillTable(byId("parts"), ["part", "state", "latency"], parts, "It depends on nothing.");
  const turns = now.turns.map((turn) => [
    { class: "wide", text: turn.agent_id },
    { class: "wide", text: turn.owner },
    turn.source,
    `${number(Math.max(0, now.now - turn.began_at))} s`,
  ]);
  fillTable(byId("turns"), ["agent", "for", "by", "since"], turns, "No turn is open.");
  const errors = now.errors.map((error) => [
    time(error.at),
    { class: "bad", text: error.status < 400 ? "in the stream" : error.status },
    error.code,
    `${error.method} ${error.route}`,
    error.request_id,
    error.owner,
  ]);
  fillTable(byId("errors"), ["at", "status", "code", "request", "request id", "for"], errors, "None since the start.");
}

function tellFigures(now) {
  const minute = now.traffic.slice(-12);
  const mean = (name) => minute.reduce((sum, part) => sum + part[name], 0) / (minute.length || 1);
  const figures = [
    ["Live streams", number(now.levels.open_streams)],
    ["Open turns", number(now.levels.open_turns)],
    ["Waiting turns", number(now.levels.waiting_turns)],
    ["Turns at most", number(now.levels.most_turns)],
    ["Requests a second", number(mean("requests"), 1)],
    ["Errors a second", number(mean("errors"), 1)],
    ["Requests in all", number(now.totals.requests)],
    ["Errors in all", number(now.totals.errors)],
    ["Tokens read", number(now.totals.prompt_tokens)],
    ["Tokens written", number(now.totals.completion_tokens)],
  ];
  const list = byId("figures");
  if (!list.children.length) {
    list.append(
      ...figures.map(([name]) => element("div", {}, element("dt", { text: name }), element("dd", {}))),
    );
  }
  figures.forEach(([, value], place) => {
    const shown = list.children[place].lastChild;
    if (shown.textContent !== value) shown.textContent = value;
  });
}

function tellTraffic(traffic) {
  const most = Math.max(1, ...traffic.map((part) => part.requests), ...traffic.map((part) => part.errors));
  const line = (name) => {
    const shape = document.createElementNS(SVG, "polyline");
    const right = traffic.length - 1; // the newest stands at the right
    const points = traffic.map((part, place) => `${300 - ((right - place) / 59) * 300},${78 - (part[name] / most) * 74}`);
    shape.setAttribute("points", points.join(" "));
    shape.setAttribute("class", name);
    return shape;
  };
  byId("traffic").replaceChildren(line("requests"), line("errors"));
  const newest = traffic.at(-1);
  const now = newest ? `${number(newest.requests, 1)} requests and ${number(newest.errors, 1)} errors now` : "no figures yet";
  byId("traffic-words").textContent = `By the second: ${now}, ${number(most, 1)} at the top. Requests as a line, errors dashed.`;
}
