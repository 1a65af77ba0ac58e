"""Effective ranks, and what adaptive ranks save: Section 4 of AdaRankGrad.

With R_t^j the rank of matrix j at step t, and the sides d_j and d_{j+1} of the matrix:

    R_adap^j  = sum_t R_t^j / T
    R_adap    = sum_j R_adap^j (d_j + d_{j+1}) / sum_j (d_j + d_{j+1})
    M_red     = sum_j (R - R_adap^j) (d_j + d_{j+1}),  R the rank that is not adaptive

The paper prints the sum of d_j d_{j+1} under R_adap. This gives no rank: 8 columns of a
matrix 384 x 384 would be 0.04. It is the share of a whole matrix that a basis and one
moment of these ranks take, and :func:`effective_ranks` has it as
``effective_rank_share``. The ranks beside the metrics of the paper's Table 2, such as
3.71 from an initial 4, can only be a mean over the matrices, as above. The printed sum
below starts at j = 0, the one above at 1; there is no matrix 0. M_red counts numbers of
a basis and of one moment; Adam keeps two moments, so that bytes fall by more.

The ranks of every step count, not those of the lines that are logged.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax
from experiments.model.layers import by_kind
from experiments.run.columns import matrix_name


@dataclasses.dataclass
class RankSums:
    """Ranks in use, summed over the steps; checkpoints store it.

    Attributes:
        steps: Steps that were added.
        sums: Sum of the ranks of each matrix, in the order of :func:`ranks_vector`.
    """

    steps: int = 0
    sums: list[int] = dataclasses.field(default_factory=list)

    def add(self, ranks: Any) -> None:
        """Adds the ranks of a step.

        Args:
            ranks: From :func:`ranks_vector`, behind the step; the call waits for it.
        """
        new = np.asarray(ranks)
        old = self.sums if self.steps else [0] * len(new)
        self.sums = [a + b for a, b in zip(old, new.tolist(), strict=True)]
        self.steps += 1


def ranks_vector(opt_state: Any) -> jax.Array:
    """Returns the rank in use of each projected matrix, int32 (matrices,).

    The matrices of a stack follow each other, in the order of
    ``lowrank_optax.subspaces``. The call may be traced: one array comes to the host and
    not one for each leaf.
    """
    ranks = [slot.rank.ravel() for slot in lowrank_optax.subspaces(opt_state).values()]
    return jnp.concatenate([jnp.zeros(0, jnp.int32), *ranks])


def effective_ranks(
    sums: RankSums, opt_state: Any, params: Any, fixed_rank: int | None
) -> dict[str, Any]:
    """Returns the effective ranks of a run and what they save.

    Args:
        sums: Over the steps of the run.
        opt_state: The state of its optimizer, or the shapes.
        params: The parameters, or the shapes; each projected leaf is (*stack, n, m).
        fixed_rank: R of a method whose rank is fixed, as --rank has it. None: not
            known.

    Returns:
        effective_rank: R_adap, in columns.
        effective_rank_share: As the paper prints it: numbers of a basis and a moment,
            by numbers of the matrices.
        effective_rank_by_layer: Kind of matrix -> R_adap^j, a number, or a list with
            one for each layer.
        rank_reduction: M_red, in numbers; None where R is not known.

        Without projected matrices, or steps, the numbers are None.
    """
    slots = lowrank_optax.subspaces(opt_state)
    if not (slots and sums.steps):
        return {
            "effective_rank": None,
            "effective_rank_share": None,
            "effective_rank_by_layer": {},
            "rank_reduction": None,
        }
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    stacks = [slot.rank.shape for slot in slots.values()]
    sides = np.concatenate(
        [
            np.tile(np.asarray(shapes[path][-2:], float), (math.prod(stack), 1))
            for path, stack in zip(slots, stacks, strict=True)
        ]
    )
    widths, sizes = sides.sum(axis=1), sides.prod(axis=1)
    means = np.asarray(sums.sums, float) / sums.steps
    ends = np.cumsum([math.prod(stack) for stack in stacks])[:-1]
    by_layer = {
        matrix_name(path): part.reshape(stack).tolist()
        for path, part, stack in zip(slots, np.split(means, ends), stacks, strict=True)
    }
    saved = None if fixed_rank is None else float((fixed_rank - means) @ widths)
    return {
        "effective_rank": float(means @ widths / widths.sum()),
        "effective_rank_share": float(means @ widths / sizes.sum()),
        "effective_rank_by_layer": by_kind(by_layer),
        "rank_reduction": saved,
    }
