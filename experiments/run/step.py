"""One training step and one validation, jitted, over the devices of a mesh."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import lowrank_optax
from experiments.distribution.mesh import rows, whole
from experiments.run.effective_rank import ranks_vector

Batch = Mapping[str, Any]
# (params, tokens (B, T) int32) -> logits (B, T, V) float32
ApplyFn = Callable[[Any, jax.Array], jax.Array]
# (params, batch) -> summed loss, summed weights
LossFn = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
# Name and dtype of a batch's arrays, each (batch_size, sequence_length).
BATCH = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}


def make_train_step(
    loss_fn: LossFn,
    tx: Any,
    accumulate: int = 1,
    *,
    gradients: Literal["subspace", "full"] = "full",
    refresh: Literal["sketch", "full"] = "full",
) -> lowrank_optax.TrainStep:
    """Returns the step of a run; its compiled programs, see ``lowrank_optax``.

    Its metrics are, beside those of every ``train_step``: ``rejected`` and
    ``rejected_in_a_row``, int32, the updates left out so far because a gradient was not
    finite; and ``ranks``, from :func:`experiments.run.effective_rank.ranks_vector`.

    Args:
        loss_fn: Returns the summed loss of a batch, and the sum of its weights.
        tx: From :func:`experiments.optim.build.build_optimizer`.
        accumulate: Micro-batches of a batch; above 1 ``tx`` is what
            ``lowrank_optax.accumulate`` returns.
        gradients: Whether gradients are computed inside the subspaces.
        refresh: What computed bases are then renewed from.
    """

    def mean_loss(params, batch):
        summed, weight = loss_fn(params, batch)
        # A micro-batch may be padding alone.
        return summed / jnp.maximum(weight, 1), weight

    def metrics(params, opt_state):
        del params
        return {
            "rejected": optax.tree.get(opt_state, "total_notfinite"),
            "rejected_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
            "ranks": ranks_vector(opt_state),
        }

    return lowrank_optax.train_step(
        mean_loss,
        tx,
        has_aux=True,
        micro_batches=accumulate,
        weight=lambda batch, weight: weight,
        gradients=gradients,
        refresh=refresh,
        metrics=metrics,
    )


def make_eval_step(
    evaluate: Callable[[Any, Batch], Any], mesh: Mesh, placed: Any = None
):
    """Returns the jitted (params, batch) -> what ``evaluate`` returns, on all devices.

    Args:
        evaluate: Function of parameters and a batch.
        mesh: From :func:`experiments.distribution.mesh.make_mesh`.
        placed: Parameters, or their shapes: each array is where it is. None: each
            device has a whole copy of all.
    """
    everywhere = whole(mesh)
    kept = everywhere
    if placed is not None:
        kept = jax.tree.map(lambda x: x.sharding, placed)
    return jax.jit(evaluate, in_shardings=(kept, rows(mesh)), out_shardings=everywhere)


def mean_loss(summed: Iterable[tuple[Any, Any]]) -> float:
    """Returns the mean over tokens of the summed losses and weights of batches.

    Not the mean of the batches' means, in which the tokens of a short last batch would
    count for more.
    """
    nats = tokens = 0.0
    for of_batch, weight in summed:
        nats += float(of_batch)
        tokens += float(weight)
    return nats / tokens


def summed_token_loss(
    apply_fn: ApplyFn, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns summed nats and summed weights of a batch of tokens, both float32."""
    logits = apply_fn(params, batch["inputs"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(batch["weights"] * nats), jnp.sum(batch["weights"])
