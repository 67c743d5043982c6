"""The App Server's WebSocket frames, as far as they are used.

From its own types (``protocol_v2.d.ts`` of letta 0.34.12) and recordings. Commands carry a ``request_id`` that their
replies carry too; events of a turn carry the ``runtime`` (agent and conversation) that they belong to. A command that
the server does not know is ignored without a word, so every request needs a deadline.
"""

import datetime as dt
from typing import Final, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from gateway.letta.backend import Agent
from gateway.letta.wire import ImageContent, TextContent

THREAD: Final = "Letta Gateway"
"""The summary by which an agent's own thread is found again: the newest of its conversations that has it.

The thread that every agent has from the beginning, ``default``, will not do: a local server takes one run at a time
for each conversation id, and all agents' threads have that same one, so a second agent's turn fails with
``Conversation default already has an active run`` while the first one speaks (letta 0.34.12).
"""

CHAT: Final = "Chat by letta-gateway"
"""The summary of the gateway's other conversations, for people; a search for an agent's own thread misses it."""
SCOPE: Final = "client"
"""What the client's tools are registered under; a turn that does not name it has none of them."""
LONGEST_CALL: Final = 300_000
"""Milliseconds: the server takes no longer limit for a call (letta 0.34.12)."""


class Runtime(Struct, frozen=True):
    """What a turn runs on."""

    agent_id: str
    conversation_id: str


# Commands ------------------------------------------------------------------------------------------------------------


class Command(Struct, tag_field="type", kw_only=True, omit_defaults=True):
    """What every command has."""

    request_id: str


class ServerInfo(Command, tag="app_server_info"):
    """Ask who is there."""


class ListQuery(Struct, omit_defaults=True):
    """Which agents are listed."""

    limit: int
    after: str | None = None
    query_text: str | None = None
    tags: tuple[str, ...] = ()


class ListAgents(Command, tag="agent_list"):
    """Ask for a page of agents."""

    query: ListQuery


class ConversationsQuery(Struct, omit_defaults=True):
    """How many conversations are listed, the newest first."""

    limit: int
    summary_search: str | None = None


class ListConversations(Command, tag="conversation_list"):
    """Ask for the conversations."""

    query: ConversationsQuery


class ForkConversation(Command, tag="conversation_fork"):
    """Make a conversation that goes on from where another one stands; it has the same summary."""

    conversation_id: str


class ConversationChanges(Struct, frozen=True, omit_defaults=True):
    """What a conversation is to become."""

    archived: bool
    summary: str | None = None


class UpdateConversation(Command, tag="conversation_update"):
    """Change a conversation."""

    conversation_id: str
    body: ConversationChanges


class RetrieveAgent(Command, tag="agent_retrieve"):
    """Ask for an agent."""

    agent_id: str


class NewBlock(Struct, frozen=True):
    """What an agent's memory is to begin with: a file of the label's name."""

    label: str
    value: str
    description: str


class AgentBody(Struct, omit_defaults=True):
    """What an agent is made of, or is to become."""

    name: str | None = None
    model: str | None = None
    description: str | None = None
    system: str | None = None
    tags: tuple[str, ...] = ()
    memory_blocks: tuple[NewBlock, ...] = ()


class CreateAgent(Command, tag="agent_create"):
    """Make an agent."""

    body: AgentBody


class UpdateAgent(Command, tag="agent_update"):
    """Change an agent."""

    agent_id: str
    body: AgentBody


class DeleteAgent(Command, tag="agent_delete"):
    """Delete an agent."""

    agent_id: str


class RetrieveConversation(Command, tag="conversation_retrieve"):
    """Ask for a conversation."""

    conversation_id: str


class ListMemory(Command, tag="list_memory"):
    """Ask for the files of an agent's memory; the reply comes in pages."""

    agent_id: str


class ReadMemoryFile(Command, tag="read_memory_file"):
    """Ask for a file of an agent's memory as it is."""

    agent_id: str
    path: str


class WriteMemoryFile(Command, tag="write_memory_file"):
    """Change a file of an agent's memory."""

    agent_id: str
    path: str
    content: str


