"""The frozen clean-up of wiki markup, plain files, and windows of tokens."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch

from fips_ext.errors import InvalidArgument
from fips_ext.integrations import text

from ..tiny_llama import byte_tokenizer

SENTENCE = "A sentence that is long enough to count as prose, because it has well over eighty characters. "
EXTRACT_SHA256 = "98fee831a80e1fe210939981cd1e2803ad89e05f5c5189da873a81e130b39e95"
needs_gensim = pytest.mark.skipif(
    importlib.util.find_spec("gensim") is None, reason="gensim is not installed"
)


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("{{a|{{b}}|c}}", ""),
        ("{| class=x\n| cell {| inner |} \n|}", ""),
        ("<ref name=a />", ""),
        ("<ref name=a>{{cite|x}} text</ref>", ""),
        ("<!-- hidden\n\n -->", ""),
        ("<math>x^2</math>", ""),
        ("<b>bold</b>", "bold"),
        ("'''bold''' and ''italic''", "bold and italic"),
        ("[[target]] [[target|label]]", "target label"),
        ("[[File:x.png|thumb|a [[nested]] caption]]", ""),
        ("[[Category:X]] [[de:Wort]] [[zh-min-nan:X]]", ""),
        ("[http://x.org label] [http://x.org]", "label"),
        ("a&nbsp;b &ndash; c", "a b – c"),
        ("(; ) x , y", "x, y"),
    ],
)
def test_markup_is_removed(markup, prose):
    assert text.clean_markup(SENTENCE + markup).strip() == (SENTENCE + prose).strip()


@pytest.mark.parametrize(
    "line", ["== Heading ==", "* item", "# item", ": indent", "; term", "| cell", "short"]
)
def test_lines_that_are_not_prose_go(line):
    long = line if line == "short" else line + SENTENCE
    assert text.clean_markup(f"{SENTENCE}\n{long}\n{SENTENCE}") == f"{SENTENCE.strip()}\n{SENTENCE.strip()}"


def test_unbalanced_markup_ends():
    assert "A sentence" in text.clean_markup(SENTENCE + "{{ [[ {| <ref>" * 3)


@needs_gensim
def test_wikipedia_extract_is_frozen():
    parts = text.wikipedia()
    whole = parts.calibration + parts.held_out
    assert whole.count("\n\n") + 1 == 89
    assert len(parts.calibration) == int(0.8 * len(whole))
    assert hashlib.sha256(whole.encode()).hexdigest() == EXTRACT_SHA256


def test_wikipedia_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="pip install --no-deps gensim"):
        text.held_out_text()


def test_a_given_file_replaces_the_extract(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text", encoding="utf-8")
    assert text.calibration_text(path) == text.held_out_text(path) == "some text"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a file"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_refuses_files(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        text.read_text(path)


def test_windows_follow_the_text():
    windows = text.token_windows("abcdefghij", byte_tokenizer(), 4)
    assert windows.dtype == torch.int64
    assert [byte_tokenizer().decode(window) for window in windows] == ["abcd", "efgh"]
    assert text.token_windows("abcdefghij", byte_tokenizer(), 4, limit=1).shape == (1, 4)
    assert text.token_windows("abcdefghij", byte_tokenizer(), 4, limit=9).shape == (2, 4)
    assert text.token_windows("abcd", byte_tokenizer(), 4).shape == (1, 4)


def test_every_window_starts_with_bos_if_the_tokenizer_adds_one():
    class WithStart:
        bos_token_id = 255

        def __call__(self, content, add_special_tokens=True, **options):
            ids = byte_tokenizer()(content, **options)["input_ids"]
            return {"input_ids": [255, *ids] if add_special_tokens else ids}

    windows = text.token_windows("abcdefgh", WithStart(), 4)
    assert windows[:, 0].tolist() == [255, 255]
    assert [byte_tokenizer().decode(window[1:]) for window in windows] == ["abc", "def"]


@pytest.mark.parametrize(
    ("content", "length", "limit", "message"),
    [
        ("", 4, None, "found 0 tokens, needed 4"),
        ("abc", 4, None, "found 3 tokens, needed 4"),
        ("abcd", 1, None, "length: got 1"),
        ("abcd", 4, 0, "limit: got 0"),
    ],
)
def test_refuses_windows(content, length, limit, message):
    with pytest.raises(InvalidArgument, match=message):
        text.token_windows(content, byte_tokenizer(), length, limit)


def test_windows_need_a_tokenizer():
    with pytest.raises(InvalidArgument, match="tokenizer"):
        text.token_windows("abcd", None, 2)


def test_calibration_is_spread_over_the_text():
    content = "".join(chr(ord("a") + i) * text.CALIBRATION_CONTEXT for i in range(10))
    batches = text.calibration_windows(content, byte_tokenizer(), 5 * text.CALIBRATION_CONTEXT)
    firsts = byte_tokenizer().decode(torch.cat(batches)[:, 0])
    assert sorted(firsts) == list("acegi")
    assert firsts[-1] == "i"  # the held-out eighth is of the end of the text
    more = text.calibration_windows(content, byte_tokenizer(), 5 * text.CALIBRATION_CONTEXT, 4)
    assert all(torch.equal(a, b) for a, b in zip(batches[:2], more[:2], strict=True))
    assert len(more) == 4
    assert len(set(byte_tokenizer().decode(torch.cat(more)[:, 0]))) == 8
    everything = text.calibration_windows(content, byte_tokenizer(), 512, 99)
    assert sorted(byte_tokenizer().decode(torch.cat(everything)[:, 0])) == list("abcdefghij")
    assert len(torch.cat(text.calibration_windows(content, byte_tokenizer(), 600))) == 2
    with pytest.raises(InvalidArgument, match="holds 5120 tokens in windows of 512, needed 5121"):
        text.calibration_windows(content, byte_tokenizer(), 5121)
