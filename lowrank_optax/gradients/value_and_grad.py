"""Gradients inside the subspaces: no full gradient of a projected leaf exists."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.gradients.variants import SubspaceValueAndGrad


def subspace_value_and_grad(
    function: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    has_aux: bool = False,
    full_gradients: tuple[str, ...] = (),
) -> SubspaceValueAndGrad:
    r"""As ``jax.value_and_grad``, but projected leaves get gradients in their subspace.

    Take y = x W with T rows, the gradient dy of y, and the gradient G = x^T dy of W
    (n, m). For a basis P of the columns of W, G P = x^T (dy P). For a basis P of the
    rows, P^T G = (x P)^T dy. The program never forms G: T r (n + m) multiplications
    take the place of T n m. For a basis of the rows the backward pass keeps x P in the
    place of x. Data-parallel devices reduce (a + b) r numbers at most.
    ``optimizer.update`` takes the projected gradients as they are.

    The function is traced over the parameters, as ``jax.jit`` does, and the traced
    program is evaluated with other products. The model stays as it is. All other
    arguments reach the function untouched: arrays, flags, functions, random keys.

    Each parameter is followed through the program to its products and lookups. On the
    way there may be casts, shardings, moves of axes, slices, concatenation, sums,
    scans, checkpoints, conditionals, jitted functions, and products with a number or
    with a vector along one side. The products may be with another parameter or with
    activations (``dot_general``, ``ragged_dot``). A stack axis may be a batch axis, a
    free axis, or summed over, by a sum or together with a side. An array that scales a
    parameter gets its gradient too, and so does an added array. A parameter with
    several uses (tied, for instance) gets the sum of the gradients.

    Some uses form one array of full size in the backward pass and project it at once:

    - norms and penalties, which reduce a function of each entry, as in
      d sum(W^2) / dW = 2 W;
    - looked-up rows, and activations plus a parameter: these gradients exist anyway.

    Other uses raise an error. The error names the leaf, the operation and ways out:

    - a product with a function of each entry, as x @ tanh(W);
    - a function of a whole matrix, as a convolution or a decomposition;
    - a reshape across both sides of a matrix;
    - a slice of an axis that granularity divides;
    - a product with matrices other than those of ``dimension_numbers``;
    - a scan with a parameter as carry, or a conditional with a parameter as result;
    - ``shard_map``, and functions with a derivative of their own (``custom_vjp``).

    A computed basis is renewed from sketches, which ``.sketching`` computes in the same
    pass, or from full gradients: where ``.refresh_due`` is true, call ``.full``, which
    returns the same three values. A random basis needs neither. An update with
    projected gradients never renews a computed basis; a renewal that is some updates
    late does no harm.
    :func:`lowrank_optax.train_step` does all this in a loop. By hand::

        gradient = subspace_value_and_grad(loss_fn, optimizer)

        @jax.jit
        def step(params, state, batch):
            loss, grads, state = gradient(params, state, batch)
            updates, state = optimizer.update(grads, state, params, refresh=False)
            return optax.apply_updates(params, updates), state, loss

        # gradient.full(params, state, batch) and refresh=True: refresh_step
        due = jax.jit(gradient.refresh_due)
        for batch in batches:
            run = refresh_step if due(params, state) else step
            params, state, loss = run(params, state, batch)

    Norms, and clipping by norms, see the projected gradients. For orthonormal bases
    these norms are at most those of the full gradients. Sums over the batch are in
    float32 or wider. P is rounded to the dtype of the array that it multiplies. Reverse
    mode only.

    Args:
        function: (params, \*args, \*\*kwargs) -> scalar, or (scalar, aux).
        optimizer: Any Optax transformation that contains low-rank transformations.
        has_aux: Whether the function returns aux too.
        full_gradients: Key paths, as ``jax.tree_util.keystr`` writes them, of projected
            leaves that get full gradients. List leaves here if their uses raise errors.

    Returns:
        A function (params, state, \*args, \*\*kwargs) -> (value, gradients, state).
        ``value`` is (scalar, aux) with ``has_aux``. ``gradients`` is a tree like the
        parameters; a projected leaf has a :class:`lowrank_optax.Projected` of shape
        (*stack, a*c, r). ``state`` holds new random bases where they were due: give
        this state to ``update``.

    Raises:
        ValueError: When called, if no leaf is projected, if the state was made for
            other parameters, or if an operation has no projected gradient. The message
            names the leaf and the operation.

    Example:
        >>> import jax.numpy as jnp
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16)), "b": jnp.ones(16)}
        >>> optimizer = lowrank_optax.galore(1e-2, rank=2)
        >>> gradient = subspace_value_and_grad(
        ...     lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2), optimizer
        ... )
        >>> _, grads, _ = gradient(params, optimizer.init(params), jnp.ones((8, 64)))
        >>> grads["w"].coordinates.shape, grads["b"].shape
        ((64, 2), (16,))
    """
    return SubspaceValueAndGrad(function, optimizer, has_aux, full_gradients)
