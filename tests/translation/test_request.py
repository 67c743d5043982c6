import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ClientError, InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Part, Text
from gateway.translation.openai_types import ChatCompletionRequest
from gateway.translation.request import IMAGE_TYPES, MAX_MODEL_LENGTH, agent_turn, decode, turn_content

PNG = base64.b64encode(b"\x89PNG").decode()


def content_of(**changes: Any) -> tuple[Part, ...]:
    """What the agent is told by a plain request with these fields changed."""
    body = {"model": "friend", "messages": [{"role": "user", "content": "Hi"}], **changes}
    return turn_content(decode(json.dumps(body).encode()))


def says(content: Any) -> tuple[Part, ...]:
    return content_of(messages=[{"role": "user", "content": content}])


def shows(url: str) -> Part:
    (part,) = says([{"type": "image_url", "image_url": {"url": url}}])
    return part


def refusal(**changes: Any) -> ClientError:
    with pytest.raises(ClientError) as raised:
        content_of(**changes)
    return raised.value


def outcome(error: ClientError) -> tuple[int, str | None, str | None]:
    return error.status, error.code, error.param


# Fields --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, list[Any]] = {
    "n": [2, 128],
    "logprobs": [True],
    "top_logprobs": [1, 20],
    "stop": ["END", ["a"], ["a", "b", "c", "d", "e"]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}],
    "tools": [[{"type": "function", "function": {"name": "f"}}], [1]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "absent"}}],
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "modalities": [["audio"], ["text", "audio"], []],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}, {"search_context_size": "low"}],
}
"""What an agent cannot do: 400 ``unsupported_parameter`` that names the field."""

HARMLESS: dict[str, list[Any]] = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "stop": ["", []],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
}
"""Values of refused fields that ask for nothing."""

IGNORED: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 2],
    "top_p": [0, 1],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{}, {"50256": -100}],
    "seed": [-1, 10**30],
    "max_tokens": [1, 10**12],
    "max_completion_tokens": [1],
    "reasoning_effort": ["low"],
    "verbosity": ["low"],
    "parallel_tool_calls": [True],
    "service_tier": ["auto"],
    "store": [True],
    "metadata": [{}, {"chat": "7"}],
    "user": ["anna"],
    "safety_identifier": ["anna"],
    "prompt_cache_key": ["x"],
}
"""What the agent's own configuration decides: taken and ignored."""

USED = {"model", "messages", "stream", "stream_options"}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in table.items() for value in values]


def test_every_field_has_a_rule() -> None:
    assert set(ChatCompletionRequest.__struct_fields__) == USED | set(REFUSED) | set(IGNORED)
    assert not set(REFUSED) & set(IGNORED)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_what_an_agent_cannot_do_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert isinstance(error, UnsupportedParameter)
    assert outcome(error) == (400, "unsupported_parameter", name)
    assert error.message.startswith(f"Unsupported parameter: '{name}'. ")


@pytest.mark.parametrize(
    ("name", "value"), cases(HARMLESS) + cases(IGNORED) + cases({name: [None] for name in REFUSED})
)
def test_what_changes_nothing_is_taken(name: str, value: Any) -> None:
    assert content_of(**{name: value}) == (Text("Hi"),)


def test_fields_that_nobody_knows_are_ignored() -> None:
    assert content_of(chat_id="7", session={"a": [1]}) == (Text("Hi"),)


