"""Which text both databases hold: PostgreSQL takes no NUL, neither takes half a surrogate pair, indexes have a width.

What cannot be kept is refused when it is written, and simply not found when it is looked for.
"""

from typing import Final

MAX_TEXT: Final = 800
"""Bytes of UTF-8: three such columns fit into one row of a PostgreSQL index (2,704 bytes)."""


def fits(text: str) -> bool:
    """Tell whether a column can hold the text."""
    if "\0" in text:
        return False
    try:
        return len(text.encode()) <= MAX_TEXT
    except UnicodeEncodeError:
        return False


def check_fit(*texts: str | None) -> None:
    """Raise ``ValueError`` for text that no column can hold; None is no text."""
    if not all(text is None or fits(text) for text in texts):
        raise ValueError(f"text for the database is at most {MAX_TEXT} bytes of UTF-8 without NUL")
