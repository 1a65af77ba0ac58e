import numpy as np
import pytest
import tokenizers
from tokenizers import models

from experiments.data import chat
from experiments.data.tokenizers import ByteTokenizer, load_tokenizer
from experiments.errors import UserError
from experiments.tasks.answers import Exchange, Prompts, chat_of, read_exchanges
from experiments.tasks.rows import Place, Rows, read_rows

END = 256
BYTES = ByteTokenizer()
TURNS = [
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "9"},
]


class Turns(chat.Chat):
    """A template that names a role and ends a message by the end and a line end."""

    def __init__(self, word="\x00"):
        super().__init__("", {}, END, self.encode_batch)
        self.word = word

    def render(self, messages, *, add_generation_prompt):
        turns = [f"<{m['role']}>{m['content']}{self.word}\n" for m in messages]
        return "".join(turns) + "<assistant>" * add_generation_prompt

    def encode_batch(self, texts):
        ids = [BYTES.encode(text) for text in texts]
        return [np.where(part == 0, np.int32(END), part) for part in ids]


def rows_of(*values):
    places = [Place("x.jsonl", "line", i + 1) for i in range(len(values))]
    return Rows("x.jsonl", list(values), places, ())


def text_of(ids):
    return "".join("|" if i == END else chr(i) for i in ids)


def encoded(task, exchange, chat=None):
    (pair,) = Prompts(task, BYTES, chat).encode([exchange])
    assert pair.prompt.dtype == pair.answer.dtype == np.int32
    return text_of(pair.prompt), text_of(pair.answer)


@pytest.mark.parametrize(
    ("task", "exchange", "prompt", "answer"),
    [
        ("gsm8k", ("1 {}?", "1\n#### 1"), "Question: 1 {}?\nAnswer:", " 1\n#### 1|"),
        ("completion", ("One, ", "two"), "One, ", "two|"),
        ("completion", ("One", ""), "One", "|"),
        # The model needs a token to go on from.
        ("completion", ("", "two"), "|", "two|"),
        (
            "completion",
            (TURNS[:3], "9"),
            "### User:\n2?\n\n### Assistant:\n4\n\n### User:\n3?\n\n### Assistant:\n",
            "9|",
        ),
    ],
)
def test_a_plain_prompt_stands_before_its_answer(task, exchange, prompt, answer):
    assert encoded(task, Exchange(*exchange)) == (prompt, answer)


def test_a_plain_prompt_stands_behind_a_beginning_of_its_own():
    tokenizer = ByteTokenizer()
    tokenizer.beginning = 1
    (pair,) = Prompts("completion", tokenizer).encode([Exchange("a", "b")])

    assert (pair.prompt.tolist(), pair.answer.tolist()) == ([1, 97], [98, END])


def test_a_plain_instruction_is_alpacas():
    prompt, answer = encoded("commonsense", Exchange("Choose: a/b", "it is a"))

    assert prompt.startswith("Below is an instruction that describes a task. Write")
    assert prompt.endswith("\n\n### Instruction:\nChoose: a/b\n\n### Response:\n")
    assert answer == "it is a|"


@pytest.mark.parametrize("task", ["gsm8k", "commonsense", "completion"])
def test_a_chat_has_the_question_as_the_users_message(task):
    found = encoded(task, Exchange("3?", "9"), Turns())

    # What the template writes behind the end is no part of the answer.
    assert found == ("<user>3?|\n<assistant>", "9|")


def test_a_chat_keeps_the_turns_before_the_answer():
    prompt, _ = encoded("completion", Exchange(TURNS[:3], "9"), Turns())

    assert prompt == "<user>2?|\n<assistant>4|\n<user>3?|\n<assistant>"


def test_a_model_with_a_template_is_asked_by_it_unless_by_plain_prompts():
    talks = ByteTokenizer()
    talks.chat = Turns()
    found = [chat_of(talks, prompt) for prompt in ("auto", "chat", "plain")]
    assert found == [talks.chat, talks.chat, None]
    assert chat_of(BYTES, "auto") is chat_of(BYTES, "plain") is None
    with pytest.raises(UserError, match="--prompt chat: the tokenizer bytes has no"):
        chat_of(BYTES, "chat")