@pytest.mark.parametrize(
    ("changes", "code", "param", "message"),
    [
        ({"n": 0}, "invalid_value", "n", "Invalid value for 'n': expected 'int' >= 1."),
        ({"n": 129}, "invalid_value", "n", "Invalid value for 'n': expected 'int' <= 128."),
        ({"n": "1"}, "invalid_type", "n", "Invalid type for 'n': expected 'int | null', got 'str'."),
        (
            {"temperature": 3},
            "invalid_value",
            "temperature",
            "Invalid value for 'temperature': expected 'float' <= 2.0.",
        ),
        ({"temperature": "hot"}, "invalid_type", "temperature", None),
        ({"top_p": 1.5}, "invalid_value", "top_p", None),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty", None),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", None),
        ({"max_tokens": -1}, "invalid_value", "max_tokens", None),
        ({"max_completion_tokens": 1.5}, "invalid_type", "max_completion_tokens", None),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias[...]", None),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias", None),
        ({"top_logprobs": 21}, "invalid_value", "top_logprobs", None),
        ({"stop": [1]}, "invalid_type", "stop[0]", None),
        ({"stream": "yes"}, "invalid_type", "stream", "Invalid type for 'stream': expected 'bool | null', got 'str'."),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options", None),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
            None,
        ),
        (
            {"stream_options": {"include_usage": True}},
            "invalid_value",
            "stream_options",
            "The 'stream_options' parameter is only allowed when 'stream' is true.",
        ),
        ({"stream": False, "stream_options": {}}, "invalid_value", "stream_options", None),
        (
            {"response_format": {"type": "yaml"}},
            "invalid_value",
            "response_format.type",
            "Invalid value for 'response_format.type': invalid enum value 'yaml'.",
        ),
        (
            {"response_format": {}},
            "missing_required_parameter",
            "response_format.type",
            "Missing required parameter: 'response_format.type'.",
        ),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata[...]", None),
        ({"tools": {}}, "invalid_type", "tools", None),
        ({"user": 7}, "invalid_type", "user", None),
        ({"model": None}, "invalid_type", "model", "Invalid type for 'model': expected 'str', got 'null'."),
        ({"model": 7}, "invalid_type", "model", None),
        ({"model": ""}, "invalid_value", "model", None),
        ({"model": "x" * (MAX_MODEL_LENGTH + 1)}, "invalid_value", "model", None),
    ],
)
def test_field_of_a_wrong_type_or_range(changes: dict[str, Any], code: str, param: str, message: str | None) -> None:
    error = refusal(**changes)
    assert isinstance(error, InvalidRequest)
    assert outcome(error) == (400, code, param)
    assert message is None or error.message == message


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_field(missing: str) -> None:
    body = {"model": "friend", "messages": []}
    del body[missing]
    with pytest.raises(InvalidRequest) as raised:
        decode(json.dumps(body).encode())
    assert outcome(raised.value) == (400, "missing_required_parameter", missing)
    assert raised.value.message == f"Missing required parameter: '{missing}'."


@pytest.mark.parametrize("body", ["null", "[]", "7", '"x"', "true"])
def test_body_that_is_no_object(body: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode(body.encode())
    assert outcome(raised.value) == (400, "invalid_type", None)


def test_body_that_is_nested_too_deeply() -> None:
    body = b'{"model":"friend","messages":[],"x":%b%b}'
    assert decode(body % (b"[" * 100, b"]" * 100)).model == "friend"
    with pytest.raises(InvalidRequest) as raised:
        decode(body % (b"[" * 100_000, b"]" * 100_000))
    assert outcome(raised.value) == (400, "invalid_json", None)


def test_what_a_message_quotes_is_bounded_and_cannot_pose_as_a_path() -> None:
    error = refusal(messages=[{"role": "evil` - at `$.model", "content": "Hi"}])
    assert error.param == "messages[0].role"
    long = refusal(messages=[{"role": "x" * 100_000, "content": "Hi"}])
    assert long.param == "messages[0].role"
    assert len(long.message) < 300


# Messages ------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}


def test_newest_user_message_goes_to_the_agent() -> None:
    transcript = [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Yes?", "refusal": None, "name": "friend"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
        {"role": "assistant"},
        {"role": "user", "name": "anna", "content": "Second"},
    ]
    assert content_of(messages=transcript) == (Text("Second"),)


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        (None, "invalid_type", "messages"),
        ("Hi", "invalid_type", "messages"),
        ({}, "invalid_type", "messages"),
        ([], "invalid_value", "messages"),
        ([7], "invalid_type", "messages[0]"),
        ([USER, None], "invalid_type", "messages[1]"),
        ([{}], "missing_required_parameter", "messages[0].role"),
        ([{"content": "Hi"}], "missing_required_parameter", "messages[0].role"),
        ([{"role": "robot", "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": 7, "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": "system", "content": "Be kind"}, USER], "unsupported_parameter", "messages[0].role"),
        ([USER, {"role": "developer", "content": "Be kind"}], "unsupported_parameter", "messages[1].role"),
        ([USER, {"role": "tool", "tool_call_id": "x", "content": "1"}], "unsupported_parameter", "messages[1].role"),
        ([{"role": "tool", "content": "1"}], "missing_required_parameter", "messages[0].tool_call_id"),
        ([{"role": "function", "name": "f", "content": "1"}], "unsupported_parameter", "messages[0].role"),
        ([{"role": "assistant", "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([USER, {"role": "assistant", "content": "Hi"}], "invalid_value", "messages[1].role"),
        ([{"role": "user"}], "missing_required_parameter", "messages[0].content"),
        ([{"role": "user", "content": None}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": 7}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": ""}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": " \n\t"}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": "a\0b"}], "invalid_value", "messages[0].content"),
        ([{"role": "user", "content": []}], "invalid_value", "messages[0].content"),
        ([USER, {"role": "user", "content": []}], "invalid_value", "messages[1].content"),
    ],
)
def test_messages_that_cannot_be_answered(messages: Any, code: str, param: str) -> None:
    assert outcome(refusal(messages=messages)) == (400, code, param)


