"""A set of classified texts that is on every machine with Python.

What is classified is a paragraph of the documentation inside the standard library's
sources; its label is the part of the library that it documents: networking,
concurrency, files, text, numbers or debugging. The modules of the validation rows are
others than those of the training rows, so that it takes the sense of a paragraph, and
not a module's vocabulary, to name its part.

About 1,200 training and 400 validation rows of 8 to 24 words, some 20 tokens each; they
differ a little between versions of Python. Classes have nearly equal shares in the
validation rows: whoever always gives the same answer is right in one of six, 16.7 %.
With Python 3.11.7 a linear classifier of words and pairs of words (TF-IDF) was right in
47 %, one on the mean of MiniLM's outputs, not fine-tuned, in 65 %.
"""

import ast
import hashlib
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import UserError
from experiments.tasks.rows import Place, Rows

# Label -> modules to train on, and modules to validate on; those behind a slash are
# held out of the package before it.
_MODULES = {
    "concurrency": (
        "asyncio threading multiprocessing subprocess",
        "asyncio/locks asyncio/queues concurrent queue sched _threading_local",
    ),
    "debugging": (
        "unittest doctest bdb profile logging tracemalloc cProfile",
        "pdb pstats timeit trace traceback warnings",
    ),
    "files": (
        "_pyio bz2 dbm genericpath io linecache lzma mailbox ntpath os pathlib "
        "posixpath shelve stat tarfile tempfile zipfile",
        "filecmp fileinput fnmatch glob gzip shutil",
    ),
    "networking": (
        "http imaplib ipaddress netrc selectors smtplib socket ssl urllib webbrowser",
        "ftplib poplib socketserver wsgiref xmlrpc",
    ),
    "numbers": (
        "_pydecimal _pydatetime _pylong calendar datetime decimal numbers operator",
        "colorsys fractions random statistics",
    ),
    "text": (
        "_markupbase codecs difflib email gettext html locale plistlib quopri re "
        "string stringprep tomllib xml",
        "base64 configparser csv json shlex textwrap",
    ),
}
_MOST_TRAIN, _MOST_VALIDATION = 200, 70
_WORDS = range(8, 25)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_TESTS = {"test", "tests"}


def embedded_rows(root: Path | None = None) -> tuple[Rows, Rows]:
    """Reads the rows, ``text`` and ``label`` each, to train and to validate on.

    The same Python version gives the same rows in the same order. At most 200 and 70
    of a class are taken, by a hash of the text.

    Args:
        root: Directory of the standard library; that of the running Python by default.

    Raises:
        UserError: If there are no sources, as in a zipped Python.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts = []
    known = set()
    for part, most in enumerate((_MOST_TRAIN, _MOST_VALIDATION)):
        held_out = {name for _, names in _MODULES.values() for name in names.split()}
        rows = []
        for label, modules in _MODULES.items():
            found = {}
            for path in _files(root, modules[part].split()):
                name = path.relative_to(root).with_suffix("").as_posix()
                if part == 0 and name in held_out:
                    continue
                for text, line in _paragraphs(path):
                    if text not in known:
                        known.add(text)
                        found[text] = Place(f"{name}.py", "line", line)
            rows += [(text, label, found[text]) for text in _few(found, most)]
        parts.append(rows)
    if not all(parts):
        raise UserError(
            f"this Python has no sources of its standard library in {root}; give "
            "examples of your own with --train"
        )
    return _rows(parts[0], "training", root), _rows(parts[1], "validation", root)


def _rows(rows, use, root):
    return Rows(
        f"documentation in Python {platform.python_version()}'s standard library, "
        f"{use} modules",
        [{"text": text, "label": label} for text, label, _ in rows],
        [place for _, _, place in rows],
        (root,),
    )


def _files(root: Path, modules: list[str]) -> Iterator[Path]:
    for module in modules:
        if (root / f"{module}.py").is_file():
            yield root / f"{module}.py"
        found = sorted((root / module).rglob("*.py"))
        yield from (f for f in found if not _TESTS & set(f.relative_to(root).parts))


def _paragraphs(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the plain paragraphs of docstrings, each with the line of its object."""
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (UnicodeDecodeError, SyntaxError):
        return
    for node in _documented(tree):
        line = 1 if isinstance(node, ast.Module) else node.lineno
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(paragraph.split())
            if _is_plain(paragraph, text):
                yield text, line


def _documented(node):
    """Yields the modules, classes and functions in the order of the file."""
    if isinstance(node, _DOCUMENTED):
        yield node
    # Expressions, which are most of a tree, have no body of statements.
    for name in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, name, ()):
            yield from _documented(child)


def _is_plain(paragraph, text):
    """Whether it is sentences of some length, and no list, example or signature."""
    is_indented = paragraph[:1].isspace() or "\n " in paragraph
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        not is_indented
        and ">>>" not in text
        and len(text.split()) in _WORDS
        and re.fullmatch(r"[A-Z].*\.", text) is not None
        and letters >= 0.85 * len(text)
    )


def _few(texts, most):
    """Returns at most so many of the texts, in the order of their hashes."""
    return sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())[:most]
