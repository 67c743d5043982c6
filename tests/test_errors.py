import inspect
import json
import re
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import pytest

from gateway import errors
from gateway.errors import (
    AuthenticationFailed,
    BackendError,
    ClientError,
    ConversationBusy,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    OutcomeUnknown,
    PayloadTooLarge,
    RateLimited,
    ResponseNotFound,
    StorageUnavailable,
    UpstreamUnavailable,
)

_ARGUMENTS: dict[type[GatewayError], tuple[Any, ...]] = {
    ModelNotFound: ("friend",),
    ResponseNotFound: ("resp_1",),
    MethodNotAllowed: (frozenset({"POST", "GET"}),),
    PayloadTooLarge: (1_024,),
    RateLimited: ("600/minute", 7.0),
}

OPENAI_TYPES = {
    "invalid_request_error",
    "permission_error",
    "conflict_error",
    "rate_limit_error",
    "insufficient_quota",
    "server_error",
}

ADVICE = re.compile(
    r"\b(Try|Send|Check|check|Wait|Compare|Leave|Ask|ask|Approve|GET|The operator should|change it|tell the operator"
    r"|It takes|try again)\b"
)


def tree(root: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    """Every class of ``gateway/errors.py`` below the root."""
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from tree(kind)


def leaves() -> list[type[GatewayError]]:
    return [kind for kind in tree() if kind not in (ClientError, BackendError)]


def make(kind: type[GatewayError]) -> GatewayError:
    maker: Callable[..., GatewayError] = kind
    return maker(*_ARGUMENTS.get(kind, ()))


every_error = pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)


# The tree ------------------------------------------------------------------------------------------------------------


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[str, str, int]] = []
    families: list[str] = []
    for indent, name, rest in re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)(.*)$", errors.__doc__ or "", re.MULTILINE):
        families[len(indent) // 4 :] = [name]
        if status := re.match(r" +(\d{3})\b", rest):
            drawn.append((families[-2], name, int(status[1])))
    exist = [(kind.__base__.__name__, kind.__name__, kind.status) for kind in leaves() if kind.__base__ is not None]
    assert sorted(drawn) == sorted(exist)


@every_error
def test_status_fits_its_family(kind: type[GatewayError]) -> None:
    status = HTTPStatus(make(kind).status)
    if issubclass(kind, ClientError):
        assert 400 <= status < 500
    elif not issubclass(kind, BackendError):
        assert 500 <= status < 600


@every_error
def test_code_is_stable_and_its_own(kind: type[GatewayError]) -> None:
    code = make(kind).code
    assert code is not None
    assert re.fullmatch(r"[a-z][a-z_]+", code)
    assert [other for other in leaves() if make(other).code == code] == [kind]


@every_error
def test_type_is_one_that_openai_knows(kind: type[GatewayError]) -> None:
    assert make(kind).type in OPENAI_TYPES


@every_error
def test_message_tells_what_to_do(kind: type[GatewayError]) -> None:
    message = make(kind).message
    assert message.endswith((".", "'."))
    assert "\n" not in message
    assert len(message) < 300
    assert ADVICE.search(message), message


@every_error
def test_class_says_what_happened(kind: type[GatewayError]) -> None:
    assert (inspect.getdoc(kind) or "").endswith(".")
    assert kind.__doc__ != GatewayError.__doc__


# The answer ----------------------------------------------------------------------------------------------------------


@every_error
def test_body_is_openais(kind: type[GatewayError]) -> None:
    error = make(kind)
    assert json.loads(error.body()) == {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }


@every_error
def test_headers_are_short_ascii_lines(kind: type[GatewayError]) -> None:
    for name, value in make(kind).headers().items():
        assert re.fullmatch(r"[A-Za-z-]+", name)
        assert value.isascii()
        assert value.isprintable()


def test_what_is_said_about_one_case() -> None:
    error = InvalidRequest("'n' is wrong.", param="n", code="invalid_type", should_retry=False)
    assert str(error) == error.message == "'n' is wrong."
    assert json.loads(error.body())["error"] == {
        "message": "'n' is wrong.",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_type",
    }
    assert error.headers() == {"x-should-retry": "false"}


def test_nothing_to_say_about_retries() -> None:
    assert InternalError().headers() == {}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2"), (59.5, "60"), (7200.0, "7200")]
)
def test_wait_is_whole_seconds_and_no_less_than_asked(seconds: float, shown: str) -> None:
    assert UpstreamUnavailable(retry_after=seconds).headers()["Retry-After"] == shown


def test_retry_that_is_safe() -> None:
    assert ConversationBusy(retry_after=3).headers() == {"Retry-After": "3", "x-should-retry": "true"}


def test_challenge_goes_with_a_401() -> None:
    assert AuthenticationFailed().headers()["WWW-Authenticate"] == "Bearer"


def test_methods_go_with_a_405() -> None:
    error = MethodNotAllowed(frozenset({"POST", "GET"}))
    assert error.headers() == {"Allow": "GET, POST"}
    assert error.message == "This URL does not take that method. It takes: GET, POST."


def test_unknown_model_is_named_and_its_name_bounded() -> None:
    assert "'friend'" in ModelNotFound("friend").message
    assert ModelNotFound("friend").param == "model"
    assert len(ModelNotFound("x" * 10_000).message) < 300


def test_limits_are_told() -> None:
    assert "1024 bytes" in PayloadTooLarge(1_024).message
    limited = RateLimited("600/minute", 7.2)
    assert "600/minute" in limited.message
    assert limited.headers() == {"Retry-After": "8", "x-should-retry": "true"}


def test_unknown_response_is_named_and_its_name_bounded() -> None:
    error = ResponseNotFound("resp_1", param="previous_response_id")
    assert error.param == "previous_response_id"
    assert error.message.startswith("Response with id 'resp_1' not found.")
    assert ResponseNotFound("resp_1").param is None
    assert len(ResponseNotFound("x" * 10_000).message) < 300


def test_answer_that_is_not_to_be_had_is_not_asked_for_again() -> None:
    assert OutcomeUnknown().headers() == {"x-should-retry": "false"}


def test_reason_of_a_broken_database_is_for_the_log() -> None:
    error = StorageUnavailable("disk full")
    assert error.reason == "disk full"
    assert "disk" not in error.message
    assert error.headers() == {"Retry-After": "2"}


def test_text_that_json_escapes() -> None:
    assert json.loads(InvalidRequest('"\n\x00é😀').body())["error"]["message"] == '"\n\x00é😀'


def test_error_that_is_dealt_with_holds_no_frames() -> None:
    def fails() -> None:
        try:
            int("first")
        except ValueError as error:
            raise KeyError("second") from error

    def gives_up() -> None:
        try:
            fails()
        except KeyError as error:
            raise errors.InternalError from error

    with pytest.raises(errors.InternalError) as raised:
        gives_up()
    found = errors.dealt_with(raised.value)
    assert isinstance(found.__cause__, KeyError)
    assert isinstance(found.__cause__.__cause__, ValueError)
    assert (found.__traceback__, found.__cause__.__traceback__, found.__cause__.__cause__.__traceback__) == (None,) * 3
