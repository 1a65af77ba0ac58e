"""Data sets of the Hugging Face hub, streamed by its ``datasets``."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.data.columns import no_column, text_of
from experiments.errors import UserError
from experiments.extras import import_extra

_PREFIX = "hub:"
_SECONDS_TO_ANSWER = 15.0
_LONGEST_REASON = 300


class HubText(NamedTuple):
    """Text on the hub.

    Attributes:
        name: ``owner/name`` of the data set.
        configuration: Of its configurations; None: the only one.
        split: One of its splits; None: what the text is for decides.
    """

    name: str
    configuration: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, self))


def parse_hub_text(spec: str) -> HubText | None:
    """Returns the text on the hub that ``--data`` names, None: it names something else.

    Args:
        spec: ``c4``, for ``hub:allenai/c4:en``, or ``hub:owner/name``, with
            ``:configuration`` and ``:split`` behind it where they are needed.

    Raises:
        UserError: If it begins like one and is none.
    """
    if spec == "c4":
        return HubText("allenai/c4", "en")
    if not spec.startswith(_PREFIX):
        return None
    name, *rest = spec.removeprefix(_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(
            f"{spec!r} does not name a data set; give hub:owner/name, "
            "hub:owner/name:configuration or hub:owner/name:configuration:split"
        )
    return HubText(name, *(word or None for word in rest))


def open_splits(text: HubText) -> dict[str, Any]:
    """Opens a data set; returns a datasets.IterableDataset by split.

    Raises:
        UserError: If ``datasets`` is not installed, or the data set cannot be read. The
            hub is asked once, with 15 s to answer: ``datasets`` would try for minutes.
    """
    needs = f"{text.name} needs Hugging Face datasets"
    datasets = import_extra("datasets", needs, "c4", "use make pretrain")
    with hub_errors(text.name):
        _ask_for(text.name)
        return dict(
            datasets.load_dataset(text.name, text.configuration, streaming=True)
        )


def texts(dataset: Any, column: str, name: str) -> Iterator[str]:
    """Yields the text of each example of a datasets.IterableDataset, in its order.

    Args:
        dataset: The examples.
        column: That holds the text; null is an empty document.
        name: Of the data set, for errors.

    Raises:
        UserError: If the source fails, or an example has no such text.
    """
    with hub_errors(name):
        for example in dataset:
            yield text_of(example, column, name)


def check_column(dataset: Any, column: str, name: str) -> None:
    """Raises UserError if it is known that a data set has no such column."""
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise no_column(column, columns, name)


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns whatever datasets, its file systems and its parsers raise into one line."""
    try:
        yield
    except UserError:
        raise
    # Their exceptions share no base class: OSError, httpx.HTTPError, DatasetsError...
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{name} cannot be read from the Hugging Face hub "
            f"({reason[:_LONGEST_REASON]}); check the network, the name and whether "
            "you may read it (hf auth login), or use files"
        ) from error


def _ask_for(name):
    hub = importlib.import_module("huggingface_hub")
    hub.HfApi().dataset_info(name, timeout=_SECONDS_TO_ANSWER)
