"""Text for calibration and evaluation: plain files, and the Wikipedia extract that gensim ships.

The clean-up of the extract is frozen: the same file gives the same characters on every machine, so
perplexities measured on it stay comparable. The tests hold its hash; a change of any rule below makes every
published number on this text a number of another text.
"""

from __future__ import annotations

import bz2
import functools
import html
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from ..errors import InvalidArgument

CALIBRATION_SHARE = 0.8
CALIBRATION_CONTEXT = 512
MIN_ARTICLE = 2000
MIN_LINE = 80

_CALIBRATION_BATCH = 2
_EXTRACT = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_INSTALL = "pip install --no-deps gensim==4.4.0"

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REF = re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE)
# Elements whose content is not prose.
_OPAQUE = re.compile(
    r"<(ref|math|gallery|timeline|code|source|syntaxhighlight|pre|score|hiero|chem)\b[^>]*>.*?</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
# The innermost template or table; applied until nothing matches, which unwinds any nesting.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
# A link into a namespace or another language: not part of the sentence.
_NAMESPACE = re.compile(r"\s*(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)*)\s*:", re.IGNORECASE)
_URL_TEXT = re.compile(r"\[(?:https?:|ftp:|mailto:)?//?[^\s\]]+\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,}")
# Headings, list items (mostly bibliography), rests of tables.
_NOT_PROSE = ("=", "*", "#", ":", ";", "|", "!", "{", "}")
_SPACE = re.compile(r"[ \t\u00a0]+")
# What removed templates leave behind: "( ; )" and a space before punctuation.
_EMPTY_PARENTHESES = re.compile(r"\(\s*[;,]?\s*\)")
_SPACE_BEFORE = re.compile(r" +([,.;:)])")


class WikipediaText(NamedTuple):
    """The two parts of the cleaned extract, disjoint and in the order of the file."""

    calibration: str
    held_out: str


def clean_markup(markup: str) -> str:
    """Prose of one article's wiki markup: lines of at least 80 characters, one paragraph a line."""
    text = _COMMENT.sub("", html.unescape(markup))
    text = _OPAQUE.sub("", _EMPTY_REF.sub("", text))
    for nested in (_TEMPLATE, _TABLE):
        text = _remove_nested(nested, text)
    text = _replace_links(text)
    text = _URL_TEXT.sub(r"\1", text)
    text = _QUOTES.sub("", _TAG.sub("", text))
    lines = (_clean_line(line) for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) >= MIN_LINE)


