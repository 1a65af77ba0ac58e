"""The code of README and site runs; the commands that they show exist."""

import contextlib
import importlib
import io
import re
import textwrap

import pytest

from experiments.__main__ import COMMANDS
from tests.pages import (
    FLAG,
    PAGES,
    ROOT,
    SHELLS,
    commands,
    excerpts,
    flags_of,
    languages,
    name_of,
    outputs,
    programs,
)

TEXTS = {name_of(path): path.read_text(encoding="utf-8") for path in PAGES}
EXCERPTS = [
    pytest.param(path, code, id=f"{page}-{path}")
    for page, text in TEXTS.items()
    for path, code in excerpts(text)
]
SHOWN = [
    pytest.param(words, id=f"{page}-{' '.join(words)}")
    for page, text in TEXTS.items()
    for words in commands(text)
]
# Target of make, and the command that it gives ARGS to.
_WITH_FLAGS = {"pretrain": "pretrain_llama", "finetune": "finetune"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("page", [name for name in TEXTS if programs(TEXTS[name])])
def test_the_python_of_a_page_runs_block_after_block(page, tmp_path, monkeypatch):
    blocks = programs(TEXTS[page])
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    said = outputs(TEXTS[page])
    for number, (block, output) in enumerate(zip(blocks, said, strict=True), 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)
        _check_printed(output, printed.getvalue())


def _check_printed(said: str, printed: str) -> None:
    """Asserts that the first lines printed are those of the page."""
    for expected, line in zip(said.splitlines(), printed.splitlines(), strict=False):
        assert _NUMBER.sub("#", line) == _NUMBER.sub("#", expected)
        # Losses of another machine, after up to a hundred steps.
        numbers = [float(x) for x in _NUMBER.findall(expected)]
        found = [float(x) for x in _NUMBER.findall(line)]
        assert found == pytest.approx(numbers, rel=0.05)
    assert len(printed.splitlines()) >= len(said.splitlines()), printed


def test_what_a_page_says_is_compared_with_what_its_code_prints():
    _check_printed("loss 2.00\n", "loss 2.01\nmore\n")
    for other in ("loss 3.00\n", "cost 2.00\n", ""):
        with pytest.raises(AssertionError):
            _check_printed("loss 2.00\n", other)


@pytest.mark.parametrize(("path", "code"), EXCERPTS)
def test_an_excerpt_is_what_the_file_says(path, code):
    source = (ROOT / path).read_text(encoding="utf-8")
    depths = (textwrap.indent(code, depth * " ") for depth in (0, 4, 8, 12))
    assert any(part in source for part in depths)


def test_there_are_excerpts_and_commands():
    assert EXCERPTS
    assert SHOWN


@pytest.mark.parametrize("page", TEXTS)
def test_code_is_labelled_with_a_word_that_the_tests_know(page):
    directives = {name for name in languages(TEXTS[page]) if name.startswith("{")}
    known = {"python", *SHELLS, "text", "json", "bibtex"}
    assert languages(TEXTS[page]) - directives <= known


def _targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_exists(words):
    # Settings of the environment before a command.
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and word[0] != "-"]
        assert set(targets) <= _targets()
        given = dict(word.split("=", 1) for word in words if "=" in word)
        for target, command in _WITH_FLAGS.items():
            if targets == [target]:
                _check_flags(f"experiments.{command}", given.get("ARGS", ""))
    elif words[0].endswith("python") and words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2])
        if words[2].startswith("experiments."):
            own, _, launched = " ".join(words[3:]).partition(" -- ")
            _check_flags(words[2], own)
            if launched:
                _check_flags(*launched.split(" ", 1))
    else:
        assert words[0] in {"cd", "git", "pip", "tensorboard"}, words


def _check_flags(module: str, arguments: str) -> None:
    """Asserts that the help of a command lists the flags among its arguments."""
    assert set(FLAG.findall(arguments)) <= flags_of(module)


@pytest.mark.parametrize("page", TEXTS)
def test_each_flag_that_a_page_names_is_one_of_a_command(page, flags):
    found = {name for name in FLAG.findall(TEXTS[page]) if name[:6] != "--xla_"}
    assert found <= flags


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Those of the experiment, of the benchmarks, of TensorBoard and of pip."""
    known = {"--logdir", "--no-deps"}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        known.update(re.findall(r'"(--[a-z][\w-]*)"', path.read_text("utf-8")))
    return known.union(*(flags_of(f"experiments.{name}") for name in COMMANDS))
