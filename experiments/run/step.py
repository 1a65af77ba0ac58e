"""One training step and one validation, jitted, over the devices of a mesh."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import lowrank_optax
from experiments.distribution.host_memory import moved_late, on_devices
from experiments.distribution.mesh import rows, whole
from experiments.run.effective_rank import ranks_vector
from experiments.run.renewals import AHEAD, Renewed

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
    mesh: Mesh,
    accumulate: int = 1,
    *,
    in_subspace: bool = False,
    renewed: Renewed = None,
    bases: Sequence[str] = (),
    placed: tuple[Any, Any] | None = None,
):
    """Returns the jitted (params, opt_state, batch) -> (params, opt_state, metrics).

    Parameters and state are donated. The metrics are scalars: ``loss``, the mean by
    weight, and ``grad_norm``, before clipping, both float32 (with
    micro-batches or inside subspaces the norm of what is projected); ``rejected`` and
    ``rejected_in_a_row``, int32, the updates left out so far because a gradient was not
    finite; ``due``, bool (bases,), in the order of ``bases``: which of them a later
    step has to renew, see :mod:`experiments.run.renewals`; and ``ranks``, from
    :func:`experiments.run.effective_rank.ranks_vector`.

    Args:
        loss_fn: Returns the summed loss of a batch, and the sum of its weights.
        tx: From :func:`experiments.optim.build.build_optimizer`.
        mesh: From :func:`experiments.distribution.mesh.make_mesh`.
        accumulate: Micro-batches of a batch; above 1 ``tx`` is what
            ``lowrank_optax.accumulate`` returns.
        in_subspace: Whether gradients are computed inside the subspaces; random bases
            are renewed there too.
        renewed: Key paths of the leaves whose bases are renewed where they are due, by
            their full gradients; (): no renewal is in the program. None: of all.
        bases: Key paths of the leaves that have bases.
        placed: Parameters and state, or their shapes: the step leaves each array where
            it is; what of the state is in the host's memory is on the devices around
            its uses alone. None: each device has a whole copy of all.
    """
    everywhere = whole(mesh)
    kept: tuple[Any, Any] = (everywhere, everywhere)
    if placed is not None:
        kept = jax.tree.map(lambda x: x.sharding, placed)
    shardings = jax.tree.leaves(kept[0])
    is_cut = not in_subspace and not all(x.is_fully_replicated for x in shardings)

    def mean_loss(params, batch):
        summed, weight = loss_fn(params, batch)
        # A micro-batch may be padding alone.
        return summed / jnp.maximum(weight, 1), weight

    subspace = lowrank_optax.subspace_value_and_grad(mean_loss, tx, has_aux=True)
    renews = renewed != ()
    if not in_subspace:
        gradient = subspace.full
    elif not renews:
        gradient = subspace.keeping
    else:
        gradient = subspace.renewing(*(renewed or ()))

    def whole_batch(params, opt_state, batch):
        used = on_devices(opt_state, kept[1])
        (loss, _), grads, left = gradient(params, used, batch)
        if is_cut:
            # No array of a state in blocks says how a gradient is cut. The compiler
            # would add up whole gradients on each device.
            grads = jax.lax.with_sharding_constraint(grads, kept[0])
        opt_state = moved_late(opt_state, kept[1], used, left, grads)
        updates, opt_state = tx.update(grads, opt_state, params, refresh=renews)
        return loss, optax.tree.norm(grads), updates, opt_state

    def micro_batches(params, opt_state, batch):
        def add(carry, micro_batch):
            opt_state, nats, tokens = carry
            (loss, weight), grads, opt_state = gradient(params, opt_state, micro_batch)
            opt_state = tx.add(grads, opt_state, weight, params, refresh=renews)
            return (opt_state, nats + loss * weight, tokens + weight), None

        # Every k-th sequence: each device cuts up its own share.
        opt_state = on_devices(opt_state, kept[1])
        cut = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        start = (opt_state, jnp.float32(0), jnp.float32(0))
        (opt_state, nats, tokens), _ = jax.lax.scan(add, start, cut)
        norm = optax.tree.norm(opt_state.sums) / tokens
        updates, opt_state = tx.finish(opt_state, params, refresh=renews)
        return nats / tokens, norm, updates, opt_state

    def later(params, opt_state):
        due = subspace.due(params, opt_state, AHEAD, drawn=True)
        return jnp.array([due[path] for path in bases], bool)

    def step(params, opt_state, batch):
        way = micro_batches if accumulate > 1 else whole_batch
        loss, norm, updates, opt_state = way(params, opt_state, batch)
        params = optax.apply_updates(params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "rejected": optax.tree.get(opt_state, "total_notfinite"),
            "rejected_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
            "due": later(params, opt_state),
            "ranks": ranks_vector(opt_state),
        }
        return params, opt_state, metrics

    return jax.jit(
        step,
        in_shardings=(*kept, rows(mesh)),
        out_shardings=(*kept, everywhere),
        donate_argnums=(0, 1),
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
