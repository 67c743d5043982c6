import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.accounts import errors
from gateway.errors import ClientError, GatewayError
from tests.test_errors import ADVICE, OPENAI_TYPES
from tests.test_errors import tree as rest_of_the_tree

_ARGUMENTS: dict[type[GatewayError], tuple[Any, ...]] = {errors.TooManyAttempts: (7.2,)}


def leaves(root: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
        yield from leaves(kind)


def make(kind: type[GatewayError]) -> GatewayError:
    maker: Callable[..., GatewayError] = kind
    return maker(*_ARGUMENTS.get(kind, ()))


MORE_ADVICE = re.compile(r"\b(POST|send|Open|nothing more to do)\b")

every_error = pytest.mark.parametrize("kind", sorted(set(leaves()), key=str), ids=lambda kind: kind.__name__)


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^    [│├└─ ]+([A-Z]\w+) +(\d{3})\b", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted((kind.__name__, str(kind.status)) for kind in set(leaves()))


@every_error
def test_error_is_as_those_of_the_tree(kind: type[GatewayError]) -> None:
    error = make(kind)
    assert issubclass(kind, ClientError) == (400 <= error.status < 500)
    assert error.type in OPENAI_TYPES
    assert error.message.endswith((".", "'."))
    assert "\n" not in error.message
    assert len(error.message) < 300
    assert ADVICE.search(error.message) or MORE_ADVICE.search(error.message), error.message
    assert (inspect.getdoc(kind) or "").endswith(".")


@every_error
def test_code_is_its_own(kind: type[GatewayError]) -> None:
    code = make(kind).code
    assert code is not None
    assert re.fullmatch(r"[a-z][a-z_]+", code)
    same = {other for other in leaves() if make(other).code == code and not issubclass(kind, other)}
    assert not [other for other in same if not issubclass(other, kind)]
    assert code not in {other.default_code for other in rest_of_the_tree()}


@every_error
def test_every_401_has_its_challenge(kind: type[GatewayError]) -> None:
    assert ("WWW-Authenticate" in make(kind).headers()) == (kind.status == 401)


def test_wait_is_told() -> None:
    assert errors.TooManyAttempts(7.2).headers()["Retry-After"] == "8"
    assert errors.PasswordsBusy().headers()["Retry-After"] == "2"


def test_conflict_does_not_say_whose_account_it_is() -> None:
    assert "registered already" not in errors.AccountExists().message
    assert "exists" not in errors.AccountExists().message
