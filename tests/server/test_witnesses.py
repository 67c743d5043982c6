"""What a gateway that Redis does not answer makes of what the others say."""

import pytest

from gateway.handlers.forwarding import RedisThere
from gateway.server.witnesses import Witnesses


@pytest.mark.parametrize(
    ("said", "is_cut_off"),
    [
        ([], False),
        (["gone"], False),
        (["silent"], False),
        (["silent", "unknown", "gone"], False),
        (["answers"], True),
        (["silent", "answers"], True),
        (["unknown"], True),
        (["unknown", "gone"], True),
    ],
)
async def test_gateway_is_cut_off_where_another_may_be_given_what_it_has(
    said: list[RedisThere], *, is_cut_off: bool
) -> None:
    answers = {str(number): answer for number, answer in enumerate(said)}

    async def redis_of(place: str) -> RedisThere:
        return answers[place]

    assert await Witnesses(lambda: list(answers), redis_of).is_cut_off() == is_cut_off