def test_older_user_messages_may_be_empty() -> None:
    assert content_of(messages=[{"role": "user", "content": ""}, USER]) == (Text("Hi"),)


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        ({}, "missing_required_parameter", "[1].type"),
        ({"type": "video"}, "invalid_value", "[1].type"),
        ({"type": "text"}, "missing_required_parameter", "[1].text"),
        ({"type": "text", "text": 7}, "invalid_type", "[1].text"),
        ({"type": "text", "text": "\0"}, "invalid_value", "[1].text"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "unsupported_parameter", "[1]"),
        ({"type": "file", "file": {"file_id": "x"}}, "unsupported_parameter", "[1]"),
        ({"type": "image_url"}, "missing_required_parameter", "[1].image_url"),
        ({"type": "image_url", "image_url": "https://example.com/a.png"}, "invalid_type", "[1].image_url"),
        ({"type": "image_url", "image_url": {}}, "missing_required_parameter", "[1].image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, "invalid_image_url", "[1].image_url.url"),
    ],
)
def test_part_that_cannot_be_said(part: dict[str, Any], code: str, param: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}, part]}])
    error_param = error.param or ""
    assert (error.status, error.code) == (400, code)
    # A part whose own validation comes late is named by what was asked of Letta; the rest by msgspec's path.
    assert error_param == f"messages[0].content{param}"


def test_blank_text_beside_an_image_is_left_out() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,AAAA"}}
    assert says([{"type": "text", "text": " "}, picture]) == (ImageData("image/jpeg", "AAAA"),)


def test_nothing_but_blank_text() -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}])
    assert (error.code, error.param) == ("invalid_value", "messages[0].content")


def test_text_and_images_in_the_order_they_came() -> None:
    parts = says(
        [
            {"type": "text", "text": "Look:"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            {"type": "text", "text": " nice?"},
        ]
    )
    assert parts == (
        Text("Look:"),
        ImageData("image/png", PNG),
        ImageUrl("https://example.com/a.png"),
        Text(" nice?"),
    )


def test_text_goes_out_as_it_came() -> None:
    for text in ("  spaced \n", "\u202eRTL", "😀", "\x01\x7f", "a" * 1_000_000):
        assert says(text) == (Text(text),)


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", sorted(IMAGE_TYPES))
def test_inline_image_of_every_type(media_type: str) -> None:
    assert shows(f"data:{media_type};base64,{PNG}") == ImageData(media_type, PNG)


def test_inline_image_whose_type_is_in_capitals() -> None:
    assert shows(f"data:IMAGE/PNG;BASE64,{PNG}") == ImageData("image/png", PNG)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"data:image/svg+xml;base64,{PNG}", "invalid_image_format"),
        (f"data:text/html;base64,{PNG}", "invalid_image_format"),
        (f"data:;base64,{PNG}", "invalid_image_format"),
        (f"data:image/png,{PNG}", "invalid_image_format"),
        (f"data:image/png;hex,{PNG}", "invalid_image_format"),
        (f"data:image/png;charset=x;base64,{PNG}", "invalid_image_format"),
        (f"data:image/png;base64{PNG}", "invalid_image_format"),
        ("data:", "invalid_image_format"),
        ("data:,", "invalid_image_format"),
        ("data:image/png;base64,", "invalid_base64"),
        ("data:image/png;base64,!!!!", "invalid_base64"),
        ("data:image/png;base64,QQ", "invalid_base64"),
        ("data:image/png;base64,QQ==QQ==", "invalid_base64"),
        (f"data:image/png;base64,{PNG}\n", "invalid_base64"),
        ("data:image/png;base64,QUJD QUJD", "invalid_base64"),
        ("data:image/png;base64,é", "invalid_base64"),
        ("data:image/png;base64,_-_-", "invalid_base64"),
    ],
)
def test_inline_image_that_is_none(url: str, code: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert outcome(error) == (400, code, "messages[0].content[0].image_url.url")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "HTTPS://Example.COM:8443/a.png?x=1#y",
        "https://my_bucket.s3.example.com/a.png",
        "https://xn--mnchen-3ya.de/a.png",
        "https://8.8.8.8/a.png",
        "https://[2606:4700:4700::1111]/a.png",
        "https://example.com./a.png",
        "https://1.example.com",
    ],
)
def test_public_image(url: str) -> None:
    assert shows(url) == ImageUrl(url)


