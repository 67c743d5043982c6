import msgspec

from gateway.translation.agent_turn import AgentSaid, Call, Text, ToolResult, UserSaid
from gateway.translation.responses_stored import output_of, said_before

ASKED = b'[{"type":"message","role":"user","content":[{"type":"input_text","text":"weather?"}]}]'
CALLED = (
    b'{"id":"resp_1","output":[{"type":"reasoning","id":"rs_1","summary":[]},'
    b'{"type":"function_call","id":"fc_1","call_id":"c-1","name":"f","arguments":"{}","status":"completed"}]}'
)
RESULT = b'[{"type":"function_call_output","call_id":"c-1","output":"sunny"}]'
ANSWERED = (
    b'{"id":"resp_2","output":[{"type":"message","id":"msg_1","role":"assistant","status":"completed",'
    b'"content":[{"type":"output_text","text":"It is sunny.","annotations":[]}]}]}'
)


def test_chain_is_read_as_a_transcript() -> None:
    assert said_before([(ASKED, CALLED), (RESULT, ANSWERED)]) == (
        UserSaid((Text("weather?"),)),
        AgentSaid("", (Call("c-1", "f", "{}"),)),
        ToolResult("c-1", "sunny"),
        AgentSaid("It is sunny."),
    )


def test_instructions_of_earlier_responses_hold_no_more() -> None:
    told = b'[{"type":"message","role":"developer","content":"Be kind."},{"role":"user","content":"Hi"}]'
    assert said_before([(told, b'{"output":[]}')]) == (UserSaid((Text("Hi"),)),)


def test_nothing_came_before() -> None:
    assert said_before([]) == ()
    assert said_before([(b"[]", b"{}")]) == ()


def test_output_of_a_stored_response() -> None:
    assert [item["type"] for item in msgspec.json.decode(output_of(CALLED))] == ["reasoning", "function_call"]
