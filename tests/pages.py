"""The pages that a user reads, and the code in them."""

import contextlib
import functools
import importlib
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Pages of the site that are written at its build.
_BUILT = ("_build", "notebooks")
_IN_DOCS = (path.relative_to(DOCS) for path in sorted(DOCS.rglob("*.md")))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(DOCS / path for path in _IN_DOCS if path.parts[0] not in _BUILT),
]
SHELLS = ("sh", "bash")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

_FENCE = re.compile(
    r"^ *```(?P<language>[^\n`]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_SOURCE = re.compile(r"From `(\S+)`:\n\n\Z")
# A block of text right after one of code.
_OUTPUT = re.compile(r"\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Four spaces after an empty line, outside of a list.
_INDENTED = re.compile(r"(?<=\n\n)((?: {4} *\S.*\n)+)")


def name_of(path: Path) -> str:
    """Returns how a test calls a page."""
    return path.relative_to(ROOT).as_posix()


def languages(text: str) -> set[str]:
    """Returns what the fences of a page are labelled with."""
    return {found["language"].strip() for found in _FENCE.finditer(text)}


def excerpts(text: str) -> list[tuple[str, str]]:
    """Returns (path of a file, code) of the Python that a page takes from a file."""
    return [(path, code) for path, code, _ in _python(text) if path]


def programs(text: str) -> list[str]:
    """Returns the Python of a page that is to run, block by block."""
    return [code for path, code, _ in _python(text) if not path]


def outputs(text: str) -> list[str]:
    """Returns what the page says that each of these blocks prints, at least first."""
    return [output for path, _, output in _python(text) if not path]


def _python(text: str) -> Iterator[tuple[str, str, str]]:
    for found in _FENCE.finditer(text):
        if found["language"].strip() == "python":
            source = _SOURCE.search(text[: found.start()])
            output = _OUTPUT.match(text, found.end())
            code = textwrap.dedent(found["code"])
            yield source[1] if source else "", code, output[1] if output else ""


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command that a page shows, without what `#` says."""
    blocks = [m["code"] for m in _FENCE.finditer(text) if m["language"] in SHELLS]
    blocks += _INDENTED.findall(_FENCE.sub("", text))
    # A command may go on behind a backslash.
    lines = "".join(map(textwrap.dedent, blocks)).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


@functools.cache
def flags_of(module: str) -> set[str]:
    """Returns the flags that the help of a command lists.

    Args:
        module: With a function ``main``, like ``experiments.compare``.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    # tyro draws a frame around them. Some have another form: --remat, --no-remat.
    found = re.findall(r"^.{,2}((?:--?[\w-]+, )*--[\w-]+)", output.getvalue(), re.M)
    return {name for names in found for name in FLAG.findall(names)}
