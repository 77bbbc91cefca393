"""The pages for people: what they name exists in the code."""

import inspect
import re
from pathlib import Path

from functional_sam import METHODS, SharpnessAware
from functional_sam.sharpness.options import GENERAL_OPTIONS, MIX_OPTIONS, PATH_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "functional_sam"
PAGE = (ROOT / "docs" / "using.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_arguments_are_those_of_the_class():
    named = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in section("Arguments").splitlines() if line.startswith("| `"))
    )
    known = {
        *inspect.signature(SharpnessAware.__init__).parameters,
        *GENERAL_OPTIONS,
        *PATH_OPTIONS,
        *MIX_OPTIONS,
        "ascent",
        "path",
    }
    arguments = named[: named.index("dose")]
    assert {"model", "optimizer", "method", "rho", "loss_fn", "forward", "keep"} <= set(arguments)
    assert set(arguments) <= known
    assert hasattr(SharpnessAware, "state_dict")


def test_methods_that_are_advised_exist():
    advised = set(re.findall(r"`((?:[a-z]+-)*sam)`", PAGE))
    assert {"sam", "functional-sam", "momentum-functional-sam"} <= advised <= set(METHODS)


def test_messages_under_troubleshooting_are_the_codes():
    files = [
        *(PACKAGE / "sharpness").glob("*.py"),
        *(PACKAGE / "integrations").glob("*.py"),
        PACKAGE / "losses.py",
        PACKAGE / "derivatives.py",
    ]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    messages = [line.split("|")[1].strip() for line in section("Troubleshooting").splitlines() if line.startswith("| `")]
    assert len(messages) >= 12
    for message in messages:
        fragment = re.match(r"`([^`]+)`", message)[1]
        assert fragment in source, fragment


def test_links_between_pages_lead_somewhere():
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/using.md",
        "paper/README.md",
        "paper/figures/README.md",
        "paper/tables/README.md",
    ):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
