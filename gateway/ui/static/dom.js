// Elements from words: text is only ever set as text, whoever wrote it.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "text") made.textContent = value;
    else if (key === "value") made.value = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// Fills a table; what stands in it already is left alone, so that nobody loses a selection to a refresh.
export function fillTable(table, columns, rows, none) {
  const told = JSON.stringify([columns, rows]);
  if (table.dataset.told === told) return;
  table.dataset.told = told;
  if (!rows.length) {
    table.replaceChildren(element("caption", { text: none }));
    return;
  }
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col", text: column })));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

function cell(value) {
  if (value !== null && typeof value === "object") return element("td", { class: value.class, text: value.text });
  return element("td", { text: value ?? "" });
}

export const time = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
export const date = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString([], { hour12: false }) : "");
export const number = (value, digits = 0) =>
  value.toLocaleString([], { maximumFractionDigits: digits, minimumFractionDigits: digits });
