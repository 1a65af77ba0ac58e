from collections import Counter

import pytest

from experiments.errors import UserError
from experiments.tasks.embedded import embedded_rows


@pytest.fixture(scope="module")
def parts():
    return embedded_rows()


def test_the_set_has_balanced_classes(parts):
    train, validation = parts
    assert 1150 <= len(train) <= 1200
    assert 400 <= len(validation) <= 420
    for rows in (train, validation):
        shares = Counter(rows.column("label", ""))
        assert len(shares) == 6
        assert max(shares.values()) <= 0.18 * len(rows)
        assert min(shares.values()) >= 0.1 * len(rows)


def test_no_module_and_no_text_is_in_both_parts(parts):
    train, validation = parts
    modules = [{place.source for place in rows.places} for rows in parts]
    assert not modules[0] & modules[1]
    assert not set(train.texts("text")) & set(validation.texts("text"))


def test_texts_are_short_sentences(parts):
    texts = [text for rows in parts for text in rows.texts("text")]
    words = [len(text.split()) for text in texts]
    assert min(words) >= 8
    assert max(words) <= 24
    assert all("\n" not in text and text.endswith(".") for text in texts)


def test_the_set_is_the_same_every_time(tmp_path):
    docstring = '"""Opens a connection to the server and waits for its answer."""\n'
    for module in ("smtplib", "ftplib"):
        (tmp_path / f"{module}.py").write_text(f"x = 1\ndef f():\n    {docstring}")
    # Of two modules that say the same, the one to train on has it.
    other = docstring.replace("a connection", "two connections")
    (tmp_path / "poplib.py").write_text(f"if x:\n    class A:\n        {other}")
    (tmp_path / "http").mkdir()
    (tmp_path / "http" / "test").mkdir()
    (tmp_path / "http" / "test" / "a.py").write_text(other)
    (tmp_path / "http" / "damaged.py").write_text("def f(:")
    # A held-out module of a package that is trained on.
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "locks.py").write_text(docstring.replace("server", "lock"))
    train, validation = embedded_rows(tmp_path)
    text = "Opens a connection to the server and waits for its answer."
    assert train.values == [{"text": text, "label": "networking"}]
    assert str(train.places[0]) == "smtplib.py, line 2"
    places = [str(place) for place in validation.places]
    assert places == ["asyncio/locks.py, line 1", "poplib.py, line 2"]
    assert embedded_rows(tmp_path)[0].values == train.values


def test_a_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no sources of its standard library"):
        embedded_rows(tmp_path)
