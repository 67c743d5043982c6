"""Free text, as clients send it: what both databases hold, and what neither takes."""

from hypothesis import strategies as st

from gateway.storage.text import MAX_TEXT, fits

storable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=MAX_TEXT // 4)
anything = st.text(st.characters(), max_size=2 * MAX_TEXT)
unstorable = anything.filter(lambda text: not fits(text)) | st.sampled_from(["\0", "\ud800", "x" * (MAX_TEXT + 1)])

UNSTORABLE = ["\0", "a\0b", "\ud800", "x" * (MAX_TEXT + 1)]
HOSTILE = ["", "'; DROP TABLE pins; --", "%", "_", "ä", "a\u0308", "😀", "\x01\r\n\u202e", " x ", "X", "x", "😀" * 200]
"""Pairwise different to us, though some look the same to a collation."""
