"""Multiple choice: the answer that a model finds likeliest."""

import itertools
from collections.abc import Sequence

import numpy as np

from experiments.model.llama import Params
from experiments.model.shape import LlamaConfig
from experiments.tasks.answer_data import cut
from experiments.tasks.answers import Exchange, Pair, Prompts
from experiments.tasks.likelihood import likelihoods
from experiments.tasks.questions import Question


def choice_accuracy(
    config: LlamaConfig,
    params: Params,
    prompts: Prompts,
    questions: Sequence[Question],
    exchanges: Sequence[Exchange],
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, float]:
    """Returns the share of questions whose right choice is the likeliest.

    Args:
        config: The model.
        params: Its parameters.
        prompts: How the model is tuned.
        questions: At least one.
        exchanges: The instruction of each question.
        max_length: Prompts are cut as :func:`experiments.tasks.answer_data.cut` does.
        batch_size: Choices at a time.

    Returns:
        Three shares in [0, 1]. ``named_acc`` compares what a model says that is tuned
        on the data, such as "the correct answer is answer1", behind the prompt of the
        tuning. ``acc`` and ``acc_norm`` compare the texts of the choices behind
        lm-evaluation-harness's plain prompt, with no examples before it: by their
        log-likelihood, and by this divided by the characters of the choice. Equal
        choices count as the first of them.
    """
    counts = [len(question.outputs) for question in questions]
    right = [question.right for question in questions]
    texts = [
        pair for q in questions for pair in zip(q.prompts, q.continuations, strict=True)
    ]
    named = [
        exchange._replace(answer=output)
        for question, exchange in zip(questions, exchanges, strict=True)
        for output in question.outputs
    ]

    def scores(pairs: list[Pair]):
        pairs = [cut(pair, max_length) for pair in pairs]
        return likelihoods(config, params, pairs, batch_size).sums

    # A continuation begins with a space, which is no part of the choice.
    characters = np.array([len(behind) - 1 for _, behind in texts])
    sums = scores(prompts.encode_plain(texts))
    return {
        "named_acc": _share(scores(prompts.encode(named)), counts, right),
        "acc": _share(sums, counts, right),
        "acc_norm": _share(sums / characters, counts, right),
    }


def _share(scores, counts, right):
    """Returns how often the best of the next ``counts`` scores is the right one."""
    ends = list(itertools.accumulate(counts))
    best = [int(np.argmax(part)) for part in np.split(scores, ends[:-1])]
    return float(np.mean(np.equal(best, right)))
