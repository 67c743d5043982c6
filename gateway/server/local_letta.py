"""Settings -> the local Letta: which provider answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gateway.letta.local import LocalConfig, Provider
from gateway.settings import Settings

OLLAMA_PORT: Final = 11434


def local_config(settings: Settings) -> LocalConfig:
    """Return what the settings say of a local Letta: the first provider in the table that they name answers."""
    found = (make(value) for field, make in _PROVIDERS if (value := getattr(settings, field)))
    return LocalConfig(Path(settings.home).expanduser(), next(found, None), settings.model or None)


def _ollama(address: str) -> Provider:
    """Return Ollama, whose own variable may be a bare address to listen on."""
    parts = urlsplit(address if "://" in address else f"//{address}", scheme="http")
    host = "127.0.0.1" if parts.hostname in (None, "0.0.0.0") else parts.hostname  # noqa: S104 - what is dialled instead
    shown = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{shown}:{parts.port or OLLAMA_PORT}"
    return Provider("Ollama", {"OLLAMA_BASE_URL": f"{url}/v1"}, "ollama/")


_PROVIDERS: Final[tuple[tuple[str, Callable[[str], Provider]], ...]] = (
    (
        "openai_api_key",
        lambda key: Provider(
            "OpenAI", {"OPENAI_API_KEY": key}, "openai/", ("openai/gpt-5-mini", "openai/gpt-4.1-mini")
        ),
    ),
    (
        "anthropic_api_key",
        lambda key: Provider("Anthropic", {"ANTHROPIC_API_KEY": key}, "anthropic/", ("anthropic/claude-sonnet-4-5",)),
    ),
    ("openrouter_api_key", lambda key: Provider("OpenRouter", {"OPENROUTER_API_KEY": key}, "openrouter/")),
    ("ollama_base_url", _ollama),
    ("lmstudio_base_url", lambda url: Provider("LM Studio", {"LMSTUDIO_BASE_URL": url}, "lmstudio/")),
)
