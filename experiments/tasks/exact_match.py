"""GSM8K's metric: whether the number that a solution ends in is the right one."""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from experiments.errors import UserError

MARK = "####"
# A dollar sign may stand between sign and digits; separators stand between digits.
_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"{MARK}\s*\$?({_NUMBER})")
_ANY = re.compile(_NUMBER)


def exact_match(texts: Sequence[str], solutions: Sequence[str]) -> dict[str, float]:
    r"""Returns the share of generated solutions whose number is the reference's.

    Numbers are compared as numbers: commas, a dollar sign, and a dot behind the last
    digit are no part of them, and 18.00 is 18. lm-evaluation-harness compares what is
    left of the letters, where 18.00 is not 18; it agrees on whole numbers.

    Args:
        texts: What the model wrote behind each prompt, cut where it begins another
            question.
        solutions: GSM8K's own for each text, at least one.

    Returns:
        ``exact_match`` takes the first number behind ``####`` in a text, the harness's
        strict match; ``flexible_match`` the last number anywhere, its flexible one.
        Both in [0, 1]; a text without such a number is wrong.

    Raises:
        UserError: If a reference has no number behind ``####``, or there is none.

    Example:
        >>> solutions = ["9 * 2 = 18\n#### 18", "#### 1,200"]
        >>> exact_match(["So it is 18.\n#### $18.00", "It is 1200."], solutions)
        {'exact_match': 0.5, 'flexible_match': 1.0}
    """
    if not solutions:
        raise UserError("gsm8k: there is no problem to score; give more than none")
    wanted = list(map(reference, solutions))
    return {
        "exact_match": _share(map(marked_number, texts), wanted),
        "flexible_match": _share(map(last_number, texts), wanted),
    }


def reference(solution: str) -> Decimal:
    """Returns the number behind the last ``####`` of GSM8K's own solution.

    Raises:
        UserError: If there is none.
    """
    number = marked_number(MARK + solution.rpartition(MARK)[2])
    if MARK not in solution or number is None:
        raise UserError(
            f"gsm8k: the answer {solution[-40:]!r} has no number behind {MARK}; give "
            f"solutions that end in {MARK} and a number"
        )
    return number


def marked_number(text: str) -> Decimal | None:
    """Returns the first number that stands behind ``####``, None: there is none."""
    found = _MARKED.search(text)
    return _value(found[1]) if found else None


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text, None: there is none."""
    found = _ANY.findall(text)
    return _value(found[-1]) if found else None


def _value(number):
    return Decimal(number.replace(",", "").replace("$", ""))


def _share(found: Iterable[Decimal | None], wanted: Sequence[Decimal]) -> float:
    pairs = zip(found, wanted, strict=True)
    return sum(number == right for number, right in pairs) / len(wanted)