def wikipedia() -> WikipediaText:
    """The gensim extract, cleaned: its first 80 % of characters to calibrate, the rest to score.

    Raises:
        InvalidArgument: if gensim's data is not installed or is unreadable.
    """
    return _wikipedia(_extract_path())


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        InvalidArgument: if it is missing, a folder, not UTF-8, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidArgument(f"text: {path} is not a file; give a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"text: {path} is not UTF-8 ({error}); convert it first") from error
    if not text.strip():
        raise InvalidArgument(f"text: {path} is empty; give a file that holds some text")
    return text


def calibration_text(path: str | Path | None = None) -> str:
    """Text to calibrate on: the file, or without one the calibration part of the extract."""
    return wikipedia().calibration if path is None else read_text(path)


def held_out_text(path: str | Path | None = None) -> str:
    """Text to score: the file, or without one the held-out part of the extract."""
    return wikipedia().held_out if path is None else read_text(path)


def token_windows(text: str, tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Cut a text into windows without overlap; a last, shorter window is dropped.

    Args:
        text: tokenised as one sequence without special tokens.
        tokenizer: a transformers tokenizer. If it starts every sequence with a BOS token by
            default, so does every window.
        length: tokens per window, at least 2 (the first token of a window is never scored).
        limit: at most this many windows; None takes all.

    Returns:
        int64 ``[N, length]``, ``N >= 1``.

    Raises:
        InvalidArgument: for a text of fewer than ``length`` tokens.
    """
    if length < 2:
        raise InvalidArgument(f"length: got {length}; a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise InvalidArgument(f"limit: got {limit}; expected None or a positive number of windows")
    if tokenizer is None:
        raise InvalidArgument(
            "tokenizer: the model came without one; put its tokenizer files beside the weights"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = _start_token(tokenizer)
    stride = length - start.numel()
    if len(ids) < stride:
        raise InvalidArgument(
            f"text: found {len(ids)} tokens, needed {stride} for one window; "
            "give a longer text or a shorter context"
        )
    count = len(ids) // stride
    if limit is not None:
        count = min(count, limit)
    body = torch.tensor(ids[: count * stride], dtype=torch.int64).view(count, stride)
    return torch.cat([start.expand(count, -1), body], dim=1)


def calibration_windows(text: str, tokenizer: Any, tokens: int, batches: int = 0) -> list[Tensor]:
    """Model inputs that hold at least ``tokens`` tokens of ``text``, spread evenly over it, in random order.

    Neighbouring windows speak of one subject; a spread sample sees more of the language for the same cost.
    Only the last eighth, which is held back to measure on, comes from the last eighth of the text: held-out
    windows of subjects that were calibrated on would flatter whatever fits its data most closely.

    Args:
        batches: at least as many, if the text is long enough; the further ones follow the first, and their
            last eighth, too, is of the last eighth of the text.

    Returns:
        int64 ``[B, T]`` batches.

    Raises:
        InvalidArgument: the text holds fewer than ``tokens``.
    """
    windows = token_windows(text, tokenizer, CALIBRATION_CONTEXT)
    wanted = -(-tokens // CALIBRATION_CONTEXT)
    if wanted > len(windows):
        raise InvalidArgument(
            f"text: holds {windows.numel()} tokens in windows of {CALIBRATION_CONTEXT}, needed {tokens} to "
            "calibrate; give a longer text or ask for fewer calibration tokens"
        )
    generator = torch.Generator().manual_seed(0)
    parts = torch.arange(len(windows)).tensor_split([len(windows) * 7 // 8])
    counts = [wanted * 7 // 8, wanted - wanted * 7 // 8]
    more = max(0, batches * _CALIBRATION_BATCH - wanted)
    left = [len(part) - count for part, count in zip(parts, counts, strict=True)]
    last = min(left[1], max(more // 8, more - left[0]))
    first, further = [], []
    for part, count, extra in zip(parts, counts, (more - last, last), strict=True):
        chosen = torch.zeros(len(part), dtype=torch.bool)
        chosen[torch.arange(count) * len(part) // count if count else []] = True
        first.append(_shuffled(part[chosen], generator))
        further.append(_shuffled(part[~chosen], generator)[:extra])
    return list(windows[torch.cat([*first, *further])].split(_CALIBRATION_BATCH))


def _shuffled(items: Tensor, generator: torch.Generator) -> Tensor:
    return items[torch.randperm(len(items), generator=generator)]


def _start_token(tokenizer: Any) -> Tensor:
    """The BOS token as int64 ``[1]`` if the model wants one, else ``[0]``."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    wanted = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return torch.tensor(first if wanted else [], dtype=torch.int64)


def _remove_nested(pattern: re.Pattern[str], text: str) -> str:
    found = 1
    while found:
        text, found = pattern.subn("", text)
    return text


def _replace_links(text: str) -> str:
    """``[[target|label]]`` to its label; namespace links, captions included, to nothing."""

    def label(match: re.Match[str]) -> str:
        inside = match[1]
        if _NAMESPACE.match(inside):
            return ""
        return inside.rsplit("|", 1)[-1]

    found = 1
    while found:
        text, found = _LINK.subn(label, text)
    return text


def _clean_line(line: str) -> str:
    line = line.strip()
    if line.startswith(_NOT_PROSE):
        return ""
    line = _EMPTY_PARENTHESES.sub("", _SPACE.sub(" ", line))
    return _SPACE_BEFORE.sub(r"\1", _SPACE.sub(" ", line)).strip()


def _extract_path() -> Path:
    spec = importlib.util.find_spec("gensim")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / _EXTRACT
        if path.is_file():
            return path
    raise InvalidArgument(
        f"text: the Wikipedia extract of the gensim package is not installed; run '{_INSTALL}' "
        "or give a text file"
    )


@functools.lru_cache(maxsize=1)
def _wikipedia(path: Path) -> WikipediaText:
    articles = []
    try:
        with bz2.open(path) as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag.rpartition("}")[2] != "text":
                    continue
                prose = clean_markup(element.text or "")
                if len(prose) > MIN_ARTICLE:
                    articles.append(prose)
                element.clear()
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InvalidArgument(
            f"text: {path} is unreadable ({error}); reinstall it with '{_INSTALL}'"
        ) from error
    text = "\n\n".join(articles)
    cut = int(CALIBRATION_SHARE * len(text))
    return WikipediaText(text[:cut], text[cut:])