@pytest.mark.parametrize(
    "url",
    [
        # not https
        "http://example.com/a.png",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "//example.com/a.png",
        "example.com/a.png",
        "https:///a.png",
        "https://",
        "javascript:alert(1)",
        # this machine and this network
        "https://localhost/a.png",
        "https://localhost./a.png",
        "https://LOCALHOST/a.png",
        "https://app.localhost/a.png",
        "https://letta/a.png",
        "https://printer.local/a.png",
        "https://metadata.google.internal/a.png",
        "https://127.0.0.1/a.png",
        "https://127.0.0.1./a.png",
        "https://0.0.0.0/a.png",
        "https://10.0.0.1/a.png",
        "https://172.16.0.1/a.png",
        "https://192.168.1.1:8443/a.png",
        "https://100.64.0.1/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://224.0.0.1/a.png",
        "https://255.255.255.255/a.png",
        "https://[::]/a.png",
        "https://[::1]/a.png",
        "https://[fe80::1]/a.png",
        "https://[fe80::1%25eth0]/a.png",
        "https://[fd00::1]/a.png",
        "https://[ff02::1]/a.png",
        # the same, in disguise
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[::ffff:169.254.169.254]/a.png",
        "https://[::127.0.0.1]/a.png",
        "https://[64:ff9b::a9fe:a9fe]/a.png",
        "https://[2002:7f00:1::]/a.png",
        "https://2130706433/a.png",
        "https://127.1/a.png",
        "https://0x7f.0.0.1/a.png",
        "https://0x7f000001/a.png",
        "https://0177.0.0.1/a.png",
        "https://127.0.0.0x1/a.png",
        "https://127%2e0%2e0%2e1/a.png",
        "https://app.loc%61lhost/a.png",
        "https://app.localhost%2e/a.png",
        "https://127。0。0。1/a.png",
        "https://app.localhost。/a.png",
        "https://\uff11\uff12\uff17.0.0.1/a.png",
        "https://127.0.0.1\\.example.com/a.png",
        "https://user@example.com/a.png",
        "https://user:secret@example.com/a.png",
        "https://@example.com/a.png",
        "https://example.com\\@127.0.0.1/a.png",
        # not a URL
        "https://exam\nple.com/a.png",
        "https://example.com/a b.png",
        "https://example.com/\0",
        "https://example..com/a.png",
        "https://example.com:port/a.png",
        "https://example.com:99999/a.png",
        "https://[::1/a.png",
        "https://[example.com]/a.png",
    ],
)
def test_image_that_letta_must_not_fetch(url: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert outcome(error) == (400, "invalid_image_url", "messages[0].content[0].image_url.url")


# The turn ------------------------------------------------------------------------------------------------------------


def test_turn_goes_to_the_agents_own_thread() -> None:
    turn = agent_turn("agent-1", (Text("Hi"),))
    assert turn == AgentTurn("agent-1", (Text("Hi"),))
    assert turn.thread == "agent-1"


# Anything else -------------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_part = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_audio", "file", "x"]) | _json,
        "text": _json,
        "image_url": st.fixed_dictionaries({}, optional={"url": st.text() | st.text().map("data:".__add__), "x": _json})
        | _json,
    },
)
_message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "user", "assistant", "system", "tool", "x"]) | _json,
        "content": st.lists(_part, max_size=3) | _json,
    },
)
_body = st.fixed_dictionaries(
    {"model": st.text() | _json, "messages": st.lists(_message, max_size=3) | _json},
    optional=dict.fromkeys(set(ChatCompletionRequest.__struct_fields__) - {"model", "messages"}, _json),
)


@given(body=_body | st.dictionaries(st.text(), _json) | _json)
def test_any_json_is_answered_or_refused(body: Any) -> None:
    parts, error = _try(msgspec.json.encode(_within_64_bits(body)))
    if error is None:
        assert parts
        assert all(isinstance(part, Text | ImageData | ImageUrl) for part in parts)
    else:
        assert (error.status, bool(error.message), bool(error.code)) == (400, True, True)


@given(url=st.text(alphabet="https:/[]@.0127xlocal:%\\#?\uff05\u3002é \n", max_size=40).map("https://".__add__))
def test_any_url_is_taken_or_refused(url: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    parts, error = _try(json.dumps({"model": "friend", "messages": [message]}).encode())
    assert parts == (ImageUrl(url),) or (error is not None and error.code == "invalid_image_url")


def _try(body: bytes) -> tuple[tuple[Part, ...], ClientError | None]:
    try:
        return turn_content(decode(body)), None
    except ClientError as error:
        return (), error


def _within_64_bits(value: Any) -> Any:
    """msgspec writes no longer integers; that the gateway refuses them is tested above."""
    match value:
        case dict():
            return {key: _within_64_bits(item) for key, item in value.items()}
        case list():
            return [_within_64_bits(item) for item in value]
        case int() if not isinstance(value, bool) and abs(value) >= 2**63:
            return 7
        case _:
            return value
