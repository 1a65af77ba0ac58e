"""Prompts and answers of the tasks that a decoder answers, as text and as token ids."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.chat import Chat
from experiments.data.columns import check_characters
from experiments.data.tokenizers import Tokenizer
from experiments.errors import UserError
from experiments.tasks.rows import Rows

Messages = list[dict[str, str]]
EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]

# Plain prompts, and what stands before an answer. GSM8K's are lm-evaluation-harness's;
# Commonsense170k's are Alpaca's, which those who made it tune with.
_PLAIN = {
    "gsm8k": ("Question: {}\nAnswer:", " "),
    "commonsense": (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\n{}\n\n"
        "### Response:\n",
        "",
    ),
    "completion": ("{}", ""),
}
_MESSAGES = "messages"
_FIELDS = ("role", "content")
_ANSWERS = "assistant"


class Exchange(NamedTuple):
    """A question and its answer.

    Attributes:
        asked: The question; or messages, each with a ``role`` and a ``content``.
        answer: May be empty.
    """

    asked: str | Messages
    answer: str


class Pair(NamedTuple):
    """A prompt, and what is to follow it.

    Attributes:
        prompt: (p,) int32.
        answer: (a,) int32.
    """

    prompt: np.ndarray
    answer: np.ndarray


def read_exchanges(rows: Rows, text_column: str, answer_column: str) -> list[Exchange]:
    """Returns the question and the answer of each row.

    Where the column of the question is absent or holds lists, and there are
    ``messages``, these are the question, and the last of them is the answer.

    Args:
        rows: At least one.
        text_column: Holds the question; or ``messages``.
        answer_column: Holds the answer.

    Raises:
        UserError: If a column is absent or holds something else, or messages do not end
            with one of the assistant's; the row is named.
    """
    first = rows.values[0]
    if text_column not in first and _MESSAGES in first:
        text_column = _MESSAGES
    elif not isinstance(first.get(text_column), list):
        asked = rows.texts(text_column)
        answers = rows.texts(answer_column, "--label-column")
        return list(map(Exchange, asked, answers))
    conversations = rows.column(text_column, "--text-columns")
    return list(map(_exchange, conversations, rows.places))


def chat_of(tokenizer: Tokenizer, prompt: str) -> Chat | None:
    """Returns the chat template to ask a model by, None: by plain prompts.

    Args:
        tokenizer: Of the model.
        prompt: "chat", "plain", or "auto": chat where the model has a template.

    Raises:
        UserError: If it is to be asked by the template that it has not.
    """
    if prompt == "chat" and tokenizer.chat is None:
        raise UserError(
            f"--prompt chat: the tokenizer {tokenizer.name} has no chat template; give "
            "--prompt plain, or put chat_template.jinja beside the weights"
        )
    return None if prompt == "plain" else tokenizer.chat


class Prompts:
    r"""How questions are put to one model.

    With a chat template a question is the user's message, and an answer ends with the
    end token that the template writes behind it. Without one, the prompt is plain, and
    its answer ends as a document does. A plain prompt stands behind the beginning of a
    text where the tokenizer has a token for this alone, as in lm-evaluation-harness.

    - gsm8k: ``Question: ...\nAnswer:``, then a space and the answer;
    - commonsense: Alpaca's ``Below is an instruction ...\n\n### Instruction:\n...\n\n
      ### Response:\n``, then the answer;
    - completion: the prompt, then the completion, as they are;
    - messages: ``### User:\n...\n\n### Assistant:\n``, then the answer.

    Attributes:
        task: gsm8k, commonsense or completion.
        tokenizer: Of the model.
        stop_id: The token that ends an answer.
        stop_ids: All tokens that end what the model writes.
    """

    def __init__(self, task: str, tokenizer: Tokenizer, chat: Chat | None = None):
        """Chooses the prompts.

        Args:
            task: gsm8k, commonsense or completion.
            tokenizer: Of the model.
            chat: Its chat template; None: plain prompts.
        """
        self.task = task
        self.tokenizer = tokenizer
        self.stop_id = chat.end if chat else tokenizer.end_of_document
        self.stop_ids = tuple(dict.fromkeys((self.stop_id, *tokenizer.ends)))
        self._chat = chat

    def encode(self, exchanges: Sequence[Exchange]) -> list[Pair]:
        """Returns the prompts, and the answers with the token that ends each.

        Raises:
            UserError: If the chat template does not begin a given answer as it asks for
                one.
        """
        if self._chat is None:
            pairs = self.encode_plain(list(map(self._plain, exchanges)))
        else:
            texts = [_rendered(self._chat, exchange) for exchange in exchanges]
            pairs = _encode_pairs(self._chat.encode_batch, texts)
        return [Pair(prompt, self._ended(answer)) for prompt, answer in pairs]

    def encode_plain(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Returns plain prompts, at least one token each, and what is to follow them.

        Args:
            texts: A prompt and a text to follow it each.
        """
        pairs = _encode_pairs(self.tokenizer.encode_batch, texts)
        first = np.array([self.tokenizer.beginning], np.int32)
        # Behind an end of document SmolLM2 ends most answers before they begin.
        is_its_own = self.tokenizer.beginning != self.tokenizer.end_of_document
        return [
            pair._replace(prompt=np.concatenate([first, pair.prompt]))
            if is_its_own or not len(pair.prompt)
            else pair
            for pair in pairs
        ]

    def _plain(self, exchange):
        asked, answer = exchange
        if isinstance(asked, list):
            turns = [
                f"### {m['role'].capitalize()}:\n{m['content']}\n\n" for m in asked
            ]
            return f"{''.join(turns)}### {_ANSWERS.capitalize()}:\n", answer
        template, before = _PLAIN[self.task]
        return template.format(asked), before + answer

    def _ended(self, answer):
        """Returns the ids up to the end token, which is added if there is none."""
        ends = np.flatnonzero(answer == self.stop_id)
        ids = answer[: ends[0]] if ends.size else answer
        return np.append(ids, np.int32(self.stop_id))


