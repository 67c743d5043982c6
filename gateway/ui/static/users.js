// Users, their budgets and keys, and what everybody used.

import { ask, wordsOf } from "./api.js";
import { byId, date, element, fillTable, number } from "./dom.js";

const PERIODS = { day: "a day", month: "a month", total: "in all" };

// Supabase knows users by a telephone alone: they have no e-mail.
const nameOf = (user) => user.email || user.name || user.id;

let cursor = null;

export async function enter() {
  say("");
  await Promise.all([listOwners(), list(true)]);
}

async function listOwners() {
  try {
    const [{ owners }, usage] = await Promise.all([ask("GET", "keys"), ask("GET", "usage")]);
    const used = new Map(usage.owners.map((sums) => [sums.owner, sums]));
    const names = [...new Set([...owners, ...used.keys()])];
    const rows = names.map((name) => [
      { class: "wide", text: name },
      owners.includes(name) ? "API key" : name === "operator" ? "this page" : name === "local" ? "this machine" : "user",
      number(used.get(name)?.turns ?? 0),
      number((used.get(name)?.prompt_tokens ?? 0) + (used.get(name)?.completion_tokens ?? 0)),
      `$${used.get(name)?.cost ?? "0.000000"}`,
    ]);
    fillTable(byId("owners"), ["holder", "kind", "turns", "tokens", "cost"], rows, "No API key is set, and nothing was used.");
  } catch (error) {
    say(wordsOf(error), true);
  }
}

async function list(isNew) {
  const query = new URLSearchParams({ limit: "20", search: byId("users-text").value });
  if (!isNew && cursor) query.set("cursor", cursor);
  try {
    const page = await ask("GET", `users?${query}`);
    cursor = page.next_cursor;
    const cards = page.data.map(card);
    if (isNew) byId("users-list").replaceChildren(...(cards.length ? cards : [element("p", { text: "No users." })]));
    else byId("users-list").append(...cards);
    byId("users-more").hidden = !cursor;
  } catch (error) {
    say(wordsOf(error), true);
  }
}

byId("users-search").addEventListener("submit", (event) => {
  event.preventDefault();
  list(true);
});
byId("users-more").addEventListener("click", () => list(false));
byId("users-new").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  try {
    await ask("POST", "users", { email: byId("new-email").value, password: byId("new-password").value });
    form.reset();
    say("The user is made.");
    await list(true);
  } catch (error) {
    say(wordsOf(error), true);
  }
});

function card(user) {
  const toggle = element("button", {
    type: "button",
    class: "quiet",
    text: user.is_blocked ? "Unblock" : "Block",
    "aria-label": `${user.is_blocked ? "Unblock" : "Block"} ${nameOf(user)}`,
  });
  const made = element(
    "article",
    { class: "card" },
    element("h4", { text: nameOf(user) }),
    element("p", { class: "help", text: describe(user) }),
    element("div", { class: "bar" }, toggle),
    budgetForm(user, (changed) => replace(made, changed, "budget")),
    keysOf(user),
  );
  toggle.addEventListener("click", async () => {
    if (!user.is_blocked && !window.confirm(`Block ${nameOf(user)}? Their sessions end, and no key of theirs lets them in.`)) return;
    try {
      const changed = await ask("POST", `users/${user.id}/${user.is_blocked ? "unblock" : "block"}`);
      say(`${nameOf(user)} is ${changed.is_blocked ? "blocked" : "let in again"}.`);
      replace(made, changed, "button");
    } catch (error) {
      say(wordsOf(error), true);
    }
  });
  return made;
}

function replace(before, user, focus) {
  const after = card(user);
  before.replaceWith(after);
  if (focus === "budget") after.querySelector("details").open = true;
  after.querySelector(focus === "budget" ? "details input" : "button").focus();
}

function describe(user) {
  const budget = user.budget ? `$${user.budget.amount} ${PERIODS[user.budget.period]}` : "the default budget";
  const agent = user.agent ? user.agent.id : "no agent yet";
  return [user.is_blocked ? "Blocked" : "Active", user.email && user.name, budget, agent, `since ${date(user.created_at)}`].filter(Boolean).join(" · ");
}

function budgetForm(user, done) {
  const id = `budget-${user.id}`;
  const amount = element("input", { id, inputmode: "decimal", value: user.budget?.amount ?? "", autocomplete: "off" });
  const periods = ["day", "month", "total"].map((period) => element("option", { value: period, text: period }));
  const period = element("select", { "aria-label": "Period" }, ...periods);
  period.value = user.budget?.period ?? "month";
  const form = element(
    "form",
    { class: "bar" },
    element("label", { for: id, text: "US dollars, nothing: the default" }),
    amount,
    period,
    element("button", { type: "submit", text: "Save the budget" }),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const budget = amount.value.trim() ? { amount: amount.value.trim(), period: period.value } : null;
    try {
      done(await ask("PATCH", `users/${user.id}`, { budget }));
      say(`The budget of ${nameOf(user)} is saved.`);
    } catch (error) {
      say(wordsOf(error), true);
      amount.focus();
    }
  });
  return element("details", {}, element("summary", { text: "Budget" }), form);
}

function keysOf(user) {
  const place = element("div");
  const shown = element("details", {}, element("summary", { text: "Keys and usage" }), place);
  const look = async () => {
    try {
      const [keys, usage] = await Promise.all([ask("GET", `users/${user.id}/keys`), ask("GET", `users/${user.id}/usage`)]);
      const used = `In thirty days: ${number(usage.totals.turns)} turns, $${usage.totals.cost}.`;
      const rows = keys.data.map((key) => keyRow(user, key, look));
      place.replaceChildren(element("p", { class: "help", text: used }), rows.length ? element("ul", {}, ...rows) : element("p", { text: "No keys." }));
    } catch (error) {
      place.replaceChildren(element("p", { class: "error", text: wordsOf(error) }));
    }
  };
  shown.addEventListener("toggle", () => shown.open && look());
  return shown;
}

function keyRow(user, key, look) {
  const used = key.last_used_at ? `last used ${date(key.last_used_at)}` : "never used";
  const gone = element("button", { type: "button", class: "quiet", text: "Delete", "aria-label": `Delete the key ${key.name}` });
  gone.addEventListener("click", async () => {
    if (!window.confirm(`Delete the key ${key.name} of ${nameOf(user)}? Whoever uses it is out at once.`)) return;
    try {
      await ask("DELETE", `users/${user.id}/keys/${key.id}`);
      say(`The key ${key.name} is deleted.`);
      await look();
    } catch (error) {
      say(wordsOf(error), true);
    }
  });
  return element("li", {}, `${key.name}, ends in ${key.hint}, ${used} `, gone);
}

function say(text, isError = false) {
  const status = byId("users-status");
  status.textContent = text;
  status.classList.toggle("bad", isError);
}
