// What holds now, where it comes from, and the settings that can change while the gateway serves.

import { ask, wordsOf } from "./api.js";
import { byId, date, element } from "./dom.js";

const SOURCES = {
  default: () => "default",
  environment: (setting) => `environment: ${setting.found}`,
  credential: (setting) => `credential: ${setting.found}`,
  file: (setting) => `file: ${setting.found}`,
  changed: (setting) => `changed here, ${date(setting.changed_at)}`,
};

const sourceOf = (setting) => SOURCES[setting.source](setting);

export async function enter() {
  say("");
  try {
    tell((await ask("GET", "settings")).data);
  } catch (error) {
    say(wordsOf(error), true);
  }
}

function tell(settings) {
  byId("settings-editable").replaceChildren(...settings.filter((one) => one.is_editable).map(card));
  byId("settings-others").replaceChildren(...settings.filter((one) => !one.is_editable).map(pair));
}

function pair(setting) {
  const hidden = setting.is_set ? "set, not shown" : "not set";
  const value = setting.is_secret ? element("em", { text: hidden }) : element("code", { text: setting.value || "nothing" });
  return element(
    "div",
    {},
    element("dt", { text: setting.name }),
    element("dd", {}, value),
    element("dd", { class: "help", text: `${setting.help} From: ${sourceOf(setting)}.` }),
  );
}

function card(setting) {
  const id = `setting-${setting.name}`;
  const field = control(setting, id);
  const source = setting.source === "changed" ? `${sourceOf(setting)}; configured: ${setting.configured || "nothing"}` : sourceOf(setting);
  const reset = element("button", { type: "button", class: "quiet", text: "Reset", "aria-label": `Reset ${setting.name}` });
  reset.disabled = setting.source !== "changed";
  const form = element(
    "form",
    { class: "card" },
    element("label", { for: id, text: setting.name }),
    element("p", { class: "help", id: `${id}-help`, text: `${setting.help} From: ${source}.` }),
    element("div", { class: "bar" }, field, element("button", { type: "submit", text: "Save", "aria-label": `Save ${setting.name}` }), reset),
    element("p", { class: "error", role: "alert", id: `${id}-error` }),
  );
  const put = async (method, body, done) => {
    byId(`${id}-error`).textContent = "";
    say("");
    try {
      const changed = await ask(method, `settings/${setting.name}`, body);
      form.replaceWith(card(changed));
      byId(id).focus();
      say(`${setting.name} ${done}`);
    } catch (error) {
      if (error.code === "setting_changed") await renew(field.value).catch(() => {}); // the words are shown all the same
      byId(`${id}-error`).textContent = wordsOf(error);
      byId(id).focus();
    }
  };
  // What somebody else made of it is told; what was written here stays, to be saved over it or not.
  const renew = async (written) => {
    const now = (await ask("GET", "settings")).data.find((one) => one.name === setting.name);
    const told = card(now);
    told.querySelector(".help").append(` It is now: ${now.value || "nothing"}`);
    form.replaceWith(told);
    byId(id).value = written;
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    put("PATCH", { value: field.value, changed_at: setting.changed_at }, "holds from now on.");
  });
  reset.addEventListener("click", () => put("DELETE", undefined, "is as it is configured."));
  return form;
}

function control(setting, id) {
  const described = { id, "aria-describedby": `${id}-help ${id}-error` };
  if (setting.choices.length) {
    const options = setting.choices.map((choice) => element("option", { value: choice, text: choice }));
    const select = element("select", described, ...options);
    select.value = setting.value;
    return select;
  }
  if (setting.name === "LETTA_GATEWAY_SERVER_TOOLS") {
    return element("textarea", { ...described, rows: "2", class: "code", spellcheck: "false", value: setting.value });
  }
  return element("input", { ...described, value: setting.value, spellcheck: "false", autocomplete: "off" });
}

function say(text, isError = false) {
  const status = byId("settings-status");
  status.textContent = text;
  status.classList.toggle("bad", isError);
}