def test_a_chat_says_what_ends_an_answer():
    asked_by = Turns()
    asked_by.end = 3

    prompts = Prompts("gsm8k", BYTES, asked_by)

    assert (prompts.stop_id, prompts.stop_ids) == (3, (3, END))
    assert prompts.encode([Exchange("3?", "9")])[0].answer[-1] == 3


def test_an_end_that_the_template_does_not_write_is_added():
    assert encoded("gsm8k", Exchange("3?", "9"), Turns(word=""))[1] == "9\n|"


def test_a_template_with_another_beginning_of_answers_is_an_error():
    class Thinking(Turns):
        def render(self, messages, *, add_generation_prompt):
            text = super().render(messages, add_generation_prompt=add_generation_prompt)
            return text + "<think>" * add_generation_prompt

    with pytest.raises(UserError, match=r"does not begin a given answer.*--prompt"):
        encoded("gsm8k", Exchange("3?", "9"), Thinking())


def test_an_answer_that_shares_a_token_with_its_prompt_is_encoded_by_itself(tmp_path):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    prompts = Prompts("completion", load_tokenizer(str(tmp_path)))

    (pair,) = prompts.encode([Exchange("ba", "ba")])
    assert (pair.prompt.tolist(), pair.answer.tolist()) == ([1, 0], [1, 0, 3])


def test_questions_and_answers_are_read_by_column():
    rows = rows_of({"q": "2?", "a": "4"}, {"q": "3?", "a": "9"})

    assert read_exchanges(rows, "q", "a") == [("2?", "4"), ("3?", "9")]


@pytest.mark.parametrize("column", ["prompt", "messages", "turns"])
def test_the_last_message_is_the_answer(column):
    row = {"turns" if column == "turns" else "messages": TURNS}

    assert read_exchanges(rows_of(row), column, "x") == [(TURNS[:3], "9")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "2?"}, r"line 1.*'a'.*--label-column"),
        ({"a": "4"}, r"line 1.*'q'.*--text-columns"),
        ({"q": "2?", "a": 4}, r"line 1.*'a' holds an integer, not text"),
        ({"q": TURNS[:3]}, r"line 1: the messages do not end with an answer"),
        ({"q": TURNS[1:2]}, r"line 1: the messages do not end with an answer"),
        ({"q": []}, r"line 1: the messages do not end with an answer"),
        ({"q": ["2?", "4"]}, r"line 1: a message is '2\?'; give each a role"),
        ({"messages": "2?"}, r"line 1: the messages do not end with an answer"),
        ({"q": [*TURNS[:1], 2]}, r"line 1: a message is 2; give each a role"),
        ({"q": [{"role": "user"}]}, r"line 1: a message is {'role': 'user'}"),
        (
            {"q": [*TURNS[:-1], {"role": "assistant", "content": "\ud83d"}]},
            r"line 1.*: 'content' has a lone surrogate \\ud83d",
        ),
    ],
)
def test_rows_without_questions_or_answers_are_errors(row, message):
    with pytest.raises(UserError, match=message):
        read_exchanges(rows_of(row), "q", "a")


def test_a_row_without_messages_among_others_is_named():
    rows = rows_of({"messages": TURNS}, {"messages": "2?"})

    with pytest.raises(UserError, match="line 2: the messages do not end"):
        read_exchanges(rows, "messages", "x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "task", "columns", "count"),
    [
        ("gsm8k", "gsm8k", ("question", "answer"), 8792),
        ("commonsense", "commonsense", ("instruction", "output"), 18750),
    ],
)
def test_every_real_row_is_encoded_whole(shared_data, path, task, columns, count):
    exchanges = read_exchanges(read_rows(str(shared_data / path)), *columns)
    pairs = Prompts(task, BYTES).encode(exchanges)

    assert len(pairs) == count
    for (asked, answer), pair in zip(exchanges, pairs, strict=True):
        prompt, *ids = (part.astype(np.uint8).tobytes() for part in pair)
        assert str(asked).encode() in prompt
        assert ids[0][:-1].strip() == answer.encode().strip()
        assert pair.answer[-1] == END
