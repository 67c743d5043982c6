// The operator's page in headless Chromium, by the keyboard alone; prints what was seen, a line of JSON for each step.

import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const { AGENT, API_KEY, AXE, CHROMIUM, GATEWAY, KEY, NO_KEY, SCHEME, SHOTS, WIDTH } = process.env;
const PATIENCE = 60_000;
const axe = readFileSync(AXE, "utf-8");
const problems = [];
const hosts = new Set();

const browser = await chromium.launch({
  executablePath: CHROMIUM,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const context = await browser.newContext({ viewport: { width: Number(WIDTH), height: 800 }, colorScheme: SCHEME });
const page = await context.newPage();
page.setDefaultTimeout(PATIENCE);
page.on("console", (message) => {
  // What the gateway refuses is an error to the console too: those are looked at one by one.
  if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) problems.push(message.text());
});
page.on("pageerror", (error) => problems.push(String(error)));
page.on("request", (request) => hosts.add(new URL(request.url()).host));
page.on("dialog", (dialog) => dialog.accept());

const tell = (step, seen) => process.stdout.write(`${JSON.stringify({ step, ...seen })}\n`);
const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.textContent);
const text = (selector) => page.locator(selector).innerText();

// Presses Tab until the element has the focus, as somebody without a mouse does.
async function reach(selector) {
  for (let presses = 0; presses < 200; presses += 1) {
    if (await page.locator(selector).first().evaluate((element) => element === document.activeElement)) return;
    await page.keyboard.press("Tab");
  }
  throw new Error(`the keyboard does not reach ${selector}`);
}

async function press(selector) {
  await reach(selector);
  await page.keyboard.press("Enter");
}

async function write(selector, words) {
  await reach(selector);
  await page.keyboard.press("Control+A");
  await page.keyboard.type(words);
}

// A picture first, then what is asked of the page, then what axe finds.
async function look(step, see = async () => ({})) {
  const height = Math.min(1_400, await page.evaluate(() => document.documentElement.scrollHeight));
  const clip = { x: 0, y: 0, width: Number(WIDTH), height };
  await page.screenshot({ path: `${SHOTS}/page-${step}-${WIDTH}.png`, fullPage: true, clip });
  const seen = await see();
  await page.evaluate(axe);
  const violations = [];
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    violations.push(...(await page.evaluate(() => window.axe.run())).violations);
  }
  await page.emulateMedia({ colorScheme: SCHEME });
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`);
  tell(step, { violations: found, width, ...seen });
}

// Everything that can be used is reached by Tab, in the order of the page, and shows that it has the focus.
async function walk() {
  const USABLE = "a[href], button:not(:disabled), input:not([hidden]), select, textarea, summary, [tabindex='0']";
  await page.locator("#main").focus();
  const wanted = await page.locator(`#main :is(${USABLE})`).evaluateAll((all) => {
    const shown = all.filter((one) => one.checkVisibility());
    shown.forEach((one, place) => { one.dataset.place = place; });
    return shown.length;
  });
  const reached = new Set();
  const unseen = [];
  for (let presses = 0; presses < wanted + 5; presses += 1) {
    await page.keyboard.press("Tab");
    const seen = await page.evaluate(() => {
      const one = document.activeElement;
      return { place: one.dataset.place, html: one.outerHTML.slice(0, 80), outline: getComputedStyle(one).outlineStyle };
    });
    if (seen.place === undefined) continue;
    reached.add(seen.place);
    if (seen.outline === "none") unseen.push(seen.html);
  }
  return { wanted, reached: reached.size, unseen };
}

// Signing in -----------------------------------------------------------------------------------------------------

await page.goto(`${GATEWAY}/ui`);
await page.waitForSelector("#sign-in:not([hidden])");
await page.keyboard.type("a wrong key");
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.getElementById("sign-in-error").textContent);
await look("sign-in", async () => ({ error: await text("#sign-in-error"), focus: await focused() }));
await page.keyboard.type(KEY);
await page.keyboard.press("Enter");
await page.waitForSelector("#overview:not([hidden])");
tell("signed-in", { focus: await focused(), cookies: await context.cookies(), scripts: await page.evaluate(() => document.cookie) });

// Trying an agent ------------------------------------------------------------------------------------------------

async function ask(words) {
  await write("#chat-message", words);
  await page.keyboard.press("Enter");
}

async function answered() {
  const last = page.locator("#chat-log article").last();
  await last.locator(".usage, .failure").first().waitFor();
  await page.waitForSelector("#chat-log[aria-busy=false]");
  return last.innerText();
}

await press("a[href='#chat']");
await page.waitForSelector("#chat-agent option", { state: "attached" });
await reach("#chat-agent");
await page.locator("#chat-agent").selectOption(AGENT);
await ask("think of <img src=x onerror=alert(1)> & more");
const marked = await answered();
await ask("fail with 400");
const failed = await answered();
const images = await page.locator("#chat-log img").count();
await look("chat", async () => ({ marked, failed, images, walk: await walk() }));
await ask("count to 2000 every 20 ms");
await page.waitForFunction(() => document.querySelector("#chat-log article:last-child .words")?.textContent.includes("word9"));
await press("#chat-stop");
tell("stopped", { stopped: await answered() });
await press("#chat-new");
tell("new", { left: await page.locator("#chat-log article").count() });

// Settings -------------------------------------------------------------------------------------------------------

const setting = (name) => `#setting-${name}`;

