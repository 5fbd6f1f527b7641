"""Reading JSON that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or is nested deeper than anything that is meant.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
