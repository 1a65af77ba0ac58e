"""Conversations as the text that a model was tuned on: its chat template in Jinja."""

import datetime
import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.extras import import_extra

# What templates take for today: that of Llama 3.2's own template where none is given.
# With the day of the start, a run could not be resumed on another one.
_DAY = datetime.datetime(2024, 7, 26)


class Chat:
    """A model's chat template, rendered as ``transformers`` renders it.

    Attributes:
        end: The token that ends an answer.
    """

    def __init__(
        self,
        template: str,
        words: Mapping[str, str],
        end: int,
        encode: Callable[[Sequence[str]], list[np.ndarray]],
    ):
        """Takes a template and what it needs of a tokenizer.

        Args:
            template: In Jinja.
            words: Special tokens as text, by their roles, such as "bos_token".
            end: The token that ends an answer.
            encode: Encodes texts, in which words of special tokens are these tokens.
        """
        self.end = end
        self._template = template
        self._words = dict(words)
        self._encode = encode

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> str:
        """Returns a conversation as text, with the words of its special tokens.

        Args:
            messages: Each has a ``role`` and a ``content``.
            add_generation_prompt: Whether the text ends where an answer begins.

        Raises:
            UserError: If ``jinja2`` is not installed, or the template is broken or
                refuses the messages.
        """
        try:
            return _compiled(self._template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._words,
            )
        except UserError:
            raise
        # Not only Jinja's own errors: a template may add a number to a text.
        except Exception as error:
            raise UserError(
                f"the model's chat template fails ({error}); change the messages, or "
                "use a plain prompt"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of rendered texts, (n_i,) int32.

        Words of special tokens are these tokens, also where a message spells them.
        """
        return self._encode(texts)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    jinja2 = import_extra(
        "jinja2", "a chat template needs the package jinja2", "finetune"
    )
    sandbox = importlib.import_module("jinja2.sandbox").ImmutableSandboxedEnvironment
    environment = sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(layout):
        return _DAY.strftime(layout)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)


def _generation_tag() -> type:
    """Returns Jinja's extension for a tag that says what an assistant writes."""

    class Generation(importlib.import_module("jinja2.ext").Extension):
        """Renders what stands between the tags."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
