"""Gradients with the shapes of LLaMA's block matrices and a decaying spectrum."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

import lowrank_optax

# d, f, layers
SIZES = {"60m": (512, 1376, 8), "1b-one-layer": (2048, 5461, 1)}


def block_gradients(size: str, seed: int = 0) -> dict[str, jax.Array]:
    """Returns stacked gradients (layers, n, m) of one model's block matrices.

    Singular values fall roughly as i^-1 over a floor of noise. A plain Gaussian matrix
    has a flat spectrum, the easiest case for orthonormalisation.
    """
    d, f, layers = SIZES[size]
    shapes = dict.fromkeys(("query", "key", "value", "output"), (d, d))
    shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: _gradient(key, layers, *shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _gradient(key: jax.Array, layers: int, n: int, m: int) -> jax.Array:
    left, right, noise = jax.random.split(key, 3)
    count = min(n, m)
    decay = 1 / jnp.arange(1, count + 1)
    u = jax.random.normal(left, (layers, n, count)) / n**0.5
    v = jax.random.normal(right, (layers, count, m)) / m**0.5
    floor = jax.random.normal(noise, (layers, n, m)) / (100 * max(n, m) ** 0.5)
    return (u * decay) @ v + floor


def unstacked(stacked: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
    """Returns each stack as a list of matrices: optax.contrib.galore skips stacks."""
    return {name: list(stack) for name, stack in stacked.items()}


def ours(
    rank: int, side: Literal["short", "long"] = "short", power_iterations: float = 0.5
) -> optax.GradientTransformation:
    """Returns Adam in the range finder's subspace, due at the first update."""
    return lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        rank,
        basis=lowrank_optax.range_finder(power_iterations=power_iterations),
        refresh=lowrank_optax.every(10**6, stagger=False),
        side=side,
    )


def theirs(rank: int) -> optax.GradientTransformation:
    """Returns optax.contrib's GaLore around the same Adam."""
    return optax.contrib.scale_by_galore(rank, update_proj_gap=10**6)
