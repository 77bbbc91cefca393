"""The report and the galleries: made of the records alone, the same bytes each time, and committed as the records are."""

import subprocess
from pathlib import Path

import pytest

from functional_sam.exhibits import claims, report

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    "exhibit": "figure-2",
    "scale": "quick",
    "title": "T",
    "headline": "the difference is 0.1",
    "claim": "there is one",
    "answer": "holds",
    "caption": "C.",
    "files": [
        "paper/figures/figure-2.pdf",
        "paper/figures/figure-2.png",
        "paper/figures/figure-2-cost.png",
        "paper/figures/figure-2.csv",
    ],
}


def test_a_gallery_shows_each_exhibit_with_its_finding_and_files(monkeypatch):
    monkeypatch.setattr("functional_sam.exhibits.largest_released", lambda name: "quick")
    ten = {**RECORD, "exhibit": "figure-10", "answer": ""}
    records = {("figure-10", "quick"): ten, ("figure-2", "quick"): RECORD, ("table-1", "quick"): {**RECORD, "exhibit": "table-1"}}
    page = report.gallery("figures", records)
    first, second = page.split("## ")[1:]
    assert first.startswith("figure-2: T")
    assert second.startswith("figure-10: T")
    assert "The difference is 0.1. Claim: there is one: **holds**." in first
    assert "Claim" not in second
    assert "![figure-2](figure-2.png)\n\n![figure-2-cost](figure-2-cost.png)" in first
    assert "[figure-2.csv](figure-2.csv)" in first
    assert "(../../analysis/figure_2.ipynb)" in first


def test_a_larger_scale_is_shown_and_the_smaller_linked():
    larger = {**RECORD, "scale": "laptop", "files": ["paper/figures/figure-2-laptop.png"]}
    page = report.gallery("figures", {("figure-2", "quick"): RECORD, ("figure-2", "laptop"): larger})
    assert "![figure-2-laptop](figure-2-laptop.png)" in page
    assert "[quick](figure-2.png)" in page
    assert "![figure-2](figure-2.png)" not in page


def test_a_claim_is_answered_by_the_largest_scale_that_tests_it():
    """As in README: the larger scale is shown, and what it does not test is said of the smaller, with its finding."""
    larger = {**RECORD, "scale": "laptop", "answer": "not tested", "files": ["paper/figures/figure-2-laptop.png"]}
    page = report.gallery("figures", {("figure-2", "quick"): RECORD, ("figure-2", "laptop"): larger})
    assert "![figure-2-laptop](figure-2-laptop.png)" in page
    assert "Claim: there is one: **holds** (scale quick: the difference is 0.1)." in page


def test_a_page_becomes_a_tree():
    found = report.tree("## A `b`\n\n| x | y |\n|:---|---:|\n| **1** | \\|2\\| |\n\n- one\n")
    heading, table, bullets = found["children"]
    assert (heading["type"], heading["level"]) == ("heading", 2)
    cells = [cell for part in table["children"] for row in part["children"] for cell in row["children"]]
    assert [cell["right"] for cell in cells] == [False, True, False, True]
    words = [one.get("text") for one in cells[3]["children"][0]["children"]]
    assert "".join(words) == "|2|"
    assert bullets["type"] == "bullet_list"


def test_the_report_is_the_one_of_the_records(tmp_path):
    """Galleries and report as committed; a rebuild leaves the tree clean. A reader's own drawings make other ones."""
    done = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "paper"], capture_output=True, text=True)
    if done.returncode or done.stdout:
        pytest.skip("paper/ is not as it was committed")
    records = claims.recorded()
    for kind in ("figures", "tables"):
        assert (ROOT / "paper" / kind / "README.md").read_text() == report.gallery(kind, records)
    committed = (ROOT / "paper" / "report.pdf").read_bytes()
    assert len(committed) < 2e6
    assert report.compiled(records, tmp_path / "report.pdf").read_bytes() == committed


def test_every_record_says_what_it_found_in_few_words_with_a_number():
    for (name, scale), record in claims.recorded().items():
        words = [word for word in record["headline"].split() if any(letter.isalpha() for letter in word)]
        assert len(words) <= 18, f"{name} {scale}: {record['headline']}"
        assert any(letter.isdigit() for letter in record["headline"]), f"{name} {scale}: {record['headline']}"
