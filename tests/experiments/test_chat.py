"""Chat templates: rendered as transformers does, and in one line what fails."""

import json
import sys

import numpy as np
import pytest

from experiments.data.chat import Chat
from experiments.data.tokenizers import load_tokenizer
from experiments.errors import UserError
from tests.experiments.test_tokenizers import write_tokenizer_json

pytest.importorskip("jinja2", reason="needs jinja2")
MESSAGES = [
    {"role": "user", "content": "<b> & 'c'"},
    {"role": "assistant", "content": "é"},
]


def render(template, messages=MESSAGES, prompt=False, **words):
    chat = Chat(template, words, 0, lambda texts: [np.zeros(0, np.int32)])
    return chat.render(messages, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Blocks swallow their own line, as transformers sets it.
        (
            "{% for m in messages %}\n  {% if 1 %}\n{{ m.role }}\n  {% endif %}\n"
            "{% endfor %}",
            "user\nassistant\n",
        ),
        ("{{ messages[0]['content'] }}", "<b> & 'c'"),
        ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "é!"),
        ("{{ bos_token }}{{ tools is none }}{{ documents is none }}", "<s>TrueTrue"),
        ("{{ strftime_now('%%') }}", "%"),
        # The same on every day: a run is resumed with the same text.
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ],
)
def test_templates_have_what_transformers_gives_them(template, expected):
    assert render(template, bos_token="<s>") == expected


def test_the_beginning_of_an_answer_is_asked_for():
    template = "{% if add_generation_prompt %}A:{% endif %}"
    assert render(template, prompt=True) == "A:"
    assert render(template) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].absent.more }}", "has no attribute 'absent'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'.* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ 'x' + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_fails_is_an_error(template, message):
    with pytest.raises(
        UserError, match=f"chat template fails .*{message}.*plain prompt"
    ):
        render(template)


@pytest.fixture
def directory(tmp_path):
    write_tokenizer_json(tmp_path / "tokenizer.json")
    settings = {
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ messages[0].content }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_settings_beside_a_tokenizer_have_its_template(directory):
    chat = load_tokenizer(str(directory)).chat
    text = chat.render([{"role": "user", "content": "low"}], add_generation_prompt=True)

    assert text == "low</s>"
    ids = chat.encode_batch([text])[0]
    assert ids.dtype == np.int32
    assert ids[-1] == chat.end == load_tokenizer(str(directory)).end_of_document
    assert len(ids) < len(text)


def test_of_named_templates_the_default_is_used(directory):
    path = directory / "tokenizer_config.json"
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    path.write_text(json.dumps({"chat_template": templates}))
    chat = load_tokenizer(str(directory)).chat
    assert chat.render(MESSAGES, add_generation_prompt=False) == "plain"


def test_a_template_file_comes_first(directory):
    (directory / "chat_template.jinja").write_text("from the file")
    chat = load_tokenizer(str(directory)).chat
    assert chat.render(MESSAGES, add_generation_prompt=False) == "from the file"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(str(directory))


def test_a_tokenizer_without_a_template_has_no_chat(tmp_path):
    assert (
        load_tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json")).chat is None
    )
    assert load_tokenizer("bytes").chat is None


def test_without_its_package_the_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(
        UserError, match=r"needs the package jinja2; .*'\.\[finetune\]'"
    ):
        render("a template of its own")


@pytest.mark.parametrize("template", [5, {"a": "b"}, [{"name": "default"}], ["x"]])
def test_a_template_that_is_no_text_is_an_error(template, directory):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json .*is no text"):
        load_tokenizer(str(directory))
