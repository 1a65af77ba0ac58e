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

from experiments.errors import UserError
from experiments.tasks.rows import Rows

_FORMAT = "Answer format:"
# lm-evaluation-harness has a boolean question answered with these words.
_WORDS = {"true": "yes", "false": "no"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices, as lm-evaluation-harness puts it to a model.

    Attributes:
        prompts: What stands before each choice; of Winogrande alone they differ.
        continuations: What is scored behind each prompt; begins with a space.
        outputs: What a model that is tuned on the data says for each choice, such as
            "the correct answer is answer1".
        right: Place of the right choice.
    """

    prompts: tuple[str, ...]
    continuations: tuple[str, ...]
    outputs: tuple[str, ...]
    right: int


def read_questions(rows: Rows, text_column: str, answer_column: str) -> list[Question]:
    """Returns the question of each row.

    Args:
        rows: In the format of Commonsense170k.
        text_column: Holds the instruction.
        answer_column: Holds what the name of the right choice ends, such as "the
            correct answer is answer2".

    Raises:
        UserError: If a column is absent, or a row is in another format; it is named.
    """
    instructions = rows.texts(text_column)
    outputs = rows.texts(answer_column, "--label-column")
    questions = []
    for instruction, output, place in zip(
        instructions, outputs, rows.places, strict=True
    ):
        try:
            questions.append(parse_question(instruction, output))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return questions


def parse_question(instruction: str, output: str) -> Question:
    r"""Returns the question of one row.

    ARC's, OpenBookQA's, PIQA's, Social IQa's and BoolQ's questions become
    "Question: ...\nAnswer:", continued by " " and the choice (BoolQ's by " yes" and
    " no"; its passages are not in the data). A sentence to complete is continued by its
    ending. A blank, "_", is filled with each choice, and what stands behind it is
    scored, as Winogrande's authors and the harness do it.

    Args:
        instruction: See this module's docstring.
        output: Ends with the name of the right choice.

    Raises:
        UserError: If there is no list of names, a name has no choice, or the output
            ends with none of the names.

    Example:
        >>> question = parse_question(
        ...     "Please choose the correct answer to the question: Is ice warm?\n\n"
        ...     "Answer1: yes Answer2: no\n\nAnswer format: answer1/answer2",
        ...     "the correct answer is answer2",
        ... )
        >>> question.prompts[0], question.continuations
        ('Question: Is ice warm?\nAnswer:', (' yes', ' no'))
        >>> question.outputs[0]
        'the correct answer is answer1'
    """
    text, mark, listed = instruction.rpartition(_FORMAT)
    names = tuple(name.strip() for name in listed.split("/"))
    if not mark or len(names) < 2:
        raise UserError(
            f"the instruction {_shown(instruction)} does not end in '{_FORMAT} "
            "name/name'; give rows in the format of Commonsense170k"
        )
    *words, name = output.split() or [""]
    if name not in names:
        raise UserError(
            f"the answer {_shown(output)} ends with none of {'/'.join(names)}; end it "
            "with the name of a choice"
        )
    text, choices = _choices(text, names)
    question = (text.partition(": ")[2] or text).strip()
    prompts, continuations = _put(question, names, choices)
    outputs = tuple(" ".join([*words, other]) for other in names)
    return Question(prompts, continuations, outputs, names.index(name))


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
                f"the instruction {_shown(text + choice)} names {name}, "
                f"but has no text behind '{name.capitalize()}:'; add the choice"
            )
        choices.append(choice.strip())
    return text, choices[::-1]


def _put(question, names, choices):
    """Returns a prompt and a continuation for each choice."""
    before, _, behind = question.partition("_")
    if names[0].startswith("option") and behind.strip():
        prompts = tuple(before + choice for choice in choices)
        return prompts, (f" {behind.strip()}",) * len(choices)
    if not names[0].startswith("ending"):
        question = f"Question: {question}\nAnswer:"
    return (question,) * len(choices), tuple(f" {choice}" for choice in choices)


def _shown(text):
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
