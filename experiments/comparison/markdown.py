"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table.

    Args:
        heads: Of the columns.
        rows: The cells of each row, as many as there are heads.

    Raises:
        ValueError: If a row has another number of cells.

    Example:
        >>> print(markdown(["method", "loss"], [["adamw", "3.5"]]), end="")
        | method | loss |
        |---|---|
        | adamw | 3.5 |
    """
    lines = [heads, *rows]
    if any(len(line) != len(heads) for line in lines):
        raise ValueError(f"a row has not {len(heads)} cells")
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{'---|' * len(heads)}", *others]) + "\n"