async function change(name, value) {
  await press("a[href='#settings']");
  await page.waitForSelector(setting(name));
  await write(setting(name), value);
  await press(`[aria-label='Save ${name}']`);
  await page.waitForFunction(() => document.querySelector("#settings .error:not(:empty), #settings-status:not(:empty)"));
  return page.locator("#settings .error, #settings-status").allInnerTexts();
}

async function statuses(count) {
  const seen = [];
  for (let asked = 0; asked < count; asked += 1) {
    seen.push((await fetch(`${GATEWAY}/v1/models`, { headers: { "X-Api-Key": API_KEY } })).status);
  }
  return seen;
}

const refused = await change("LETTA_GATEWAY_RATE_LIMIT", "often");
// Another limit at each width: of one limit, what was asked before would count.
const most = WIDTH === "360" ? 2 : 3;
const saved = await change("LETTA_GATEWAY_RATE_LIMIT", `${most}/minute`);
const limited = await statuses(most + 1);
await look("settings", async () => ({ refused, saved, limited, focus: await focused(), walk: await walk() }));
await reach(setting("LETTA_GATEWAY_RATE_LIMIT"));
await press("[aria-label='Reset LETTA_GATEWAY_RATE_LIMIT']");
await page.waitForFunction(() => document.querySelector("#settings-status").textContent.includes("configured"));
tell("reset", { free: await statuses(3), shown: await page.locator(setting("LETTA_GATEWAY_RATE_LIMIT")).inputValue() });

// The agent's tools: none, until the operator names one.
await press("a[href='#chat']");
await ask('call Glob with {"pattern": "*.nothing"}');
const without = await answered();
await change("LETTA_GATEWAY_SERVER_TOOLS", JSON.stringify({ [AGENT]: ["Glob"] }));
await press("a[href='#chat']");
await press("#chat-new");
await ask('call Glob with {"pattern": "*.nothing"}');
const withTool = await answered();
await page.screenshot({ path: `${SHOTS}/page-tool-${WIDTH}.png` });
await change("LETTA_GATEWAY_SERVER_TOOLS", "{}");
tell("tool", { without, with: withTool });

// Users ----------------------------------------------------------------------------------------------------------

const email = `user-of-${WIDTH}@example.com`;
const status = (words) => page.waitForFunction((wanted) => document.getElementById("users-status").textContent.includes(wanted), words);
await press("a[href='#users']");
await page.waitForSelector("#users-list > *");
await press("#users > details > summary");
await write("#new-email", email);
await write("#new-password", "correct horse battery staple");
await page.keyboard.press("Enter");
await status("is made");
await write("#users-text", email);
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.querySelectorAll("#users-list article").length === 1);
await press(`[aria-label='Block ${email}']`);
await status("is blocked");
const blockedFocus = await page.evaluate(() => document.activeElement.getAttribute("aria-label"));
await press(`[aria-label='Unblock ${email}']`);
await status("let in again");
await press("#users-list summary");
await write("#users-list details input", "5");
await page.keyboard.press("Enter");
await status("is saved");
const user = await text("#users-list article .help");
await look("users", async () => ({ user, blockedFocus, walk: await walk() }));

// What goes on ---------------------------------------------------------------------------------------------------

await press("a[href='#overview']");
await page.waitForSelector("#errors td");
await reach("a[href='#settings']");
const updated = await text("#overview-note");
await page.waitForFunction((before) => document.getElementById("overview-note").textContent !== before, updated);
const kept = await focused();
await page.waitForTimeout(12_000); // the line of the last minutes grows
await page.locator("#overview-title").focus();
const [errors, agents] = [await text("#errors"), await text("#agents")];
await look("overview", async () => ({ kept, errors, agents, walk: await walk() }));

// A gateway that is away for a while.
const overview = "**/ui/api/overview";
await page.route(overview, (route) => route.abort());
await page.waitForSelector("#overview-problem:not(:empty)");
await look("unreachable", async () => ({ problem: await text("#overview-problem"), role: await page.getAttribute("#overview-problem", "role") }));
await page.unroute(overview);
await page.waitForSelector("#overview-problem:empty", { state: "attached" });
tell("reachable", { stale: await page.locator("#overview.stale").count() });

// A session that is over leaves nothing of what was shown.
await press("a[href='#users']");
await page.waitForSelector("#users-list article");
const kept_cookies = await context.cookies();
await context.clearCookies();
await press("a[href='#overview']");
await page.waitForSelector("#sign-in:not([hidden])");
await page.waitForSelector("#sign-in-error:not(:empty)");
tell("expired", { words: await text("#sign-in-error"), left: await page.locator("#users-list article, #chat-log article").count() });
await context.addCookies(kept_cookies);
await page.evaluate(() => localStorage.setItem("letta-gateway-operator", "yes"));
await page.reload();
await page.waitForSelector("#overview:not([hidden])");

// And out --------------------------------------------------------------------------------------------------------

const [{ value }] = await context.cookies();
await press("#sign-out");
await page.waitForSelector("#sign-in:not([hidden])");
const again = await fetch(`${GATEWAY}/ui/api/overview`, { headers: { Cookie: `letta_gateway_operator=${value}` } });

// Where there is no key at all.
const closed = readFileSync(NO_KEY, "utf-8");
await page.route("**/ui", (route) => route.fulfill({ status: 404, contentType: "text/html", body: closed }));
await page.goto(`${GATEWAY}/ui`);
await look("no-key", async () => ({ words: await text("main") }));
tell("signed-out", { cookies: await context.cookies(), status: again.status, problems, hosts: [...hosts] });
await browser.close();
