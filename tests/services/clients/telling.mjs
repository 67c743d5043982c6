// How a client program of Node.js tells what it heard: `await tell(steps)` runs the steps, and prints a line of JSON for
// each. The same as telling.py does for those of Python.

export const { OPENAI_BASE_URL: BASE_URL, OPENAI_API_KEY: API_KEY, SERVICES_MODEL: MODEL } = process.env;

export const GREETING = "Hello there, friend.";
export const QUESTION = "call get_weather and get_time now";
export const THOUGHT = "think of Rome";
export const ROME = '{"city": "Rome", "people": 2800000}';
export const STRUCTURED = `call answer with ${ROME}`;
export const NOBODY = "nobody-of-this-name";

const PATIENCE = 60_000;

/** The two tools of the tool loops, which remember how they were called. */
export class Tools {
  calls = [];

  get_weather = ({ city }) => this.#called("get_weather", city, `It is sunny in ${city}.`);

  get_time = ({ city }) => this.#called("get_time", city, `It is noon in ${city}.`);

  /** The calls in the order in which they were asked for: some clients run them side by side. */
  get sorted() {
    return this.calls.toSorted((one, other) => other.name.localeCompare(one.name));
  }

  #called(name, city, result) {
    this.calls.push({ name, arguments: { city } });
    return result;
  }
}

/** Fail where something is not as it should be. */
export function check(is, what) {
  if (!is) throw new Error(what);
}

/** Run the steps one after the other, whatever becomes of the one before. */
export async function tell(steps) {
  for (const [name, step] of Object.entries(steps)) {
    const heard = await within(PATIENCE, step()).catch((error) => ({ failed: `${error?.stack ?? error}` }));
    process.stdout.write(`${JSON.stringify({ step: name, ...heard })}\n`);
  }
  process.exit(0); // connections that are kept alive would hold it up
}

async function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("it took too long")), milliseconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
