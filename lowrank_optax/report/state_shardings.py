"""``state_shardings``: the shardings of an optimizer's state, from its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_optax.matrix.arrays import leaf_name, struct_of
from lowrank_optax.matrix.boxes import contents, is_box, names_of, with_contents
from lowrank_optax.matrix.sharding import named_sharding


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    """Returns the sharding of each array of an optimizer's state.

    A basis has the sharding of its parameter's projected axes, a moment in a subspace
    that of the kept axes, a number per matrix that of the stack axes. No array is
    sharded over its columns. An array at full size has its parameter's sharding. An
    array without a parameter is replicated. The optimizer's own ``init`` runs on
    shapes: nothing is allocated.

    Outside ``jax.jit``, ``optimizer.init(params)`` makes the arrays of parameters with
    these shardings. Under automatic axes, arrays without a parameter, such as counters,
    are on one device: ``jax.device_put(state, state_shardings(optimizer, params))``
    places them, so that the second update is not compiled anew. Inside ``jax.jit``
    automatic shardings are unknown, so give them to the jit. ::

        init = jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))
        state = init(params)

        # flax.training.train_state.TrainState
        def create(params):
            return TrainState.create(apply_fn=apply, params=params, tx=optimizer)

        shardings = jax.eval_shape(create, params).replace(
            step=NamedSharding(mesh, PartitionSpec()),
            params=jax.tree.map(lambda x: x.sharding, params),
            opt_state=state_shardings(optimizer, params),
        )
        state = jax.jit(create, out_shardings=shardings)(params)

        # Trainers with logical names (MaxText): the boxes of the state have them too.
        names = nn.get_partition_spec(jax.eval_shape(create, boxed_params))
        shardings = nn.logical_to_mesh_sharding(names, mesh, rules)
        # Or, where they are unboxed: shapes, with the shardings of the parameters.
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(init_params), param_shardings)
        shardings = state_shardings(optimizer, shapes)

        # flax.nnx.Optimizer: names do, nnx.get_partition_spec(nnx.state(optimizer)).
        # Without names, where model and optimizer are made inside jit:
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        state = nnx.as_pure(optimizer.opt_state)
        state = jax.device_put(state, state_shardings(optimizer.tx, params))
        nnx.update(optimizer.opt_state, nnx.state(state))

    Do not use ``optax.tree.map_params(optimizer, f, state, specs)`` for shardings.
    optax's function gives each array the partition of its parameter, even if the array
    has other axes. The function raises a ValueError ("pytree structure error") at a
    :class:`lowrank_optax.Subspace`, a node of several arrays, and at the
    ``optax.MaskedNode`` of a leaf at full size. With both types in ``is_leaf``, f gets
    these nodes.

    Args:
        optimizer: Any Optax transformation, with low-rank ones anywhere inside.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``. A leaf has a
            ``NamedSharding``, or is a Flax box with names of mesh axes. Any other leaf
            counts as replicated.
        mesh: Mesh; None: the mesh of the parameters.

    Returns:
        A tree like ``optimizer.init(params)``, of ``jax.sharding.NamedSharding``.

    Raises:
        TypeError: If a leaf has no shape: partitions alone do not decide the
            projections.
        ValueError: If there is no mesh, if there are several meshes, or if a name is
            not an axis of the mesh.

    Example:
        >>> import jax.numpy as jnp, lowrank_optax
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
        >>> w = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding)
        >>> found = state_shardings(lowrank_optax.galore(1e-2, rank=4), {"w": w})[0]
        >>> found.subspaces["w"].basis.spec  # (16, 4): the columns are projected
        P('model', None)
        >>> found.inner_state.mu["w"].spec  # (64, 4)
        P('data', None)
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_box)
    for path, leaf in leaves:
        if not hasattr(contents(leaf), "shape"):
            raise TypeError(
                f"{leaf_name(path)} is {contents(leaf)!r}, which has no "
                "shape; give jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
            )
    known = [found.mesh for _, leaf in leaves if (found := named_sharding(leaf))]
    meshes = dict.fromkeys(known if mesh is None else [mesh, *known])
    if len(meshes) != 1:
        raise ValueError(
            f"the parameters lie on {len(known) and len(meshes)} meshes; give leaves "
            "with a NamedSharding on one mesh, or names and mesh=..."
        )
    (mesh,) = meshes

    def with_sharding(path, leaf):
        known = named_sharding(leaf)
        spec = _spec_of_names(path, leaf, mesh) if known is None else known.spec
        return with_contents(leaf, struct_of(contents(leaf), NamedSharding(mesh, spec)))

    shapes = jax.tree_util.tree_map_with_path(with_sharding, params, is_leaf=is_box)
    state = sharded_state(optimizer, shapes, mesh)
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), state)


def _spec_of_names(path: tuple, leaf: Any, mesh: Any) -> PartitionSpec:
    spec = PartitionSpec(*names_of(leaf))
    named = [x for part in spec for x in (part if isinstance(part, tuple) else (part,))]
    unknown = [x for x in named if x is not None and x not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"{leaf_name(path)}: {', '.join(map(repr, unknown))} is no axis "
            f"of the mesh, which has {', '.join(map(repr, mesh.axis_names))}; give "
            "leaves with a NamedSharding, or let Flax translate the state's own names."
        )
    return spec


def sharded_state(
    optimizer: optax.GradientTransformation, shapes: Any, mesh: Mesh | AbstractMesh
) -> Any:
    """Returns the shapes of an optimizer's state, with shardings.

    Args:
        optimizer: Any Optax transformation.
        shapes: Shapes of the parameters, each with a NamedSharding on the mesh.
        mesh: The mesh. All its axes count as explicit, because tracers have shardings
            over explicit axes only.
    """
    explicit = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )
    shapes = jax.tree.map(
        lambda x: struct_of(x, NamedSharding(explicit, x.sharding.spec)), shapes
    )
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(lambda p: optimizer.init(p), shapes)
    everywhere = NamedSharding(explicit, PartitionSpec())
    return jax.tree.map(lambda x: struct_of(x, x.sharding or everywhere), state)
