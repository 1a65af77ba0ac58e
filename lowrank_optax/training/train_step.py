"""``train_step``: what a training loop holds in its hand."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import optax

from lowrank_optax.checks import as_count
from lowrank_optax.training.accumulate import Accumulation, accumulate
from lowrank_optax.training.programs import NewShapes, TrainStep
from lowrank_optax.training.step import Refresh, Step

Gradients = Literal["subspace", "full"]


def train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
    weight: Callable[[Any, Any], Any] | None = None,
    gradients: Gradients = "subspace",
    refresh: Refresh = "sketch",
    oversample: int | None = None,
    full_gradients: tuple[str, ...] = (),
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    new_shapes: NewShapes = "compile",
) -> TrainStep:
    r"""Returns an object that trains: compiled steps, their order, and their state.

    A training loop::

        step = lowrank_optax.train_step(loss_fn, optimizer)
        state = step.init(params)
        for batch in batches:
            params, state, metrics = step(params, state, batch)

    A step computes gradients inside the subspaces
    (:func:`lowrank_optax.subspace_value_and_grad`), updates, and renews the bases that
    are due. Two programs are compiled: one renews, the other does not. The host knows
    from the state which one is next, and does not wait for the device: it reads what
    the step before the last two has said. For ``every`` this is exact, unless a
    gradient is zero or not finite. A basis that is
    due ``on_convergence`` comes two steps later, from a sketch three. The state holds
    what the next steps have to renew, so that a run that goes on from a saved state is
    the same run.

    A computed basis is renewed from a sketch Y = Omega^T G, E[Y^T Y] = G^T G, which a
    renewing step computes beside the gradients inside the subspaces: no step holds a
    full gradient of a projected matrix. See ``SubspaceValueAndGrad.sketching``. The new
    basis serves from the next step on, so that the first step moves no projected
    matrix. ``refresh="full"`` renews from full gradients instead, at the start of an
    update.

    Any Optax optimizer may be given, but what stands before or around a low-rank
    transformation gets projected gradients (:class:`lowrank_optax.Projected`); with
    ``gradients="full"`` everything gets full ones. Leaves of methods that need full
    gradients (``low_rank_muon``, ``fira``, ``apollo``, ``ldadam``) get full gradients,
    and so do all leaves that are not projected. The optimizer's ``update`` gets the
    step's loss as ``value``, for ``optax.contrib.reduce_on_plateau`` and its like. Line
    searches, which evaluate the loss again, do not work.

    Parameters and states on a mesh stay where they are; put each batch on the mesh. An
    optimizer's state in ``pinned_host`` memory comes to the devices around its uses
    alone. Under ``jax.disable_jit()`` a step runs line by line, without a compilation.

    Args:
        loss_fn: (params, batch, \*args) -> scalar, or (scalar, aux). With a module of
            Flax NNX in the place of the parameters, the function gets a module, and the
            module's statistics and random counters are kept.
        optimizer: Any Optax transformation.
        has_aux: Whether the function returns aux too.
        micro_batches: Number k of micro-batches that a batch is cut into: every k-th
            example of the first axis. A micro-batch's gradient is projected before the
            next one is computed, see :func:`lowrank_optax.accumulate`. Typed random
            keys among ``args`` are folded with the number of the micro-batch. aux then
            has a leading axis k.
        weight: (batch, aux) -> weight of a micro-batch, such as its number of tokens;
            None: 1. Loss and gradients are weighted means.
        gradients: "full": all leaves get full gradients.
        refresh: What computed bases are renewed from: "sketch" or "full".
        oversample: Rows of a sketch beyond the rank; None: as many as the rank.
        full_gradients: Key paths of projected leaves that get full gradients, because
            the model uses them in a way that :func:`subspace_value_and_grad
            <lowrank_optax.subspace_value_and_grad>` refuses.
        metrics: (params, optimizer state) -> more metrics, computed behind each step.
            None may be called ``loss``, ``grad_norm``, ``aux`` or ``due``.
        new_shapes: What a batch of new shapes does: "compile" compiles once more and
            says so in the log; "refuse" raises.

    Returns:
        A :class:`TrainStep`. ``init(params)`` returns a :class:`TrainState`. A call
        (params, state, batch, \*args) returns parameters, state and metrics: ``loss``,
        in float32 or wider, and ``grad_norm``, both (); ``aux`` with ``has_aux``; and
        those of ``metrics``. The norm is that of projected gradients where they are
        projected, before any clipping. Parameters and state are donated: use the
        returned ones.

    Raises:
        ValueError: If an argument is out of its range; in ``init``, if something inside
            the optimizer accumulates; when called, if a batch cannot be cut, if its
            shapes are refused, if the state is of another optimizer, if a metric has a
            step's own name, or if a leaf's use has no projected gradient (the error
            names it).
        TypeError: If the optimizer's ``update`` takes no extra arguments and says that
            it does; when called, if the loss is not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16))}
        >>> step = train_step(
        ...     lambda params, x: jnp.mean((x @ params["w"]) ** 2),
        ...     lowrank_optax.galore(1e-2, rank=2),
        ... )
        >>> state = step.init(params)
        >>> for batch in (jnp.ones((8, 64)), jnp.ones((8, 64))):
        ...     params, state, metrics = step(params, state, batch)
        >>> float(metrics["loss"]), step.compilations
        (4096.0, 2)
    """
    micro_batches = as_count("micro_batches", micro_batches)
    for name, value, kind in (
        ("gradients", gradients, Gradients),
        ("refresh", refresh, Refresh),
        ("new_shapes", new_shapes, NewShapes),
    ):
        choices = get_args(kind)
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    if oversample is not None:
        oversample = as_count("oversample", oversample, 0)
    if isinstance(optimizer, Accumulation):
        if optimizer.every_k != micro_batches:
            raise ValueError(
                f"the optimizer accumulates {optimizer.every_k} micro-batches, and "
                f"micro_batches is {micro_batches}: a step takes all micro-batches of "
                "an update. Give the optimizer inside, and micro_batches."
            )
    elif micro_batches > 1:
        optimizer = accumulate(optimizer, micro_batches)
    step = Step(
        loss_fn=loss_fn,
        has_aux=has_aux,
        optimizer=_with_extra_args(optimizer),
        micro_batches=micro_batches,
        weight=weight or (lambda batch, aux: 1.0),
        metrics=_with_names_checked(metrics) if metrics else lambda params, state: {},
        refresh=refresh,
        oversample=oversample,
        full_gradients=None if gradients == "full" else tuple(full_gradients),
    )
    return TrainStep(step, new_shapes)


def _with_extra_args(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, which then takes the arguments of a step.

    Raises:
        TypeError: If it says that it takes extra arguments, and does not take these.
    """
    found = optax.with_extra_args_support(optimizer)
    gradients = state = params = None
    try:
        inspect.signature(found.update).bind(
            gradients, state, params, refresh=True, value=0.0
        )
    except TypeError as error:
        raise TypeError(
            "the optimizer's update takes no further arguments, although it is an "
            "optax.GradientTransformationExtraArgs (optax.contrib.sam is one), and "
            "train_step gives it refresh and value; write its update with **extra_args,"
            " or give optax.GradientTransformation(optimizer.init, optimizer.update)."
        ) from error
    return found


def _with_names_checked(
    metrics: Callable[[Any, Any], Mapping[str, Any]],
) -> Callable[[Any, Any], Mapping[str, Any]]:
    """Returns the function; its metrics may not have the names of a step's own."""

    def found(params: Any, state: Any) -> Mapping[str, Any]:
        more = metrics(params, state)
        if taken := {"loss", "grad_norm", "aux", "due"} & more.keys():
            raise ValueError(
                f"metrics has {', '.join(sorted(taken))}, which a step uses itself; "
                "give another name."
            )
        return more

    return found
