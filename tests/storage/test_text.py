import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.storage.text import MAX_TEXT, check_fit, fits


@pytest.mark.parametrize("text", ["", "plain", "ä😀", "\x01\x7f\ufffe", "'; DROP TABLE pins; --", "x" * MAX_TEXT])
def test_text_that_fits(text: str) -> None:
    assert fits(text)
    check_fit(text, None)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "x\udfff", "x" * (MAX_TEXT + 1), "😀" * (MAX_TEXT // 4 + 1)])
def test_text_that_no_column_holds(text: str) -> None:
    assert not fits(text)
    with pytest.raises(ValueError, match="800 bytes of UTF-8 without NUL"):
        check_fit("fine", text)


@given(st.text(st.characters()))
def test_any_text_is_judged(text: str) -> None:
    assert fits(text) == ("\0" not in text and len(text.encode("utf-8", "replace")) <= MAX_TEXT and _whole(text))


def _whole(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)