class EnableMemory(Command, tag="enable_memfs"):
    """Ask where an agent's memory is; one that has none gets some."""

    agent_id: str


class ReadFile(Command, tag="read_file"):
    """Ask for a file of the server's machine."""

    path: str


class ListModels(Command, tag="list_models"):
    """Ask which models its providers offer."""


class ConnectProvider(Command, tag="connect_provider"):
    """Connect a provider of models; ``fields`` are its own: ``apiKey``, ``baseUrl``."""

    provider_id: str
    fields: dict[str, str]
    target: Literal["local", "api"] = "local"


class ClientInfo(Struct, frozen=True):
    """Who speaks to the server, for its log."""

    name: str = "letta-gateway"


class ConversationBody(Struct, frozen=True):
    """What a conversation is to be."""

    agent_id: str
    summary: str = THREAD


class CreateConversation(Command, tag="conversation_create"):
    """Make a conversation."""

    body: ConversationBody


class ExternalTool(Struct, frozen=True):
    """A tool that the client executes.

    Without ``auto_background`` the agent would be told after ten seconds that the call goes on by itself.
    """

    name: str
    description: str
    parameters: Raw
    timeout_ms: int = LONGEST_CALL
    auto_background: bool = False


class ToolGroup(Struct, frozen=True):
    """Tools, and what a turn has to name to have them."""

    scope_id: str
    tools: tuple[ExternalTool, ...]


class ToolUpdate(Struct, frozen=True):
    """All external tools that these conversations are to have."""

    runtimes: tuple[Runtime, ...]
    external_tools: tuple[ToolGroup, ...]


class UpdateTools(Command, tag="runtime_external_tools_update"):
    """Register external tools, in the place of those that this socket registered before."""

    updates: tuple[ToolUpdate, ...]


class CallResult(Struct, frozen=True, omit_defaults=True):
    """What a call gave back."""

    content: tuple[TextContent, ...]
    is_error: bool = False


class AnswerCall(Command, tag="external_tool_call_response"):
    """Answer a call, by the id of the server's request; there is no reply."""

    result: CallResult


class StartRuntime(Command, tag="runtime_start", omit_defaults=False):
    """Subscribe this socket to a conversation.

    ``unrestricted`` means that no tool waits for a person's permission: which tools there are is for the turn to say.
    """

    agent_id: str
    conversation_id: str
    mode: str = "unrestricted"
    recover_approvals: bool = False
    force_device_status: bool = False
    client_info: ClientInfo = ClientInfo()
    external_tools: tuple[ToolGroup, ...] | UnsetType = UNSET


class UserMessage(Struct):
    """What the user says."""

    content: str | list[TextContent | ImageContent]
    client_message_id: str
    role: str = "user"


class Toolset(Struct, frozen=True):
    """The server's own tools that a turn starts from, and those added to them."""

    base: str
    include: tuple[str, ...] = ()


class InputPayload(Struct):
    """A turn's message, and the tools that it may use: none but those allowed here."""

    messages: list[UserMessage]
    client_tool_allowlist: tuple[str, ...]
    client_toolset: Toolset
    kind: str = "create_message"
    exclude_interactive_tools: bool = True
    external_tool_scope_ids: tuple[str, ...] | UnsetType = UNSET


class Input(Command, tag="input"):
    """Start a turn."""

    runtime: Runtime
    payload: InputPayload


class Abort(Command, tag="abort_message"):
    """Stop the turn of a conversation."""

    runtime: Runtime


class RemoveQueued(Command, tag="remove_queue_item"):
    """Take back an input that still waits for another turn."""

    runtime: Runtime
    item_id: str


# Frames --------------------------------------------------------------------------------------------------------------


class QueueItem(Struct):
    """An input that waits for another turn on its conversation."""

    id: str = ""
    client_message_id: str | None = None


class Unqueued(Struct):
    """An input that waits no longer: its turn came, or it was taken out."""

    client_message_id: str = ""
    disposition: str = ""


class LoopStatus(Struct, frozen=True):
    """What the server is at in a turn."""

    status: str = ""


