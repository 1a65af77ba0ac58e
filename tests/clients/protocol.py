"""What a client is, and what all of them share: sizes, data and methods."""

import abc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import lowrank_optax
from tests.clients.placement import on

# No two sizes of a matrix agree, and each is a multiple of the mesh's axes. Six layers,
# and four heads: at rank 3 a stack of norms, and a bias per head, would count as
# matrices to who does not know what they are.
VOCABULARY, WIDTH, HEADS, HEAD_DIM, HIDDEN, LAYERS = 56, 32, 4, 10, 48, 6
INNER = HEADS * HEAD_DIM
RANK, STEPS, RATE = 3, 16, 1e-2


def batch(index: int, rows: int = 8, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and those that follow them: each adds a number to the last."""
    rng = np.random.default_rng(index)
    start = rng.integers(0, VOCABULARY, (rows, 1))
    tokens = (start + 3 * np.arange(length + 1)) % VOCABULARY
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses)


METHODS = {
    "adarankgrad": lambda: lowrank_optax.adarankgrad(
        RATE, RANK, refresh=lowrank_optax.on_convergence(4, 6)
    ),
    "galore": lambda: lowrank_optax.galore(RATE, RANK, update_proj_gap=5, scale=1.0),
    "low_rank_muon": lambda: lowrank_optax.low_rank_muon(
        RATE, RANK, refresh=lowrank_optax.every(5)
    ),
    "projfactor": lambda: lowrank_optax.projfactor(
        RATE, RANK, 2, refresh=lowrank_optax.every(5)
    ),
}


class Matrices(NamedTuple):
    """How a leaf is seen: a stack of matrices.

    Which side is called the rows is left open: Equinox and Haliax store (output,
    input), and a low-rank update is the same for a matrix and its transpose.
    """

    stack: tuple[int, ...]
    sides: frozenset[int]


def matrices(rows: int, columns: int, *stack: int) -> Matrices:
    return Matrices(stack, frozenset((rows, columns)))


def stacked(listing: dict[str, Matrices | None], *stack: int) -> dict:
    """Returns the listing of a layer for a stack of them."""
    return {k: v and Matrices((*stack, *v.stack), v.sides) for k, v in listing.items()}


def under(prefix: str, listing: dict[str, Matrices | None]) -> dict:
    """Returns a listing with a prefix on its paths."""
    return {f"{prefix}/{k}": v for k, v in listing.items()}


def name_of(path: str) -> str:
    """Returns a key path, as keystr writes it, as its names: ``a/0/b``."""
    return "/".join(re.findall(r"[^\[\]'.<>]+", path))


class Trainer(abc.ABC):
    """One run of a client, as that client's users write it."""

    @property
    @abc.abstractmethod
    def params(self) -> Any:
        """The parameters as the optimizer's ``init`` sees them."""

    @property
    @abc.abstractmethod
    def opt_state(self) -> Any:
        """The optimizer's state as the client holds it."""

    @abc.abstractmethod
    def step(self, index: int) -> float:
        """Trains on ``batch(index)``; returns the loss before."""

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Writes parameters and state in the client's own manner."""

    @abc.abstractmethod
    def restore(self, directory: Path) -> None:
        """Reads them in a run that has just begun."""


class Loop(Trainer):
    """A loop of the user's own: what is trained, the state, and a function for both.

    Attributes:
        parts: What is trained, and the optimizer's state.
        train_step: (what is trained, state, optimizer, tokens, targets) -> both anew,
            and the loss.
    """

    def __init__(
        self,
        train_step: Callable[..., tuple],
        parts: tuple[Any, Any],
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None,
    ):
        self.train_step, self.parts = train_step, parts
        self.optimizer, self.mesh = optimizer, mesh

    @property
    def params(self):
        return self.parts[0]

    @property
    def opt_state(self):
        return self.parts[1]

    def step(self, index):
        with on(self.mesh):
            trained, state, loss = self.train_step(
                *self.parts, self.optimizer, *batch(index)
            )
        self.parts = trained, state
        return float(loss)


class Client(abc.ABC):
    """A client: how it makes a run, and what is right to list of its parameters.

    Attributes:
        expected: Names of the leaf's path -> how it is seen; None: at full size.
        without_gradient: Parts of names of leaves whose gradient is rounding alone, as
            the bias of attention's keys: no two programs agree on its sign.
    """

    expected: ClassVar[dict[str, Matrices | None]]
    without_gradient: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def trainer(
        self,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None = None,
        seed: int = 0,
    ) -> Trainer:
        """Returns a run at its start, sharded as the client does it if on a mesh.

        Args:
            optimizer: Of the parameters.
            mesh: Of the axes "fsdp" and "tp".
            seed: Of the parameters.
        """
