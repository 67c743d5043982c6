from typing import Any

import msgspec
import pytest

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import ImageData, ImageUrl, Text, UserSaid
from gateway.translation.platform_request import chat_message

PIXEL = "data:image/png;base64,iVBORw0KGgo="
TEXT = {"type": "text", "text": "What is this?"}


def body(message: Any, **more: Any) -> bytes:
    return msgspec.json.encode({"message": message, **more})


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_text() -> None:
    message = chat_message(body("Hello?"))
    assert (message.said, message.text, message.is_stream) == (UserSaid((Text("Hello?"),)), "Hello?", True)


@pytest.mark.parametrize(("stream", "is_stream"), [(True, True), (False, False), (None, True)])
def test_streams_unless_told_otherwise(stream: bool | None, *, is_stream: bool) -> None:  # noqa: FBT001 - a parameter
    message = chat_message(body("Hi", stream=stream))
    assert message.is_stream is is_stream
    assert message.ask().is_stream is is_stream


def test_parts_are_said_and_kept_as_text() -> None:
    message = chat_message(body([TEXT, image(PIXEL), image("https://pictures.example.com/cat.png")]))
    assert message.said.content == (
        Text("What is this?"),
        ImageData("image/png", "iVBORw0KGgo="),
        ImageUrl("https://pictures.example.com/cat.png"),
    )
    assert message.text == "What is this?\n(an image)\n(an image)"


def test_ask_is_of_the_agent_and_of_nothing_else() -> None:
    ask = chat_message(body("Hi", metadata={"chat_id": "other", "task": "title_generation"})).ask()
    assert (ask.model, ask.transcript, ask.chat, ask.task, ask.tools) == (
        "",
        (UserSaid((Text("Hi"),)),),
        None,
        None,
        (),
    )


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (body(""), "message"),
        (body("  \n"), "message"),
        (body("a\0b"), "message"),
        (body([]), "message"),
        (body([{"type": "text", "text": " "}]), "message"),
        (body([{"type": "text", "text": "a\0b"}]), "message[0].text"),
        (body([TEXT, image("http://169.254.169.254/latest")]), "message[1].image_url.url"),
        (body([TEXT, image("file:///etc/passwd")]), "message[1].image_url.url"),
        (body(7), "message"),
        (body(None), "message"),
        (body([{"type": "video"}]), "message[0].type"),
        (body("Hi", stream="yes"), "stream"),
        (body("Hi", metadata=[]), "metadata"),
        (b"{}", "message"),
    ],
)
def test_wrong_field_is_named(given: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_message(given)
    assert caught.value.param == param


@pytest.mark.parametrize("part", [{"type": "input_audio"}, {"type": "file"}])
def test_what_letta_does_not_take(part: dict[str, str]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        chat_message(body([TEXT, part]))
    assert caught.value.param == "message[1]"
