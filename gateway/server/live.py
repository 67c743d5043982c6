"""What changes while the gateway serves, for parts that know no settings: each asks what holds now."""

from collections.abc import Iterator, Mapping
from typing import Literal

from gateway.conversations.chats import ChatPolicy
from gateway.conversations.plans import SystemPrompts
from gateway.conversations.turns import TurnPolicy
from gateway.live_settings.current import LiveSettings
from gateway.server.descriptors import turns_that_fit
from gateway.settings import Settings


def turn_policy(settings: Settings) -> TurnPolicy:
    """Return how turns are held."""
    return TurnPolicy(
        on_disconnect=settings.on_disconnect,
        queue_depth=settings.queue_depth,
        queue_wait=settings.queue_wait,
        max_turns=settings.max_turns or turns_that_fit(),
    )


def chat_policy(settings: Settings) -> ChatPolicy:
    """Return which conversations requests go to."""
    return ChatPolicy(
        conversation=settings.conversation,
        system_prompts=settings.system_prompts,
        tool_activity=settings.tool_activity,
        tool_wait=settings.tool_wait,
        remembers=bool(settings.redis_url) or not settings.database_url,
    )


class LiveTurnPolicy:
    """How turns are held now: a ``TurnRules``."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._most = turns_that_fit()

    @property
    def on_disconnect(self) -> Literal["cancel", "finish"]:
        """Tell what becomes of a turn whose client went away."""
        return self._live.current.on_disconnect

    @property
    def queue_wait(self) -> float:
        """Return the seconds that a turn waits where Letta itself is busy with its thread."""
        return self._live.current.queue_wait

    @property
    def max_turns(self) -> int:
        """Return how many turns are held at once."""
        return self._live.current.max_turns or self._most


class LiveChatPolicy:
    """Which conversations requests go to now: a ``ChatRules``."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._fixed = chat_policy(live.configured)

    @property
    def conversation(self) -> Literal["agent", "stateless"]:
        """Tell what becomes of requests that name no chat."""
        return self._live.current.conversation

    @property
    def system_prompts(self) -> SystemPrompts:
        """Tell what becomes of system prompts."""
        return self._fixed.system_prompts

    @property
    def tool_activity(self) -> Literal["hidden", "reasoning"]:
        """Tell whether what the agent's own tools do is shown."""
        return self._live.current.tool_activity

    @property
    def tool_wait(self) -> float:
        """Return the seconds that a tool call waits for its result."""
        return self._fixed.tool_wait

    @property
    def remembers(self) -> bool:
        """Tell whether pins may be held in memory."""
        return self._fixed.remembers


class LiveServerTools(Mapping[str, tuple[str, ...]]):
    """Which tools of the App Server's machine agents may use now."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live

    def __getitem__(self, agent: str) -> tuple[str, ...]:
        return self._live.current.server_tools[agent]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live.current.server_tools)

    def __len__(self) -> int:
        return len(self._live.current.server_tools)