class Incoming(Struct):
    """Any frame: which fields it has depends on its type."""

    type: str = ""
    request_id: str | None = None
    runtime: Runtime | None = None
    delta: Raw = Raw()
    stop_reason: str | None = None
    error: str | None = None
    accepted: bool | None = None
    disposition: str | None = None
    subagent_id: str | None = None
    queue: list[QueueItem] = []
    removed: list[Unqueued] = []
    loop_status: LoopStatus = LoopStatus()
    tool_call_id: str = ""


class Reply(Struct):
    """What every reply says."""

    success: bool = True
    accepted: bool = True
    error: str | None = None


class AgentRow(Struct):
    """An agent; the local server tells no time of creation."""

    id: str
    name: str
    model: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()

    def agent(self) -> Agent:
        """Return the agent; 0 stands for a time that is not told."""
        return Agent(self.id, self.name, 0, self.tags)


class AgentsReply(Reply):
    """A page of agents."""

    agents: list[AgentRow] = []


class AgentReply(Reply):
    """One agent."""

    agent: AgentRow | None = None


class SystemPrompt(Struct):
    """What an agent is told before its memory; listings leave it out, as it may be long."""

    system: str


class SystemPromptReply(Reply):
    """One agent's system prompt."""

    agent: SystemPrompt | None = None


class ConversationRow(Struct):
    """A conversation; ``created_at`` is in ISO's notation, which sorts by time."""

    id: str
    agent_id: str | None = None
    summary: str | None = None
    created_at: str = ""


class ConversationsReply(Reply):
    """A page of conversations."""

    conversations: list[ConversationRow] = []


class ConversationReply(Reply):
    """One conversation."""

    conversation: ConversationRow | None = None


class MemoryFile(Struct):
    """A file of an agent's memory; ``content`` is what it says below its front matter."""

    relative_path: str
    content: str = ""
    description: str | None = None


class MemoryReply(Reply):
    """A page of files."""

    entries: list[MemoryFile] = []
    done: bool = True


class FileReply(Reply):
    """A file; None where it is not there."""

    content: str | None = None


class AbortReply(Reply):
    """Whether there was a turn to be stopped."""

    aborted: bool = False


class DirectoryReply(Reply):
    """Where an agent's memory is on the server's machine."""

    memory_directory: str | None = None


class ModelRow(Struct):
    """A model; ``handle`` is what an agent names."""

    handle: str


class ModelsReply(Reply):
    """The models."""

    entries: list[ModelRow] = []


decode_incoming: Final = msgspec.json.Decoder(Incoming).decode
encode: Final = msgspec.json.Encoder().encode


class Classification(Struct):
    """Which calls of a step run, as the server decided."""

    auto_denied_tool_call_ids: tuple[str, ...] = ()


_decode_classification: Final = msgspec.json.Decoder(Classification).decode

NO_TOOLS: Final = Toolset("none")
MODEL_ASKED: Final = "WAITING_FOR_API_RESPONSE"
"""The loop status from which a turn waits for its model, not for the server."""


def input_of(
    content: str | list[TextContent | ImageContent],
    runtime: Runtime,
    request_id: str,
    server_tools: tuple[str, ...] = (),
    client_tools: tuple[str, ...] = (),
) -> Input:
    """Return the command that starts a turn with these tools: of the server's machine, and the client's."""
    return Input(
        request_id=request_id,
        runtime=runtime,
        payload=InputPayload(
            [UserMessage(content, request_id)],
            client_tool_allowlist=(*server_tools, *client_tools),
            client_toolset=Toolset("none", server_tools) if server_tools else NO_TOOLS,
            external_tool_scope_ids=(SCOPE,) if client_tools else UNSET,
        ),
    )


def answer_of(request_id: str, text: str, *, succeeded: bool) -> AnswerCall:
    """Return the command that answers a call."""
    return AnswerCall(request_id=request_id, result=CallResult((TextContent(text),), is_error=not succeeded))


def iso_time(seconds: float) -> str:
    """Return a time as the server writes it, which sorts."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def refused_calls(delta: bytes) -> tuple[str, ...] | None:
    """Return the calls that the server refuses by itself; None where the frame is not about that."""
    if b"approval_classification_end" not in delta:
        return None
    return _decode_classification(delta).auto_denied_tool_call_ids
