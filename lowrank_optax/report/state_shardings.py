"""``state_shardings``: how an optimizer's state is sharded, from its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_optax.matrix.arrays import struct_of
from lowrank_optax.matrix.boxes import contents, is_box, names_of, with_contents
from lowrank_optax.matrix.sharding import named_sharding


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    """Returns the sharding of each array of an optimizer's state.

    A basis is sharded as the projected axes of its parameter, moments in a subspace as
    the others, what is per matrix as the stack; no array over its columns. An array at
    full size is sharded as its parameter, and what belongs to none is replicated. The
    optimizer's own ``init`` is asked, on shapes only: nothing is allocated.

    ``optimizer.init(params)`` of arrays gives a state sharded so already; inside
    ``jax.jit``, where automatic shardings are not known, it does not. ::

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

    It stands in the place of ``optax.tree.map_params(optimizer, f, state, specs)``:
    that gives each array the partition of its parameter, whatever its own axes are, and
    raises a ValueError ("pytree structure error") at a :class:`lowrank_optax.Subspace`,
    which is several arrays, and at the ``optax.MaskedNode`` of a leaf without one. With
    both named in its ``is_leaf``, f is given those.

    Args:
        optimizer: Any Optax transformation, low-rank ones anywhere inside.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``. A leaf has a
            ``NamedSharding``, or is a box of Flax with the names of axes of the mesh;
            one with neither counts as replicated.
        mesh: Mesh; None: that of the parameters.

    Returns:
        A tree like ``optimizer.init(params)`` of ``jax.sharding.NamedSharding``.

    Raises:
        TypeError: If a leaf has no shape: partitions alone do not say what is
            projected.
        ValueError: If there is no mesh, or more than one, or a name is none of its
            axes.

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
                f"{jax.tree_util.keystr(path)} is {contents(leaf)!r}, which has no "
                "shape; give jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
            )
    known = [found.mesh for _, leaf in leaves if (found := named_sharding(leaf))]
    meshes = dict.fromkeys(known if mesh is None else [mesh, *known])
    if len(meshes) != 1:
        raise ValueError(
            f"the parameters lie on {len(known) and len(meshes)} meshes; give leaves "
            "with a NamedSharding on one, or names and mesh=..."
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
            f"{jax.tree_util.keystr(path)}: {', '.join(map(repr, unknown))} is no axis "
            f"of the mesh, which has {', '.join(map(repr, mesh.axis_names))}; give "
            "leaves with a NamedSharding, or have Flax translate the state's own names."
        )
    return spec


def sharded_state(
    optimizer: optax.GradientTransformation, shapes: Any, mesh: Mesh | AbstractMesh
) -> Any:
    """Returns the shapes of an optimizer's state, with shardings.

    Args:
        optimizer: Any Optax transformation.
        shapes: Of the parameters, each with a NamedSharding on the mesh.
        mesh: Its axes count as explicit: tracers know the shardings of those only.
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
