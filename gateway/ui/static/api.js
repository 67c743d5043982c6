// The way to the gateway: the session's cookie goes by itself, its CSRF token with everything that changes anything.

let csrfToken = "";
let whenSignedOut = () => {};

export class ApiError extends Error {
  constructor(status, error, requestId) {
    super(error?.message ?? `The gateway answered ${status}.`);
    this.status = status;
    this.code = error?.code ?? "";
    this.requestId = requestId ?? "";
  }

  get words() {
    return [`${this.status} ${this.code}`.trim(), this.message, this.requestId].filter(Boolean).join(" · ");
  }
}

export function onSignedOut(callback) {
  whenSignedOut = callback;
}

export async function send(method, path, body, more = {}) {
  const headers = { ...more.headers };
  if (method !== "GET") headers["X-CSRF-Token"] = csrfToken;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(`/ui/api/${path}`, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    credentials: "same-origin",
    redirect: "error",
    signal: more.signal,
  });
  if (response.ok) return response;
  const error = await readError(response);
  if (error.status === 401 && path !== "sign-in") {
    localStorage.removeItem(REMEMBERED);
    whenSignedOut();
  }
  throw error;
}

export async function ask(method, path, body) {
  const response = await send(method, path, body);
  return response.status === 204 ? null : response.json();
}

async function readError(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // not the gateway's own words: what a proxy before it says is no JSON
  }
  return new ApiError(response.status, error, response.headers.get("X-Request-Id"));
}

// The cookie is hidden from scripts: this remembers that there may be one, so that nobody is asked for nothing.
const REMEMBERED = "letta-gateway-operator";

export const mayBeSignedIn = () => localStorage.getItem(REMEMBERED) !== null;

export async function signIn(key) {
  csrfToken = (await ask("POST", "sign-in", { key })).csrf_token;
  localStorage.setItem(REMEMBERED, "yes");
}

export async function resume() {
  csrfToken = (await ask("GET", "session")).csrf_token;
}

export async function signOut() {
  await ask("DELETE", "session");
  csrfToken = "";
  localStorage.removeItem(REMEMBERED);
}

export const wordsOf = (error) =>
  error instanceof ApiError ? error.words : "The gateway cannot be reached. Look whether it runs, then try again.";
