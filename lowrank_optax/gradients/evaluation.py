"""The value of a function, its gradients inside subspaces, and sketches of these."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lowrank_optax.gradients.leaves import ProjectedLeaf
from lowrank_optax.gradients.program import evaluate
from lowrank_optax.gradients.traced import traced
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.projected import Sketch


class Evaluated(NamedTuple):
    """What :func:`evaluated` returns.

    Attributes:
        value: Scalar, or (scalar, aux).
        gradients: Tree like the parameters, :class:`Projected` where a leaf is.
        sketches: Key path -> sketch, of the leaves with a test matrix.
    """

    value: Any
    gradients: Any
    sketches: dict[str, Sketch]


def evaluated(
    function: Callable[..., Any],
    has_aux: bool,
    projected: Mapping[tuple, ProjectedLeaf],
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Evaluated:
    """Returns value, gradients and sketches.

    Args:
        function: (params, ...) -> scalar, or (scalar, aux).
        has_aux: Whether the function returns aux too.
        projected: The projected leaves by key path.
        params: The parameters.
        args: Other positional arguments of the function.
        kwargs: Keyword arguments of the function.
    """
    leaves, treedef = leaves_by_path(params).items(), jax.tree.structure(params)
    program, aux_of = traced(function, has_aux, params, args, kwargs)
    inside = [(projected[path], x) for path, x in leaves if path in projected]

    def merged(narrow, plain):
        """Returns the leaves of two lists in the order of the parameters."""
        sources = iter(plain), iter(narrow)
        return [next(sources[path in projected]) for path, _ in leaves]

    def of(arrays, plain):
        followed = [
            one.follow(leaf, found)
            for (one, leaf), found in zip(inside, arrays, strict=True)
        ]
        value, *others = evaluate(program, merged(followed, plain))
        return value, others

    zeros = [one.zeros(leaf) for one, leaf in inside]
    plain = [leaf for path, leaf in leaves if path not in projected]
    gradient = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
    (value, aux), (narrow, full) = gradient(zeros, plain)
    gradients, sketches = [], {}
    for (one, leaf), found in zip(inside, narrow, strict=True):
        gradients.append(one.public(leaf, found))
        sketch = one.sketch(leaf, found)
        if sketch is not None:
            sketches[leaf_name(one.projector.path)] = sketch
    aux = aux_of(aux)
    return Evaluated(
        (value, aux) if has_aux else value,
        treedef.unflatten(merged(gradients, full)),
        sketches,
    )
