"""Multiple-choice questions out of the instructions of Commonsense170k.

An instruction is one text: what to do, the question, the choices with their names, and
the names once more:

    Please choose the correct answer to the question: Which gas do plants take in?

    Answer1: oxygen Answer2: carbon dioxide

    Answer format: answer1/answer2

The names are answerN, solutionN, optionN or endingN; true/false have no choices beside
their names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError

_FORMAT = "Answer format:"
# lm-evaluation-harness has a boolean question answered with these words.
_WORDS = {"true": "yes", "false": "no"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices, as lm-evaluation-harness puts it to a model.

    Attributes:
        prompts: What stands before each choice; of Winogrande alone they differ.
        continuations: What is scored behind each prompt; begins with a space.
        names: What the data calls each choice, such as "answer1".
        right: Place of the right choice.
    """

    prompts: tuple[str, ...]
    continuations: tuple[str, ...]
    names: tuple[str, ...]
    right: int


def parse_question(row: Mapping[str, Any]) -> Question:
    r"""Returns the question of a row of Commonsense170k.

    ARC's, OpenBookQA's, PIQA's, Social IQa's and BoolQ's questions become
    "Question: ...\nAnswer:", continued by " " and the choice (BoolQ's by " yes" and
    " no"; its passages are not in the data). A sentence to complete is continued by its
    ending. A sentence with a blank, "_", is filled with each choice, and what stands
    behind the blank is scored, as Winogrande's authors and the harness do it.

    Args:
        row: Has ``instruction`` and ``answer``, the name of the right choice.

    Raises:
        UserError: If there is no list of names, a name has no choice, or the answer is
            none of the names.

    Example:
        >>> parse_question({
        ...     "instruction": "Please choose the correct answer to the question: "
        ...     "Is ice warm?\n\nAnswer1: yes Answer2: no\n\n"
        ...     "Answer format: answer1/answer2",
        ...     "answer": "answer2",
        ... }).continuations
        (' yes', ' no')
    """
    text, mark, listed = row["instruction"].rpartition(_FORMAT)
    names = tuple(name.strip() for name in listed.split("/"))
    if not mark or len(names) < 2:
        raise UserError(
            f"commonsense: the instruction {_shown(row['instruction'])} does not end "
            f"in '{_FORMAT} name/name'; give rows in the format of Commonsense170k"
        )
    if row["answer"] not in names:
        raise UserError(
            f"commonsense: the answer {row['answer']!r} is none of {'/'.join(names)}; "
            "give the name of a choice"
        )
    text, choices = _choices(text, names)
    question = text.partition(": ")[2].strip()
    prompts, continuations = _put(question, names, choices)
    right = names.index(row["answer"])
    return Question(prompts, continuations, names, right)


def _choices(text, names):
    """Returns what stands before the choices, and the choices."""
    if set(names) == set(_WORDS):
        return text, [_WORDS[name] for name in names]
    choices = []
    # From the last to the first: a question may spell "Answer1:" itself.
    for name in reversed(names):
        text, mark, choice = text.rpartition(f"{name.capitalize()}:")
        if not mark or not choice.strip():
            raise UserError(
                f"commonsense: the instruction {_shown(text + choice)} names {name}, "
                f"but has no text behind '{name.capitalize()}:'; add the choice"
            )
        choices.append(choice.strip())
    return text, choices[::-1]


def _put(question, names, choices):
    """Returns a prompt and a continuation for each choice."""
    if names[0].startswith("option") and "_" in question:
        before, _, behind = question.partition("_")
        return (
            tuple(before + choice for choice in choices),
            (f" {behind.strip()}",) * len(choices),
        )
    if not names[0].startswith("ending"):
        question = f"Question: {question}\nAnswer:"
    return (question,) * len(choices), tuple(f" {choice}" for choice in choices)


def _shown(text):
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
