"""The command functional-sam, also python -m functional_sam: of the experiments, for which the library alone is not enough."""

import sys


def main() -> int:
    """Run the command line; where its Python or a package of the extra `experiments` is missing, one line says so (exit code 2)."""
    if sys.version_info < (3, 11):
        return _refused(f"the experiments need Python 3.11 or newer, this is {sys.version.split()[0]}; the library runs on it")
    try:
        from functional_sam.cli import main as command

        return command()
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "functional_sam" or "--debug" in sys.argv:
            raise
        return _refused(f"the command needs the package {error.name!r}: pip install '.[experiments]'")


def _refused(words: str) -> int:
    print(f"functional-sam: {words}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
