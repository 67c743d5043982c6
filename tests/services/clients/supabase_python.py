"""The official client of Supabase in Python: its users' tokens, taken to the gateway.

Two people sign up at Supabase, and each speaks with their own agent; what each then sees is told, a line of JSON each.
"""

import asyncio
import json
import os
import sys

import httpx
from supabase import AsyncClient, create_async_client

_GATEWAY = os.environ["GATEWAY_URL"]
_EMAILS = os.environ["EMAILS"].split(",")
_PASSWORD = "a-password-of-Tests-1"


async def main() -> None:
    """Sign two people up, let both speak, then look."""
    people = [await create_async_client(os.environ["SUPABASE_URL"], os.environ["SUPABASE_ANON_KEY"]) for _ in _EMAILS]
    for person, email in zip(people, _EMAILS, strict=True):
        await person.auth.sign_up({"email": email, "password": _PASSWORD})
        await person.auth.sign_out()
        await person.auth.sign_in_with_password({"email": email, "password": _PASSWORD})
    for person, email in zip(people, _EMAILS, strict=True):
        await _speak(person, email)
    for person in people:
        await person.auth.refresh_session()
        sys.stdout.write(json.dumps(await _look(person)) + "\n")


async def _speak(person: AsyncClient, email: str) -> None:
    user = await person.auth.get_user()
    assert user is not None
    await person.table("notes").insert({"user_id": user.user.id, "text": f"note of {email}"}).execute()
    answer = await _ask(person, "POST", "/api/v1/chat/message", {"message": f"I am {email}", "stream": False})
    assert answer.status_code == 200, answer.text


async def _look(person: AsyncClient) -> dict[str, object]:
    me = (await _ask(person, "GET", "/api/v1/auth/me")).json()
    history = (await _ask(person, "GET", "/api/v1/chat/history")).json()
    notes = (await person.table("notes").select("*").execute()).data
    return {
        "email": me["email"],
        "id": me["id"],
        "history": [message["text"] for message in history["data"] if message["role"] == "user"],
        "notes": [note["text"] for note in notes if isinstance(note, dict)],
    }


async def _ask(person: AsyncClient, method: str, path: str, body: object = None) -> httpx.Response:
    session = await person.auth.get_session()
    assert session is not None
    headers = {"Authorization": f"Bearer {session.access_token}"}
    async with httpx.AsyncClient(timeout=60) as client:
        return await client.request(method, _GATEWAY + path, json=body, headers=headers)


if __name__ == "__main__":
    asyncio.run(main())
