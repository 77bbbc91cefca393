"""Debian's package descriptions as pairs: aligned, names masked, fetched once, or an error that names the ways out."""

import shutil
import subprocess
from pathlib import Path

import pytest

from functional_sam.data import bitext, debian
from functional_sam.data.bitext import BITEXTS, Asked, Pair
from functional_sam.data.cache import silent
from functional_sam.errors import UserError

LISTS = {
    "Translation-de": (
        "Package: foo\nDescription-md5: 1\nDescription-de: Foo - Werkzeug\n Es tut\n etwas mit foo.\n .\n  * Liste\n .\n Ende.\n\n"
        "Package: bar-data\nDescription-md5: 2\nDescription-de: Daten\n Nur ein Absatz.\n\n"
        "Package: old\nDescription-md5: 9\nDescription-de: Verschwunden\n"
    ),
    "Translation-en": (
        "Package: foo\nDescription-md5: 1\nDescription-en: foo - a tool\n It does\n something with Foo.\n .\n  * list\n .\n"
        " The end.\n\n"
        "Package: bar-data\nDescription-md5: 2\nDescription-en: data\n One.\n .\n Two.\n"
    ),
    "Packages": "Package: foo\nVersion: 1\n\nPackage: bar-data\nSource: bar (1.2)\nVersion: 1\n",
}


def write_lists(directory):
    for what, text in LISTS.items():
        name = f"dists_bookworm_main_{'binary-amd64_Packages' if what == 'Packages' else f'i18n_{what}'}"
        (directory / f"mirror_debian_{name}").write_text(text)
    (directory / "mirror_debian_dists_bookworm_InRelease").write_text("Origin: Debian\nVersion: 12.99\n")


def test_debian_descriptions_are_aligned_by_their_md5_with_names_masked(tmp_path):
    write_lists(tmp_path)
    lists = debian.in_directory(tmp_path, "de")
    assert lists.release == "bookworm 12.99"
    assert sorted(lists.sha256) == ["Packages", "Translation-de", "Translation-en"]
    assert list(debian.aligned(lists)) == [
        ("bar", "data", "Daten"),  # another number of paragraphs: the synopsis alone
        ("foo", "NAME - a tool", "NAME - Werkzeug"),
        ("foo", "It does something with NAME.", "Es tut etwas mit NAME."),
        ("foo", "The end.", "Ende."),
    ]
    asked = Asked(tmp_path, str(tmp_path))
    found = bitext.descriptions(BITEXTS["debian-en-de"], asked, silent)
    assert found.pairs[0] == Pair("bar", "data", "Daten")
    assert bitext.descriptions(BITEXTS["debian-de-en"], asked, silent).pairs[0] == Pair("bar", "Daten", "data")


def test_a_name_is_masked_as_a_word_that_stands_on_both_sides():
    assert debian.masked("time and libtime", "Zeit und time", ("time",)) == ("NAME and libtime", "Zeit und NAME")
    assert debian.masked("make it", "mach es", ("make",)) == ("make it", "mach es")


def test_debians_lists_out_of_reach_name_the_ways_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has 0 lists .*Translation-de.*apt-get -o Dir::State::lists=DIR"):
        debian.in_directory(tmp_path, "de")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"apt-get is not on this machine\. .*runtime\.data=DIR.*data\.sources=\[bible-ja-en\]"):
        debian.downloaded("de", tmp_path / "cache", silent)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    said = subprocess.CompletedProcess([], 0, "", "W: Failed to fetch http://x  Could not resolve 'x'\nW: Some failed")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(UserError, match=r"cannot be fetched: W: Failed to fetch http://x .*data\.sources=\[bible-ja-en\]"):
        debian.downloaded("de", tmp_path / "cache", silent)


def test_debians_lists_are_fetched_once_and_kept(tmp_path, monkeypatch):
    calls = []

    def apt(command, **_):
        calls.append(command)
        directory = next(part.partition("=")[2] for part in command if part.startswith("Dir::State::lists="))
        assert "Acquire::Languages=en,de,fr,it" in command
        write_lists(Path(directory))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", apt)
    first, again = (debian.downloaded("de", tmp_path / "cache", silent) for _ in range(2))
    assert first == again
    assert len(calls) == 1
    (tmp_path / "own").mkdir()
    write_lists(tmp_path / "own")
    assert debian.in_directory(tmp_path / "own", "de") == first  # as apt left them, not compressed
