// The official client of Supabase in JavaScript: its users' tokens, taken to the gateway. The same as supabase_python.py.

import { createClient } from "@supabase/supabase-js";

const { GATEWAY_URL, SUPABASE_URL, SUPABASE_ANON_KEY, EMAILS } = process.env;
const password = "a-password-of-Tests-1";

function worked({ data, error }) {
  if (error) throw error;
  return data;
}

async function ask(person, method, path, body) {
  const { session } = worked(await person.auth.getSession());
  const headers = { authorization: `Bearer ${session.access_token}`, "content-type": "application/json" };
  const answer = await fetch(GATEWAY_URL + path, { method, headers, body: body && JSON.stringify(body) });
  if (answer.status !== 200) throw new Error(`${method} ${path}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

async function signUp(email) {
  const person = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, { auth: { persistSession: false, autoRefreshToken: false } });
  worked(await person.auth.signUp({ email, password }));
  await person.auth.signOut();
  worked(await person.auth.signInWithPassword({ email, password }));
  return { person, email };
}

async function speak({ person, email }) {
  const { user } = worked(await person.auth.getUser());
  worked(await person.from("notes").insert({ user_id: user.id, text: `note of ${email}` }));
  await ask(person, "POST", "/api/v1/chat/message", { message: `I am ${email}`, stream: false });
}

async function look({ person }) {
  worked(await person.auth.refreshSession());
  const me = await ask(person, "GET", "/api/v1/auth/me");
  const { data } = await ask(person, "GET", "/api/v1/chat/history");
  const notes = worked(await person.from("notes").select());
  return {
    email: me.email,
    id: me.id,
    history: data.filter(({ role }) => role === "user").map(({ text }) => text),
    notes: notes.map(({ text }) => text),
  };
}

const people = [];
for (const email of EMAILS.split(",")) people.push(await signUp(email));
for (const one of people) await speak(one);
for (const one of people) process.stdout.write(`${JSON.stringify(await look(one))}\n`);
process.exit(0); // connections that are kept alive would hold it up
