"""``low_bit``: the moments of any optimizer in 8 bits, bases in 8 or 4."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from lowrank_optax.binding.moments import check_is_not_centered, check_is_not_signed
from lowrank_optax.checks import as_count, check_is_static
from lowrank_optax.codes import is_coded
from lowrank_optax.kinds import Kind, kinds_of
from lowrank_optax.matrix.boxes import is_box
from lowrank_optax.rules.budget import stored_as
from lowrank_optax.storage.coded_arrays import decoded, encoded
from lowrank_optax.storage.formats import Formats, is_stored


def low_bit(
    optimizer: optax.GradientTransformation,
    bits: Literal[8] | None = 8,
    basis_bits: Literal[8, 4] | None = None,
    *,
    block: int = 256,
    min_size: int = 4096,
    moments: Mapping[str, Kind] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the moments of ``optimizer`` in 8 bits, its bases in 8 or 4.

    Each block of values has a scale s in float32, and each value an integer code q:

    .. math::
        \text{first moments: } m \approx \pm \left(\frac{q}{127} s\right)^2, \quad
        \text{second: } v \approx \left(\frac{q}{254} s\right)^4, \quad
        \text{bases: } p \approx \frac{q}{127} s \text{ or } \frac{q}{7} s

    A second moment above zero never becomes zero. Every update decodes arrays, computes
    in float32, and encodes the results. A basis is encoded once, at its refresh,
    rounded to nearest. The rounded basis is in use from then on, for the re-basing of
    moments too.

    Codes are rounded up or down at random, and are right on average. Rounded to
    nearest, moments could not decay: at b2 = 0.999 the root of a second moment falls by
    0.05 % an update, less than half a step. Suppose that the gradients of some values
    of a block fall to 1/30 or 1/100 of the other gradients. After 5,000 updates v is
    within 1 % of v in float32, and the root mean square of Adam's updates within 2 or
    3 %. A code's power is larger on average than that of a code that is right: by up to
    1.6e-5 of the block's largest first moment, which counts for values below that.

    The format is a property of the arrays. :class:`Coded` arrays take the place of
    float32 arrays, and the state does not change otherwise. All readers of a state
    handle coded arrays: ``accumulate``, ``ranks``, ``compact``, checkpoints. ::

        low_bit(galore(1e-2))                    # 8-bit GaLore
        low_bit(adarankgrad(1e-3))               # 8-bit AdaRankGrad
        low_bit(galore(1e-2), basis_bits=4)      # with Q-GaLore's INT4 projection
        low_bit(optax.adamw(1e-3))               # 8-bit Adam

    In a subspace a block is a piece of one column, of a moment or a basis, because
    columns differ most and may be cut off. At full size a block is a piece of one row
    (one token of an embedding), or of several rows shorter than 32. A value takes
    1 + 4 / block bytes, and a matrix 4 more for its seed. The global shape of an array
    decides whether it is coded; its sharding does not. ``optimizer`` sees moments in
    half precision as float32.

    An update holds its decoded arrays in float32: a leaf's moments for all stacked
    layers. XLA on CPUs does not order for memory, and holds the moments of many leaves.
    This temporary memory may exceed the saving. For the blocks of LLaMA 60m in
    bfloat16, a step of 8-bit AdamW takes 269 MB, and a step of AdamW with bfloat16
    moments 249 MB; in float32 314 and 529 MB.

    Args:
        optimizer: Any Optax transformation, with low-rank ones anywhere inside.
        bits: 8 for the moments; None: moments stay in float32.
        basis_bits: 8 or 4 for the bases of low-rank transformations; None: bases stay
            in float32. Random bases are not stored in any case.
        block: Largest number of values in a block; >= 2.
        min_size: Arrays with fewer values stay in float32; >= 1. Norms and biases save
            little and suffer most.
        moments: Kinds of further fields of the state, beside the known ones (``mu``,
            ``nu``, ``trace``, ...): name -> "first", "second" or "constant" (not
            coded).
        seed: Seed of the rounding. A draw is a function of the seed, the array's path,
            the value's position and the number of the update. A resumed run repeats
            its draws bit for bit.

    Returns:
        A transformation with the updates of ``optimizer``, up to the error of the
        codes. A value that is not finite, and a second moment below zero, is coded as
        not a number; the other values of the block do not change.

    Raises:
        ValueError: If a number is out of its range; in ``init``, if a transformation
            takes the root of nu - mu^2 (``optax.scale_by_stddev``), calls something
            with both signs ``nu`` (``optax.sm3``), or has no known field of at least
            ``min_size`` values but unknown ones; in ``update``, if a state holds other
            formats than these arguments give.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((512, 64))}
        >>> state = low_bit(optax.scale_by_adam()).init(params)
        >>> state.mu["w"].codes.dtype, state.mu["w"].absmax.shape
        (dtype('int8'), (512, 1))

    References:
        Dettmers et al., `8-bit optimizers <https://arxiv.org/abs/2110.02861>`_, 2021,
        have blocks and scales. Their codes are a table of 256 values, rounded to
        nearest; here codes are powers, rounded at random. `Q-GaLore
        <https://arxiv.org/abs/2407.08296>`_ has the basis in 4 bits; its lazy refresh
        and INT8 weights are left out.
    """
    if bits not in (8, None):
        raise ValueError(f"bits must be 8 or None, got {bits!r}.")
    if basis_bits not in (8, 4, None):
        raise ValueError(f"basis_bits must be 8, 4 or None, got {basis_bits!r}.")
    check_is_static("seed", seed, '("seed",)', "draws depend on seed")
    block, min_size = as_count("block", block, 2), as_count("min_size", min_size)
    formats = Formats(bits, basis_bits, block, min_size, kinds_of(moments), seed)
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        if isinstance(params, optax.LookaheadParams):
            raise ValueError(
                "low_bit(optax.lookahead(...)): optax.lookahead hands on a part of the "
                "parameters; give optax.lookahead(low_bit(...), ...)."
            )
        with stored_as(formats.shapes):
            state = inner.init(params)
        if bits:
            check_is_not_centered(state, "each is rounded by itself")
            if "nu" not in (moments or {}):
                check_is_not_signed(state)
            formats.check_knows(state, params)
        return formats.encoded(state, params)

    def update(updates, state, params=None, **extra_args):
        formats.check(state, updates)
        floats = jax.tree.map(decoded, state, is_leaf=is_stored)
        updates, new_state = inner.update(updates, floats, params, **extra_args)
        return updates, _stored(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _stored(new_state: Any, state: Any) -> Any:
    """Returns a state with each array in the format, or the dtype, that it had.

    What was not there before, such as a measurement of ``optax.monitor``, stays.
    """
    olds = dict(jax.tree.leaves_with_path(state, is_leaf=_is_node))

    def stored(path, new):
        old = olds.get(path)
        if is_coded(old):
            return encoded(old, new)
        # Optax makes integers of an integer leaf's moments at the beginning alone.
        if isinstance(old, jax.Array) and isinstance(new, jax.Array):
            return new.astype(old.dtype)
        return new

    return jax.tree_util.tree_map_with_path(stored, new_state, is_leaf=_is_node)


def _is_node(node: Any) -> bool:
    return is_stored(node) or is_box(node)
