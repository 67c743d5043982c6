from pathlib import Path
from typing import Any

import pytest

from gateway.letta.local import LocalConfig, Provider
from gateway.server.local_letta import local_config
from tests.server.running import settings

EVERYTHING: dict[str, Any] = {
    "openai_api_key": "sk-openai",
    "anthropic_api_key": "sk-anthropic",
    "openrouter_api_key": "sk-openrouter",
    "ollama_base_url": "http://ollama:1",
    "lmstudio_base_url": "http://studio:2/v1",
}


def provider(**changes: Any) -> Provider:
    found = local_config(settings(**changes)).provider
    assert found is not None
    return found


def test_nothing_is_set() -> None:
    assert local_config(settings(home="/srv/gateway")) == LocalConfig(Path("/srv/gateway"), None, None)


def test_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_config(settings()).home == Path("/home/somebody/.letta-gateway")


def test_model() -> None:
    assert local_config(settings(model="openai/gpt-5")).model == "openai/gpt-5"


@pytest.mark.parametrize(
    ("field", "value", "name", "environment", "handles"),
    [
        ("openai_api_key", "sk-1", "OpenAI", {"OPENAI_API_KEY": "sk-1"}, "openai/"),
        ("anthropic_api_key", "sk-1", "Anthropic", {"ANTHROPIC_API_KEY": "sk-1"}, "anthropic/"),
        ("openrouter_api_key", "sk-1", "OpenRouter", {"OPENROUTER_API_KEY": "sk-1"}, "openrouter/"),
        (
            "ollama_base_url",
            "http://127.0.0.1:11434",
            "Ollama",
            {"OLLAMA_BASE_URL": "http://127.0.0.1:11434/v1"},
            "ollama/",
        ),
        (
            "lmstudio_base_url",
            "http://127.0.0.1:1234/v1",
            "LM Studio",
            {"LMSTUDIO_BASE_URL": "http://127.0.0.1:1234/v1"},
            "lmstudio/",
        ),
    ],
)
def test_each_provider(field: str, value: str, name: str, environment: dict[str, str], handles: str) -> None:
    found = provider(**{field: value})
    assert (found.name, found.environment, found.handles) == (name, environment, handles)
    assert all(handle.startswith(handles) for handle in found.preferred)


def test_first_of_several_answers_and_only_its_secret_goes_along() -> None:
    left = dict(EVERYTHING)
    for name in ("OpenAI", "Anthropic", "OpenRouter", "Ollama", "LM Studio"):
        found = provider(**left)
        assert found.name == name
        assert len(found.environment) == 1
        del left[next(iter(left))]


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434/v1"),
        ("http://127.0.0.1:11434/", "http://127.0.0.1:11434/v1"),
        ("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434/v1"),
        ("https://ollama.example.com:443", "https://ollama.example.com:443/v1"),
        ("127.0.0.1", "http://127.0.0.1:11434/v1"),
        ("127.0.0.1:9999", "http://127.0.0.1:9999/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),  # noqa: S104 - Ollama's own way to say that it listens everywhere
        ("0.0.0.0:8080", "http://127.0.0.1:8080/v1"),
        (":8080", "http://127.0.0.1:8080/v1"),
        ("ollama:8080", "http://ollama:8080/v1"),
    ],
)
def test_ollamas_own_ways_to_name_an_address(address: str, url: str) -> None:
    assert provider(ollama_base_url=address).environment == {"OLLAMA_BASE_URL": url}


@pytest.mark.parametrize("address", ["http://[::1]:11434", "[::1]:11434"])
def test_ollama_on_ipv6(address: str) -> None:
    assert provider(ollama_base_url=address).environment == {"OLLAMA_BASE_URL": "http://[::1]:11434/v1"}
