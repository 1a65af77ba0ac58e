"""Metrics of models that see the last token alone, so that what they say is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.tokenizers import ByteTokenizer
from experiments.errors import UserError
from experiments.model.llama import init_params
from experiments.model.shape import LlamaConfig
from experiments.tasks.answer_metrics import evaluate_answers
from experiments.tasks.answers import Prompts
from experiments.tasks.rows import Place, Rows
from experiments.tasks.table import TASKS

CONFIG = LlamaConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
)
WORDS = ["<end>", "Answer:", " ####", " 7", " 8", " Question:", " two", " x"]


class Words(ByteTokenizer):
    """The words above, and " x" for every other one."""

    end_of_document = beginning = 0
    ends: tuple[int, ...] = (0,)

    def encode(self, text):
        ids = {word.strip(): i for i, word in enumerate(WORDS)}
        return np.array([ids.get(word, 7) for word in text.split()], np.int32)

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


def memoryless(embedding, head):
    """A model whose logits behind token t are rms_norm(embedding[t]) @ head."""
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ends = {"embedding": embedding, "norm": np.ones(32), "head": head}
    return params | {k: jnp.asarray(v, jnp.float32) for k, v in ends.items()}


def says(*pairs):
    """A model that says the second word of each pair behind the first, or the end."""
    head = np.zeros((32, CONFIG.vocab_size))
    for first, second in pairs:
        head[WORDS.index(first), WORDS.index(second)] = 1
    return memoryless(np.eye(CONFIG.vocab_size, 32), head)


def evaluate(task, params, rows, tokenizer=None, **options):
    kind = TASKS[task]
    values = [dict(zip(columns_of(task), row, strict=True)) for row in rows]
    places = [Place("x.jsonl", "line", i + 1) for i in range(len(rows))]
    return evaluate_answers(
        CONFIG,
        params,
        Prompts(task, tokenizer or Words()),
        Rows("x.jsonl", values, places, ()),
        text_column=kind.text_columns[0],
        answer_column=kind.label_column,
        **{"max_length": 512, "batch_size": 2, "max_new_tokens": 5, **options},
    )


def columns_of(task):
    return TASKS[task].text_columns[0], TASKS[task].label_column


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    del fast_compilation


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([("Answer:", " ####"), (" ####", " 7")], (2 / 3, 2 / 3)),
        ([("Answer:", " 7")], (0, 2 / 3)),
        # It goes on with a problem of its own, whose numbers do not count.
        ([("Answer:", " 7"), (" 7", " Question:"), (" Question:", " 8")], (0, 2 / 3)),
        ([("Answer:", " two")], (0, 0)),
    ],
)
def test_a_solution_of_gsm8k_is_decoded_up_to_its_end(pairs, wanted):
    rows = [("x two", "x #### 7"), ("x", "#### 8"), ("two", "#### 7.0")]
    found = evaluate("gsm8k", says(*pairs), rows)

    assert tuple(found) == TASKS["gsm8k"].metrics
    assert tuple(found.values()) == pytest.approx(wanted)


def test_a_completion_matches_if_each_of_its_tokens_is_the_likeliest():
    params = says((" two", " 7"), (" 7", " 8"))
    rows = [("x two", " 7 8"), ("two", " 7 7"), ("two", " 8")]
    found = evaluate("completion", params, rows)

    assert tuple(found) == TASKS["completion"].metrics
    # 7, 8 and end; 7; the end behind 8.
    assert found == pytest.approx({"token_accuracy": 5 / 8, "exact_match": 1 / 3})


def test_a_completion_that_is_too_long_is_left_out():
    params = says((" two", " 7"))
    rows = [("x two", " 7"), ("two", " 8 8 8")]

    assert evaluate("completion", params, rows, max_length=2)["exact_match"] == 1
    with pytest.raises(UserError, match="every answer is longer than --max-length 1"):
        evaluate("completion", params, rows, max_length=1)


@pytest.fixture(scope="module")
def drawn():
    """A random model of bytes, and its log-probabilities, (257, 257)."""
    rng = np.random.default_rng(0)
    embedding, head = rng.normal(size=(257, 32)), rng.normal(size=(32, 257)) / 4
    scale = np.sqrt((embedding**2).mean(axis=1, keepdims=True) + CONFIG.rms_norm_eps)
    logits = embedding / scale @ head
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return memoryless(embedding, head), log_probs


def by_hand(log_probs, before, text, ends=False):
    """Log-likelihood of a text behind the last byte of another one."""
    ids = [before.encode()[-1], *text.encode(), *([256] if ends else [])]
    return sum(log_probs[a, b] for a, b in itertools.pairwise(ids))


def test_choices_are_compared_by_likelihood_and_by_likelihood_per_character(drawn):
    params, log_probs = drawn
    rng = np.random.default_rng(7)
    rows, hits = [], []
    for number in range(12):
        texts = ["é" * rng.integers(3) + "abc"[: rng.integers(1, 4)] for _ in range(3)]
        names = [f"answer{i + 1}" for i in range(3)]
        listed = " ".join(f"A{n[1:]}: {x}" for n, x in zip(names, texts, strict=True))
        said = [f"the correct answer is {name}" for name in names]
        right = number % 3
        asked = f"Choose: Which?\n\n{listed}\n\nAnswer format: {'/'.join(names)}"
        rows.append((asked, said[right]))
        sums = np.array([by_hand(log_probs, "Answer:", f" {x}") for x in texts])
        scores = [
            [by_hand(log_probs, "Response:\n", x, ends=True) for x in said],
            sums,
            sums / [len(x) for x in texts],
            sums / [len(x.encode()) for x in texts],
        ]
        hits.append([np.argmax(values) == right for values in scores])
    found = evaluate("commonsense", params, rows, ByteTokenizer(), batch_size=18)

    *wanted, by_bytes = np.mean(hits, axis=0)
    assert found == dict(zip(TASKS["commonsense"].metrics, wanted, strict=True))
    # Otherwise one could stand for another.
    assert len({*wanted, by_bytes}) == 4


def test_a_blank_is_judged_by_what_follows_it(drawn):
    params, log_probs = drawn
    instruction = (
        "Choose: As _ won.\n\nOption1: Eve Option2: Ada Answer format: option1/option2"
    )
    sums = [by_hand(log_probs, name, " won.") for name in ("Eve", "Ada")]
    outputs = [f"the correct answer is option{i + 1}" for i in (0, 1)]
    rows = [(instruction, output) for output in outputs]
    best = int(np.argmax(sums))
    found = evaluate("commonsense", params, [rows[best]], ByteTokenizer())

    assert found["acc"] == found["acc_norm"] == 1
    found = evaluate("commonsense", params, [rows[1 - best]], ByteTokenizer())
    assert found["acc"] == found["acc_norm"] == 0
