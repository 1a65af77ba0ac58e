"""What a run trains, as the loop sees it: data, loss and validation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from experiments.errors import UserError
from experiments.model.adapters import Draw

Batch = Mapping[str, Any]
# Runs a compiled Work.evaluate on a batch of NumPy arrays.
Evaluate = Callable[[Batch], Any]


class Criterion(NamedTuple):
    """What makes one validation better than another.

    Attributes:
        name: Of a number of :meth:`Work.validate`.
        is_larger_better: Whether the larger number is the better one.
    """

    name: str
    is_larger_better: bool

    def is_better(self, number: float, than: float | None) -> bool:
        """Returns whether a number is better; NaN is never, None is worse than all."""
        if than is None:
            return number == number
        return number > than if self.is_larger_better else number < than


class Work(Protocol):
    """Data, loss and validation of one run.

    A batch is a dict of arrays whose first axis counts examples. Its shapes may differ
    from batch to batch; each shape has a compiled step of its own.

    Attributes:
        description: What is trained and what is validated on, in lines.
        digest: Hex digest of the data; a resumed run refuses another one.
        data_flag: The flag that names the data, with its value, for messages.
        criterion: By which the best validation is chosen.
        first_batches: Shapes of batches whose steps are compiled at the start; those of
            other batches are compiled when they come.
        flops_per_token: Of a training step; None: not counted.
        draw: How adapters are drawn.
    """

    @property
    def description(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def data_flag(self) -> str: ...

    @property
    def criterion(self) -> Criterion: ...

    @property
    def first_batches(self) -> Sequence[dict[str, jax.ShapeDtypeStruct]]: ...

    @property
    def flops_per_token(self) -> float | None: ...

    @property
    def draw(self) -> Draw: ...

    def train_iterator(self) -> Any:
        """Returns a new iterator over training batches, from the start.

        It has ``get_state()``, JSON-able, ``set_state(state)``, which continues exactly
        behind the batch returned last, and ``close()``.
        """
        ...

    def tokens_of(self, batch: Batch) -> int:
        """Returns the tokens of a batch that are trained on."""
        ...

    def epochs(self, step: int) -> float | None:
        """Returns the passes over the data in so many steps; None: not known."""
        ...

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the summed loss of a batch and its summed weights; it is traced."""
        ...

    def evaluate(self, params: Any, batch: Batch) -> Any:
        """Returns arrays that a validation needs of a batch; it is traced."""
        ...

    def validate(self, params: Any, evaluate: Evaluate) -> dict[str, Any]:
        """Returns the numbers of a validation, ``validation_loss`` among them.

        Args:
            params: The parameters.
            evaluate: Runs :meth:`evaluate`, compiled, with them.
        """
        ...

    def told(self, numbers: Mapping[str, Any]) -> str:
        """Returns a validation's numbers in a few words."""
        ...

    def warning(self, numbers: Mapping[str, Any]) -> str | None:
        """Returns what the validation before the first step warns of, if anything."""
        ...


def ended(work: Work, step: int) -> UserError:
    """Returns the error of data that ended before the run."""
    return UserError(
        f"{work.data_flag} ended at step {step}; give more text or fewer --steps"
    )
