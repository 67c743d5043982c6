// What somebody does in Open WebUI's page, in headless Chromium: pick an agent, chat, let it think and call a tool, ask
// again. Prints what the page shows after each step, as JSON; the screenshots go into a folder.
//
//   node open_webui.mjs '{"base", "token", "model", "name", "tool", "folder", "way"}'
import { chromium } from "playwright-core";

const said = JSON.parse(process.argv[2]);
const PATIENCE = 120_000;
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: QUIET });
const page = await browser.newPage({ viewport: { width: 1100, height: 720 } });
page.setDefaultTimeout(PATIENCE);
await page.addInitScript((token) => { localStorage.token = token; }, said.token);
// What is new in this version comes in front, when it comes.
await page.addLocatorHandler(page.getByRole("dialog"), () => page.keyboard.press("Escape"));

const answers = () => page.locator(".chat-assistant");
const shown = async () => (await answers().last().innerText()).replace(/\s+/g, " ");
// What the page shows once nothing comes any more: its buttons do not tell, as those of the answer before stay.
const settled = async () => {
  for (let before = "", now = await shown(); ; [before, now] = [now, await shown()]) {
    if (now === before) return now;
    await page.waitForTimeout(1500);
  }
};
const shot = (name) => page.screenshot({ path: `${said.folder}/${said.way}-${name}.png` });

async function say(text, until) {
  const before = await answers().count();
  await page.click("#chat-input");
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
  await page.waitForFunction(([n, end]) => {
    const all = [...document.querySelectorAll(".chat-assistant")];
    return all.length > n && all.at(-1).innerText.includes(end);
  }, [before, until]);
  await page.getByRole("button", { name: "Regenerate" }).last().waitFor();
}

async function unfold() {
  for (let step = 0; step < 4; step += 1) {
    const folded = answers().last().locator('[aria-expanded="false"]');
    if (!(await folded.count())) break;
    await folded.first().click();
    await page.waitForTimeout(400); // it slides open
  }
}

const told = {};
await page.goto(`${said.base}/?models=${encodeURIComponent(said.model)}`);
await page.getByRole("button", { name: `Selected model: ${said.name}` }).waitFor();
await page.waitForSelector("#chat-input");

await say("think and count to 3", "word2");
await unfold();
told.thought = await shown();
await shot("1-thought");

await say(`think and call ${said.tool} now`, "Tool said:");
await unfold();
told.tool = await shown();
await shot("2-tool");

await page.getByRole("button", { name: "Regenerate" }).last().click();
const again = page.getByText("Try Again", { exact: true });
await Promise.race([again.waitFor().then(() => again.click()), page.getByText("2/2").waitFor()]);
await page.getByText("2/2").waitFor();
await page.waitForFunction(() => [...document.querySelectorAll(".chat-assistant")].at(-1).innerText.includes("Tool said:"));
told.again = await settled();
await shot("3-again");

await page.click("#chat-input");
await page.keyboard.type("fail with 400");
await page.keyboard.press("Enter");
await page.waitForFunction(() => [...document.querySelectorAll(".chat-assistant")].at(-1).innerText.match(/did not accept|failed/));
told.failed = await settled();
await shot("4-failed");

await page.click("#chat-input");
await page.keyboard.type("count to 2000 every 20 ms");
await page.keyboard.press("Enter");
await page.waitForFunction(() => [...document.querySelectorAll(".chat-assistant")].at(-1).innerText.includes("word9"));
await page.getByRole("button", { name: "Stop", exact: true }).click();
await page.getByRole("button", { name: "Regenerate" }).last().waitFor();
told.stopped = await shown();

told.chat = new URL(page.url()).pathname.split("/").at(-1);
console.log(JSON.stringify(told));
await browser.close();
