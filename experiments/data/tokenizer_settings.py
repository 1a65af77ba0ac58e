"""``tokenizer_config.json``: a tokenizer's special tokens, and its chat template."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError

_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stands beside a tokenizer.

    Attributes:
        words: Special tokens as text, by their roles: "bos_token" begins a text,
            "eos_token" ends one, or a turn of a chat; there may be more.
        chat_template: How a conversation is spelled, in Jinja; None: not at all.
        added: Tokens as text that the files add to those of the tokenizer's own file.
    """

    words: Mapping[str, str]
    chat_template: str | None = None
    added: tuple[str, ...] = ()


def read_settings(directory: Path) -> Settings:
    """Returns the settings in a directory; a file that is not there says nothing.

    Raises:
        UserError: If a file cannot be read.
    """
    raw = _parsed(directory / _FILE)
    template = _text(directory / _TEMPLATE_FILE) or _template(directory, raw)
    # An older form of a token is an object with its text and its properties.
    tokens = {
        role: token.get("content") if isinstance(token, dict) else token
        for role, token in raw.items()
        if role.endswith("_token")
    }
    words = {role: word for role, word in tokens.items() if isinstance(word, str)}
    return Settings(words, template, _added(directory, raw))


def write_settings(directory: Path, settings: Settings) -> None:
    """Writes ``tokenizer_config.json``, which says too that no token is added."""
    raw = {
        # transformers 5 encodes with it as here, a SentencePiece model too. As a
        # LlamaTokenizer it would drop spaces that double or lead.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings.words,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if settings.chat_template is not None:
        raw["chat_template"] = settings.chat_template
    (directory / _FILE).write_text(json.dumps(raw, indent=2) + "\n")


def _template(directory: Path, raw: dict[str, Any]) -> str | None:
    template = raw.get("chat_template")
    try:
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        if not isinstance(template, str | None):
            raise TypeError
    except (TypeError, KeyError) as error:
        raise _unreadable(directory / _FILE, "its chat_template is no text") from error
    return template


def _added(directory: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    numbered = raw.get("added_tokens_decoder") or {}
    found = [*_parsed(directory / "added_tokens.json")]
    if isinstance(numbered, dict):
        tokens = [x.get("content") for x in numbered.values() if isinstance(x, dict)]
        found += [word for word in tokens if isinstance(word, str)]
    return tuple(dict.fromkeys(found))


def _parsed(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; {}: there is no file."""
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise _unreadable(path, "it holds no JSON object")
    return found


def _text(path: Path) -> str | None:
    """Returns the text of a file; None: there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, why: object) -> UserError:
    return UserError(f"tokenizer: {path} cannot be read ({why}); download it again")
