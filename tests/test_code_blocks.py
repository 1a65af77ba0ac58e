"""The code of README and site runs; the commands that they show exist."""

import importlib
import re
import textwrap

import pytest

from tests.pages import (
    FLAG,
    PAGES,
    ROOT,
    SHELLS,
    commands,
    excerpts,
    flags_of,
    languages,
    missing_packages,
    name_of,
    programs,
)

TEXTS = {name_of(path): path.read_text(encoding="utf-8") for path in PAGES}
EXCERPTS = [
    pytest.param(path, code, id=f"{page}-{path}")
    for page, text in TEXTS.items()
    for path, code in excerpts(text)
]
COMMANDS = [
    pytest.param(words, id=f"{page}-{' '.join(words)}")
    for page, text in TEXTS.items()
    for words in commands(text)
]
# Other people's trainers, which `make clients` installs.
CLIENTS = {"haliax", "keras", "levanter", "qwix", "tunix"}


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("page", [name for name in TEXTS if programs(TEXTS[name])])
def test_the_python_of_a_page_runs_block_after_block(page, tmp_path, monkeypatch):
    blocks = programs(TEXTS[page])
    missing = missing_packages(blocks)
    assert missing <= CLIENTS
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}: make clients")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize(("path", "code"), EXCERPTS)
def test_an_excerpt_is_what_the_file_says(path, code):
    source = (ROOT / path).read_text(encoding="utf-8")
    depths = (textwrap.indent(code, depth * " ") for depth in (0, 4, 8, 12))
    assert any(part in source for part in depths)


def test_there_are_excerpts_and_commands():
    assert EXCERPTS
    assert COMMANDS


@pytest.mark.parametrize("page", TEXTS)
def test_code_is_labelled_with_a_word_that_the_tests_know(page):
    directives = {name for name in languages(TEXTS[page]) if name.startswith("{")}
    known = {"python", *SHELLS, "text", "json", "bibtex"}
    assert languages(TEXTS[page]) - directives <= known


def _targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_exists(words, capsys):
    # Settings of the environment before a command.
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and word[0] != "-"]
        assert set(targets) <= _targets()
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if targets == ["pretrain"]:
            _check_flags("experiments.pretrain_llama", given.get("ARGS", ""), capsys)
    elif words[0].endswith("python") and words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2])
        if words[2].startswith("experiments."):
            _check_flags(words[2], " ".join(words[3:]), capsys)
    else:
        assert words[0] in {"cd", "git", "pip", "tensorboard"}, words


def _check_flags(module: str, arguments: str, capsys) -> None:
    """Asserts that the help of a command lists the flags among its arguments."""
    assert set(FLAG.findall(arguments)) <= flags_of(module, capsys)
