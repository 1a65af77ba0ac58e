import pytest

from experiments.data.embedded_text import standard_library
from experiments.errors import UserError


@pytest.fixture(scope="module")
def library():
    return standard_library()


def test_the_library_is_megabytes_and_about_a_twentieth_validates(library):
    train, validation = (sum(map(len, part)) for part in library[:2])
    assert 5e6 < train + validation < 20e6
    assert 0.03 < validation / (train + validation) < 0.08
    assert library.undecodable == 0


def test_the_same_python_gives_the_same_text(library):
    assert standard_library() == library


def test_no_document_is_in_both_parts(library):
    common = {text for text in library.train if text} & set(library.validation)
    assert not common


def test_documentation_is_included(library):
    text = "".join(library.train + library.validation)
    assert "The try statement" in text or 'The "try" statement' in text


@pytest.fixture
def root(tmp_path):
    """A library of 60 one-line files."""
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"m{i} = {i}\n")
    return tmp_path


def all_text(root):
    text = standard_library(root)
    return sorted(text.train + text.validation)


def test_every_source_is_in_one_part(root):
    assert all_text(root) == sorted(f"m{i} = {i}\n" for i in range(60))


@pytest.mark.parametrize(
    "name",
    [
        *("test/a.py", "json/tests/a.py", "site-packages/p/a.py", "config-3-x/a.py"),
        *("_sysconfigdata_x.py", "sitecustomize.py", "notes.txt", "encodings/a.py"),
    ],
)
def test_what_is_not_the_same_everywhere_is_left_out(root, name):
    before = all_text(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("machine = 1\n")
    assert all_text(root) == before


def test_a_new_file_moves_no_other_file_between_the_parts(root):
    before = standard_library(root)
    (root / "new.py").write_text("new = 1\n")
    after = standard_library(root)
    assert [t for t in after.validation if t != "new = 1\n"] == before.validation


def test_a_declared_encoding_is_honoured(root):
    (root / "old.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    assert "# coding: latin-1\n# é\n" in all_text(root)


@pytest.mark.parametrize("content", [b"# \xe9\n", b"# coding: no-such\n"])
def test_an_undecodable_file_is_counted(root, content):
    (root / "bad.py").write_bytes(content)
    assert standard_library(root).undecodable == 1
    assert len(all_text(root)) == 60


def test_a_python_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no sources of its standard library.*--data"):
        standard_library(tmp_path)
