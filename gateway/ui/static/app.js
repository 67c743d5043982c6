// The page: who is signed in sees one of its sections, by the address' fragment.

import { mayBeSignedIn, onSignedOut, resume, signIn, signOut, wordsOf } from "./api.js";
import { byId } from "./dom.js";
import * as chat from "./chat.js";
import * as overview from "./overview.js";
import * as settings from "./settings.js";
import * as users from "./users.js";

const SECTIONS = { overview, chat, settings, users };
let shown = "";
let isSignedIn = false;

function show(name, { focus = true } = {}) {
  if (shown === name) return;
  SECTIONS[shown]?.leave?.();
  shown = name;
  for (const id of ["sign-in", ...Object.keys(SECTIONS)]) byId(id).hidden = id !== name;
  for (const link of document.querySelectorAll("#sections a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("sections").hidden = byId("sign-out").hidden = !isSignedIn;
  if (name === "sign-in") byId("operator-key").focus();
  else if (focus) byId(`${name}-title`).focus();
  SECTIONS[name]?.enter();
}

function showNamed(options) {
  const named = location.hash.slice(1);
  show(named in SECTIONS ? named : "overview", options);
}

const ENDED = "letta-gateway-session-ended";

function signedOut() {
  if (isSignedIn) {
    sessionStorage.setItem(ENDED, "yes");
    location.reload(); // and nothing of what was shown is left
    return;
  }
  show("sign-in");
  if (sessionStorage.getItem(ENDED)) byId("sign-in-error").textContent = "Your session is over. Sign in again.";
  sessionStorage.removeItem(ENDED);
}

byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
window.addEventListener("hashchange", () => isSignedIn && showNamed());
onSignedOut(signedOut);

byId("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = byId("operator-key");
  byId("sign-in-error").textContent = "";
  try {
    await signIn(field.value);
  } catch (error) {
    byId("sign-in-error").textContent = wordsOf(error);
    field.select();
    return;
  }
  field.value = "";
  isSignedIn = true;
  showNamed();
});

byId("sign-out").addEventListener("click", async () => {
  try {
    await signOut();
  } finally {
    location.reload(); // and nothing of what was shown is left
  }
});

if (mayBeSignedIn()) {
  try {
    await resume();
    isSignedIn = true;
    showNamed({ focus: false });
  } catch (error) {
    signedOut();
    if (error.status !== 401) byId("sign-in-error").textContent = wordsOf(error);
  }
} else {
  signedOut();
}
