"""One page about one checkpoint: what it holds, how good it is, how fast it is."""

from .facts import Facts, collect
from .html import to_html
from .markdown import to_markdown

__all__ = ["Facts", "collect", "to_html", "to_markdown"]
