"""Copy what pipeline.py and function.py share from the one into the other: `python -m tests.open_webui.shared_part`.

Each is copied alone to where it runs, so neither can import the other.
"""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[2] / "gateway" / "open_webui"
_BEGIN: Final = "# --- what pipeline.py and function.py share"
_END: Final = "# --- the end of what is shared ---\n"


def shared_part(source: str) -> str:
    """Return what stands between the marks, with them."""
    begin, end = source.index(_BEGIN), source.index(_END)
    return source[begin : end + len(_END)]


def copied() -> str:
    """Return function.py as it has to be."""
    function = (FOLDER / "function.py").read_text("utf-8")
    pipeline = (FOLDER / "pipeline.py").read_text("utf-8")
    return function.replace(shared_part(function), shared_part(pipeline))


if __name__ == "__main__":
    (FOLDER / "function.py").write_text(copied(), "utf-8")
