import re

import pytest

from gateway.ui.pages import POLICY, static_files
from tests.server.running import serving, settings

WITH_KEY = settings(operator_key="sk-operator")
HTML = sorted(name for name in static_files() if name.endswith(".html"))
SERVED = sorted(name for name in static_files() if not name.endswith(".html"))


@pytest.mark.parametrize("path", ["/ui", "/ui/"])
async def test_page_with_its_policy(path: str) -> None:
    async with serving(WITH_KEY) as gateway:
        answer = await gateway.ask("GET", path)
    assert (answer.status, answer.header("content-type")) == (200, "text/html; charset=utf-8")
    assert answer.header("content-security-policy") == POLICY
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cache-control") == "no-store"
    assert b"Operator key" in answer.body


async def test_without_an_operator_key_it_says_how_to_set_one() -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", "/ui")
    assert answer.status == 404
    assert b"LETTA_GATEWAY_OPERATOR_KEY=" in answer.body
    assert answer.header("content-security-policy") == POLICY


@pytest.mark.parametrize("name", SERVED)
async def test_files_of_the_page(name: str) -> None:
    async with serving(WITH_KEY) as gateway:
        answer = await gateway.ask("GET", f"/ui/{name}")
    kind = "text/javascript" if name.endswith(".js") else "text/css"
    assert (answer.status, answer.header("content-type")) == (200, f"{kind}; charset=utf-8")
    assert answer.header("content-security-policy") == POLICY


@pytest.mark.parametrize(
    "path",
    ["index.html", "no_key.html", "nothing.js", "pages.py", "app.js%00", "api", "app.js/"],
)
async def test_nothing_else_is_a_file(path: str) -> None:
    async with serving(WITH_KEY) as gateway:
        answer = await gateway.ask("GET", f"/ui/{path}")
        assert (answer.status, answer.code) == (404, "unknown_url")


async def test_foreign_host_and_proxies_are_refused_without_api_keys() -> None:
    """Another name for this machine (DNS rebinding) does not lead to the page either."""
    async with serving(WITH_KEY) as gateway:
        assert (await gateway.ask("GET", "/ui", {"Host": "evil.example.com"})).status == 403
        assert (await gateway.ask("GET", "/ui", {"X-Forwarded-For": "203.0.113.7"})).status == 403


def test_policy_lets_nothing_foreign_in() -> None:
    directives = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert directives["default-src"] == "'none'"
    assert not re.search(r"unsafe|http|\*", POLICY)


@pytest.mark.parametrize("name", HTML)
def test_markup_has_nothing_that_the_policy_would_stop(name: str) -> None:
    text = static_files()[name].body.decode()
    assert not re.search(r"<script(?![^>]* src=\"/ui/)", text)
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text)
    assert not re.search(r"(src|href)=\"(?!/ui/|#|data:,)", text)


@pytest.mark.parametrize("name", SERVED)
def test_scripts_make_no_markup_out_of_text(name: str) -> None:
    text = static_files()[name].body.decode()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\.style\b", text
    )
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
