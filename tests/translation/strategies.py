"""What an agent may say, at random."""

from typing import get_args

from hypothesis import strategies as st

from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)

_COSTLY = '\x00\x01\x1f"\\\x7f\u2028é\ufffd😀𝄞\n\r '
text = st.text() | st.text(alphabet=_COSTLY)
long_text = st.builds(
    lambda piece, times: piece * times, st.text(_COSTLY, min_size=1, max_size=9), st.integers(1, 4_000)
)
"""Texts of up to some ten thousand characters that cost most when they are escaped."""

counts = st.integers(0, 10**9)
usages = st.builds(Usage, counts, counts, st.none() | counts, st.none() | counts)
call_ids = st.sampled_from(["call_a", "call_b", "call_c"])
stops = st.builds(Stop, st.sampled_from(get_args(StopReason)))

spoken = (
    st.builds(TextDelta, text)
    | st.builds(ReasoningDelta, text)
    | st.builds(ToolCallDelta, call_ids, st.none() | st.just("get_weather"), text)
    | st.builds(ServerToolCall, call_ids, st.none() | st.just("memory_insert"), text)
    | st.builds(ServerToolReturn, call_ids, st.none(), st.booleans())
    | usages
)


@st.composite
def turns(draw: st.DrawFn) -> list[Batch]:
    """Draw a turn that ends well, in batches as the network may cut it."""
    events: list[AgentEvent] = [*draw(st.lists(spoken, max_size=20)), draw(stops), *draw(st.lists(usages, max_size=2))]
    batches: list[Batch] = [[]]
    for event in events:
        batches[-1].append(event)
        if draw(st.booleans()):
            batches.append([])
    return batches
