"""Documents of the validation text that stand in the training text too."""

from collections.abc import Iterable, Iterator


class Overlap:
    """Counts the validation documents that are trained on, by hash, at 8 bytes each."""

    def __init__(self):
        self._validation: set[int] = set()
        self._shared: set[int] = set()

    def remember(self, documents: Iterable[str]) -> Iterator[str]:
        """Yields the validation text, which must be read first."""
        for document in documents:
            if document.strip():
                self._validation.add(hash(document))
            yield document

    def compare(self, documents: Iterable[str]) -> Iterator[str]:
        """Yields the training text."""
        for document in documents:
            if hash(document) in self._validation:
                self._shared.add(hash(document))
            yield document

    @property
    def shared(self) -> int:
        """Different validation documents that the training text has, too."""
        return len(self._shared)

    @property
    def is_whole(self) -> bool:
        """Whether there is no validation document that it has not."""
        return bool(self._validation) and self._shared == self._validation
