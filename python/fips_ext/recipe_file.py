"""Recipes in files: YAML or JSON, or the one inside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InvalidArgument
from .models import CHECKPOINT_FILE


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields that a file sets; :class:`~fips_ext.Recipe` has the others.

    Args:
        path: a YAML or JSON file whose keys are fields of the recipe, or a checkpoint folder.

    Raises:
        InvalidArgument: there is no such file, or it holds something else.
    """
    path = Path(path)
    found = _parsed(path / CHECKPOINT_FILE if path.is_dir() else path)
    if path.is_dir():
        found = found.get("recipe") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidArgument(
            f"recipe: {path} holds no recipe; expected lines such as 'ratio: 0.6', or a checkpoint folder "
            "that was saved with its recipe"
        )
    return found


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"recipe: {path} cannot be read ({error}); give another file") from error
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"recipe: {path} is no JSON ({error})") from error
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a recipe in YAML needs PyYAML; pip install 'fips_ext[transformers]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"recipe: {path} is no YAML ({' '.join(str(error).split())})") from error
