"""What the value of a flag may be, said beside it: ``steps: AtLeastOne = 800``."""

import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
    """The allowed values of a flag.

    Attributes:
        allows: Whether a value is one of them.
        says: The same in words, after "must be".
    """

    allows: Callable[[Any], bool]
    says: str


_NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "0 or more and finite")

AtLeastOne = Annotated[int, Range(lambda x: x >= 1, "at least 1")]
Count = Annotated[int, _NOT_NEGATIVE]
Port = Annotated[int, Range(lambda x: 1 <= x <= 65535, "from 1 to 65535")]
Positive = Annotated[float, Range(lambda x: 0 < x < math.inf, "above 0 and finite")]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, Range(lambda x: 0 <= x <= 1, "from 0 to 1")]
Share = Annotated[float, Range(lambda x: 0 < x <= 1, "above 0 and at most 1")]
Inside = Annotated[float, Range(lambda x: 0 < x < 1, "above 0 and below 1")]
Decay = Annotated[float, Range(lambda x: 0 <= x < 1, "0 or more and below 1")]
Halves = Annotated[
    float,
    Range(lambda x: x >= 0 and (2 * x) % 1 == 0, "a multiple of 0.5, 0 or more"),
]
Seed = Annotated[int, Range(lambda x: 0 <= x < 2**31, "0 or more and below 2**31")]


def ranges_of(options: type) -> dict[str, Range]:
    """Returns the range of each field of a dataclass that has one."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = {name: _range(hint) for name, hint in hints.items()}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def _range(hint: Any) -> Range | None:
    """Looks into ``Annotated[...]`` and ``... | None``."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Range):
            return part
    inner = (_range(part) for part in typing.get_args(hint))
    return next((found for found in inner if found is not None), None)
