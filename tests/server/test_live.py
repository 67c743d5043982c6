from gateway.live_settings.current import Change, LiveSettings
from gateway.server.descriptors import turns_that_fit
from gateway.server.live import LiveChatPolicy, LiveServerTools, LiveTurnPolicy, chat_policy, turn_policy
from tests.server.running import settings


def test_turns_are_held_as_it_holds_now() -> None:
    live = LiveSettings(settings(on_disconnect="finish", queue_wait=3.0))
    policy, fixed = LiveTurnPolicy(live), turn_policy(live.configured)
    assert (policy.on_disconnect, policy.queue_wait, policy.max_turns) == ("finish", 3.0, turns_that_fit())
    assert (policy.on_disconnect, policy.queue_wait, policy.max_turns) == (
        fixed.on_disconnect,
        fixed.queue_wait,
        fixed.max_turns,
    )
    live.take({"max_turns": Change("7", 1.0)})
    assert policy.max_turns == 7


def test_chats_go_where_it_holds_now() -> None:
    live = LiveSettings(settings(system_prompts="ignore", tool_wait=5.0))
    policy, fixed = LiveChatPolicy(live), chat_policy(live.configured)
    assert (policy.system_prompts, policy.tool_wait, policy.remembers) == ("ignore", 5.0, fixed.remembers)
    assert (policy.conversation, policy.tool_activity) == ("agent", "hidden")
    live.take({"conversation": Change("stateless", 1.0), "tool_activity": Change("reasoning", 1.0)})
    assert (policy.conversation, policy.tool_activity) == ("stateless", "reasoning")


def test_tools_of_the_servers_machine() -> None:
    live = LiveSettings(settings(server_tools={"Milo": ("Read",)}))
    tools = LiveServerTools(live)
    assert dict(tools) == {"Milo": ("Read",)}
    live.take({"server_tools": Change('{"*": ["Glob"], "Milo": []}', 1.0)})
    assert dict(tools) == {"*": ("Glob",), "Milo": ()}
    assert len(tools) == 2
    assert tools.get("nobody", tools["*"]) == ("Glob",)
