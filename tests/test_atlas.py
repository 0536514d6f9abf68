"""The atlas: its pictures say what the equations do, and the committed pages are what the files give."""

from __future__ import annotations

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from attnspec.atlas import page as pages
from attnspec.atlas.index import index
from attnspec.atlas.markup import document, el
from attnspec.atlas.page import page
from attnspec.atlas.pattern import Pattern, pattern, patterns
from attnspec.atlas.picture import LEFT, TOP, shades, svg, words
from attnspec.atlas.write import STYLE, write_atlas
from attnspec.conformance import cli
from attnspec.spec import Mechanism, load, mechanisms

ATLAS = Path(__file__).resolve().parent.parent / "docs" / "atlas"
REDRAWN = ("lightning_attention", "eca_channel_attention")
STALE = "the page is not what the files give: run attnspec atlas --out docs/atlas"
committed = pytest.mark.skipif(not ATLAS.exists(), reason="needs the source checkout")


class Reader(HTMLParser):
    """A page's ids, links, headings and sources; anything that is not closed where it should be fails."""

    VOID = frozenset({"meta", "link", "br", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.headings: list[int] = []
        self.described: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), (tag, attrs)
        self.ids.update([given["id"]] if "id" in given else [])
        self.links += [given["href"]] if tag == "a" else []
        self.sources += [given[name] for name in ("src", "href") if name in given and tag != "a"]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag == "svg":
            assert given["role"] == "img"
            self.described += given["aria-labelledby"].split()
        assert tag != "script" and not any(name.startswith("on") or name == "style" for name in given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


@pytest.mark.parametrize("text", ["<p>", "<p><b></p></b>", "</p>", "<script></script>", "<p onclick='x'></p>"])
def test_the_reader_rejects(text: str) -> None:
    with pytest.raises(AssertionError):
        Reader(text)


# -- patterns ---------------------------------------------------------------------------------------------------------


def grid(one: Pattern) -> tuple[np.ndarray, np.ndarray, int, int]:
    rows, columns = one.reads.shape
    return np.arange(rows)[:, None], np.arange(columns)[None], rows, columns


def test_causal_softmax_reads_the_lower_triangle_aligned_at_the_end() -> None:
    one = pattern(load("softmax_attention"), {"causal": True})
    i, j, n, m = grid(one)
    assert 1 < n < m
    assert np.array_equal(one.reads, j <= i + m - n)
    assert words(one) == f"126 of 192 pairs: row i depends on columns 0 to i + {m - n}"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("local_k[j] <= pos[i] if causal", "local_k[j] < pos[i] if causal"), ("pos[i] = ", "pos[i] = 1 + ")],
)
def test_a_wrong_mask_gives_a_wrong_pattern(tmp_path: Path, right: str, wrong: str) -> None:
    text = load("softmax_attention").path.read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "wrong.toml").write_text(text.replace(right, wrong), encoding="utf-8")
    one = pattern(load(tmp_path / "wrong.toml"), {"causal": True})
    i, j, n, m = grid(one)
    assert not np.array_equal(one.reads, j <= i + m - n)