def _rendered(chat, exchange):
    """Returns the text up to the answer, and what the template writes then."""
    asked, answer = exchange
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    prompt = chat.render(asked, add_generation_prompt=True)
    asked = [*asked, {"role": _ANSWERS, "content": answer}]
    whole = chat.render(asked, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise UserError(
            "the model's chat template does not begin a given answer as it asks for "
            "one; give --prompt plain"
        )
    return prompt, whole.removeprefix(prompt)


def _encode_pairs(encode: EncodeBatch, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Returns the ids of prompts and of what follows each.

    Both are encoded as one text, and what is behind the prompt's own ids is the second
    part, as in lm-evaluation-harness. Where one token holds the end of the prompt and
    more, the second part is encoded by itself.
    """
    prompts = encode([prompt for prompt, _ in texts])
    wholes = encode([prompt + behind for prompt, behind in texts])
    pairs = []
    for prompt, whole, (_, behind) in zip(prompts, wholes, texts, strict=True):
        count = len(prompt)
        is_whole = np.array_equal(whole[:count], prompt)
        pairs.append(Pair(prompt, whole[count:] if is_whole else encode([behind])[0]))
    return pairs


def _exchange(messages: Any, place: object) -> Exchange:
    is_list = isinstance(messages, list)
    for message in messages if is_list else ():
        texts = [isinstance(message, dict) and message.get(key) for key in _FIELDS]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{place}: a message is {message!r:.60}; give each a role and a "
                "content, both of them text"
            )
        for key in _FIELDS:
            check_characters(message[key], key, str(place))
    if not is_list or len(messages) < 2 or messages[-1]["role"] != _ANSWERS:
        raise UserError(
            f"{place}: the messages do not end with an answer; give a list of at least "
            f"two, the last one of role {_ANSWERS!r}"
        )
    asked = [{key: message[key] for key in _FIELDS} for message in messages[:-1]]
    return Exchange(asked, messages[-1]["content"])
