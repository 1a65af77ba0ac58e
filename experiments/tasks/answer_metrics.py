"""The metrics of each task that a decoder answers."""

import numpy as np

from experiments.model.generate import generate_batch
from experiments.model.llama import Params
from experiments.model.shape import LlamaConfig
from experiments.tasks.answer_data import fit
from experiments.tasks.answers import Prompts, read_exchanges
from experiments.tasks.choices import choice_accuracy
from experiments.tasks.exact_match import exact_match
from experiments.tasks.likelihood import likelihoods
from experiments.tasks.questions import read_questions
from experiments.tasks.rows import Rows

# Where lm-evaluation-harness ends an answer to a problem of GSM8K.
_NEXT_PROBLEM = "Question:"


def evaluate_answers(
    config: LlamaConfig,
    params: Params,
    prompts: Prompts,
    rows: Rows,
    *,
    text_column: str,
    answer_column: str,
    max_length: int,
    batch_size: int,
    max_new_tokens: int = 256,
) -> dict[str, float]:
    """Returns the metrics of a task, all in [0, 1], those of the table in its order.

    Args:
        config: The model.
        params: Its parameters, adapters merged.
        prompts: Of the task, as the model is tuned.
        rows: To answer, all of them: at least one.
        text_column: Holds the question.
        answer_column: Holds the answer.
        max_length: Prompts are cut on the left to so many tokens, answers that are
            given included; >= 1.
        batch_size: Prompts, or prompts with answers, at a time; >= 1.
        max_new_tokens: Of a solution that the model writes; >= 1.

    Returns:
        - gsm8k: see :func:`experiments.tasks.exact_match.exact_match`; solutions are
          decoded greedily, with no solved problem before them.
        - commonsense: see :func:`experiments.tasks.choices.choice_accuracy`.
        - completion: ``token_accuracy``, the share of the answers' tokens, the end
          included, that are the likeliest behind those before; ``exact_match``, the
          share of answers of which all are, so that greedy decoding gives them token
          by token. Answers that alone are too long are left out.

    Raises:
        UserError: If a row is not as the task has them.
    """
    exchanges = read_exchanges(rows, text_column, answer_column)
    if prompts.task == "commonsense":
        questions = read_questions(rows, text_column, answer_column)
        return choice_accuracy(
            config,
            params,
            prompts,
            questions,
            exchanges,
            max_length=max_length,
            batch_size=batch_size,
        )
    pairs = prompts.encode(exchanges)
    if prompts.task == "completion":
        return _completion(config, params, fit(pairs, max_length)[0], batch_size)
    written = generate_batch(
        config,
        params,
        [pair.prompt[-max_length:] for pair in pairs],
        max_new_tokens,
        prompts.stop_ids,
        batch_size=batch_size,
    )
    texts = [
        prompts.tokenizer.decode(ids).partition(_NEXT_PROBLEM)[0] for ids in written
    ]
    return exact_match(texts, [exchange.answer for exchange in exchanges])


def _completion(config, params, pairs, batch_size):
    hits = likelihoods(config, params, pairs, batch_size).hits
    tokens = np.array([len(pair.answer) for pair in pairs])
    return {
        "token_accuracy": float(hits.sum() / tokens.sum()),
        "exact_match": float(np.mean(hits == tokens)),
    }