@pytest.mark.parametrize(
    ("name", "options", "reads"),
    [
        ("softmax_attention", {"window_left": 3}, lambda i, j, n, m: j >= i + m - n - 3),
        ("softmax_attention", {"chunk": 5}, lambda i, j, n, m: j // 5 == (i + m - n) // 5),
        ("music_relative_attention", {}, lambda i, j, n, m: j <= i + m - n),
        ("titans_memory", {"read": "pre"}, lambda i, j, n, m: j < i),
        ("davit_channel_attention", {}, lambda i, j, n, m: i == j),
    ],
)
def test_a_pattern_is_that_of_the_options(name: str, options: dict, reads) -> None:  # type: ignore[no-untyped-def, type-arg]
    one = pattern(load(name), options)
    assert np.array_equal(one.reads, np.broadcast_to(reads(*grid(one)), one.reads.shape))


def test_channels_are_read_within_their_group_or_band() -> None:
    (groups,) = patterns(load("davit_channel_attention"), channels=True)
    size = groups.rows.lengths[-1]
    i, j, _, _ = grid(groups)
    assert np.array_equal(groups.reads, i // size == j // size)
    (band,) = patterns(load("eca_channel_attention"), channels=True)
    i, j, _, _ = grid(band)
    assert np.array_equal(band.reads, abs(i - j) <= 1)


def test_the_picture_shows_the_pattern() -> None:
    one = pattern(load("gla"), {})
    drawn = np.full(one.reads.shape, -1)
    picture = svg(one, "p", "title", "text")
    cell = 16
    for path, shade in re.findall(r'<path d="([^"]*)" class="shade(\d)">', picture):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v16h-\d+z", path):
            start = (int(x) - LEFT) // cell
            drawn[(int(y) - TOP) // cell, start : start + int(width) // cell] = int(shade)
    assert np.array_equal(drawn, shades(one))
    assert len(np.unique(drawn)) > 2


# -- pages ------------------------------------------------------------------------------------------------------------


def test_text_and_attributes_are_escaped() -> None:
    assert el("p", "<b> & \"", title='"<') == '<p title="&quot;&lt;">&lt;b&gt; &amp; "</p>\n'
    Reader(document("<title>", '"><script>', el("p", "<script>"), up=True))


def test_a_page_escapes_what_a_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load("lightning_attention").path.read_text(encoding="utf-8")
    changed = re.sub(r'(summary|doc|statement|title) = "', r'\1 = "<script>alert(1)</script> & ', text)
    assert changed != text
    (tmp_path / "hostile.toml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(pages, "_pattern", lambda mechanism: [])
    shown = page(load(tmp_path / "hostile.toml"), [])
    Reader(shown)
    assert "&lt;script&gt;" in shown


def stable(text: str) -> str:
    """A page without what kernels and recorded runs decide."""
    return re.sub(r"<!-- recorded -->.*?<!-- end -->", "", text, flags=re.DOTALL)


def drawn(text: str) -> str:
    """A page without its pictures."""
    return re.sub(r'<section><h2 id="pattern">.*?</section>\n|<li><a href="#pattern">Pattern</a></li>\n', "", text,
                  flags=re.DOTALL)  # fmt: skip


@committed
def test_there_is_a_page_for_every_mechanism_and_no_other() -> None:
    assert {path.name for path in ATLAS.iterdir()} == {STYLE, "index.html", *(f"{name}.html" for name in mechanisms())}
    assert sum(path.stat().st_size for path in ATLAS.iterdir()) < 3e6


@committed
@pytest.mark.parametrize("name", REDRAWN)
def test_a_committed_page_is_the_one_that_is_drawn_again(name: str, tmp_path: Path) -> None:
    (*_, made) = write_atlas(tmp_path, [name])
    assert made.name == f"{name}.html"
    assert stable(made.read_text()) == stable((ATLAS / made.name).read_text()), STALE
    assert (tmp_path / STYLE).read_bytes() == (ATLAS / STYLE).read_bytes(), STALE


@committed
def test_every_committed_page_says_what_the_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_pattern", lambda mechanism: [])
    every: list[Mechanism] = [load(name) for name in mechanisms()]
    assert stable(index(every)) == stable((ATLAS / "index.html").read_text()), STALE
    for mechanism in every:
        found = (ATLAS / f"{mechanism.name}.html").read_text()
        assert "<svg" in found
        assert stable(page(mechanism, every)) == stable(drawn(found)), f"{mechanism.name}: {STALE}"


@committed
def test_pages_are_well_formed_and_their_links_resolve() -> None:
    read = {path.name: Reader(path.read_text()) for path in ATLAS.glob("*.html")}
    for name, one in read.items():
        assert not [identity for identity, count in one.ids.items() if count > 1], name
        assert one.headings[0] == 1 and one.headings.count(1) == 1
        assert all(deeper - level <= 1 for level, deeper in zip(one.headings, one.headings[1:], strict=False)), name
        assert set(one.described) <= set(one.ids)
        assert one.sources == [STYLE], name
        for link in one.links:
            if link.startswith("https://"):
                continue
            target, _, part = link.partition("#")
            assert (target or name) in read, f"{name}: {link}"
            assert not part or part in read[target or name].ids, f"{name}: {link}"


def test_a_wrong_link_and_a_repeated_id_would_be_seen() -> None:
    one = Reader('<h1 id="a">A</h1><a href="#b">b</a><p id="a"></p>')
    assert one.ids["a"] == 2 and "b" not in one.ids and one.links == ["#b"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "atlas"
    assert cli.main(["atlas", "--out", str(out), "--mechanism", "eca_channel_attention"]) == 0
    assert {path.name for path in out.iterdir()} == {STYLE, "index.html", "eca_channel_attention.html"}
    assert capsys.readouterr().out.startswith("3 files, ")


def test_without_pytorch_the_command_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["atlas", "--out", str(tmp_path), "--mechanism", "eca_channel_attention"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "attnspec[torch]" in told
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["atlas", "--out", str(tmp_path / "file"), "--mechanism", "eca_channel_attention"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["atlas", "--out", str(tmp_path), "--mechanism", "nothing"]) == 2
