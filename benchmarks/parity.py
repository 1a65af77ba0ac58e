r"""Compares updates of LDAdam, Fira, APOLLO and GaLore with the authors' code.

Both get the same gradients, float32 on the CPU. Get the authors' code and PyTorch::

    mkdir authors && cd authors
    git clone https://github.com/jiaweizzhao/GaLore
    git clone https://github.com/xichen-fy/Fira
    git clone https://github.com/zhuhanqing/APOLLO
    git clone https://github.com/IST-DASLab/LDAdam
    pip install torch
    python -m benchmarks.parity --authors authors

For every method and setting, the command prints the relative norm of the difference of
two updates: its maximum and its mean over all steps and shapes. The command also writes
``results/parity.json``. "old" is the library's method before this comparison. With
moments that stay as they are when the basis changes, an update depends on the arbitrary
signs of singular vectors, or on PyTorch's random numbers. In the setting "their bases"
the library's method gets the authors' bases.

``--stored FILE`` also writes the authors' updates of one small matrix.
``tests/test_parity.py`` compares the library with these numbers, without PyTorch.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax
from benchmarks import authors, harness

SHAPES = {"tall": (48, 32), "wide": (32, 48), "square": (40, 40)}
STEPS, GAP, RANK = 60, 20, 8


def gradients(shape: tuple[int, int], steps: int = STEPS, size: float = 1.0):
    """Returns (steps, n, m) with a decaying spectrum, turning vectors and noise.

    Args:
        shape: (n, m).
        steps: Number of gradients.
        size: Root mean square of an entry.
    """
    rng = np.random.default_rng(sum(shape))
    n, m = shape
    k = min(n, m)
    turning = rng.normal(size=(2, n, k)), rng.normal(size=(2, m, k))
    found = []
    for step in range(steps):
        angle = step / 25
        u, v = (np.cos(angle) * a + np.sin(angle) * b for a, b in turning)
        signal = (u * 0.7 ** np.arange(k)) @ v.T
        found.append(signal + 0.3 * rng.normal(size=shape))
    found = np.asarray(found)
    return (size * found / np.sqrt(np.mean(found**2))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Given:
    """A basis rule with stored bases for some gradients.

    Attributes:
        gradients: Oriented, the projected side last; (steps, a, b).
        bases: (steps, b, r).
    """

    gradients: Any
    bases: Any

    def compute(self, matrix, previous, seeds):
        """Returns the basis of the stored gradient nearest to this matrix."""
        del previous, seeds
        apart = jnp.sum((jnp.asarray(self.gradients) - matrix) ** 2, axis=(-1, -2))
        return jnp.asarray(self.bases)[jnp.argmin(apart)]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        name: Name of the authors' optimizer in :data:`benchmarks.authors.MODULES`.
        group: Entries of the authors' parameter group.
        options: Options of the authors' optimizer.
        ours: Setting -> (basis rule with the authors' bases -> transformation).
        size: Root mean square of the gradients' entries.
        turned: Whether the authors project the rows of a square matrix. The library
            projects columns, and then gets the transposed matrix.
    """

    name: str
    group: Mapping[str, Any]
    options: Mapping[str, Any]
    ours: Mapping[str, Callable[[Given], optax.GradientTransformation]]
    size: float = 1.0
    turned: bool = False


def our_updates(transformation: optax.GradientTransformation, grads) -> np.ndarray:
    """Returns the updates of every step."""
    update = jax.jit(transformation.update)
    state, updates = transformation.init(jnp.zeros(grads.shape[1:])), []
    for gradient in grads:
        new, state = update(jnp.asarray(gradient), state)
        updates.append(np.asarray(new))
    return np.asarray(updates)


def apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Returns ||ours - theirs|| / ||theirs|| of every step."""
    axes = (-1, -2)
    return np.linalg.norm(ours - theirs, axis=axes) / np.linalg.norm(theirs, axis=axes)


def compared(checkouts: Path, line: Comparison) -> dict[str, dict[str, float]]:
    """Returns the differences of every setting, over all shapes and steps."""
    found: dict[str, list] = {name: [] for name in line.ours}
    for shape in SHAPES.values():
        grads = gradients(shape, size=line.size)
        theirs = authors.run(
            checkouts, line.name, grads, dict(line.group), **line.options
        )
        expected = theirs.updates
        if line.turned and shape[0] == shape[1]:
            grads, expected = grads.swapaxes(-1, -2), expected.swapaxes(-1, -2)
        oriented = grads if shape[0] >= shape[1] else grads.swapaxes(-1, -2)
        given = Given(oriented, theirs.bases)
        for name, make in line.ours.items():
            found[name].append(apart(our_updates(make(given), grads), expected))
    return {
        name: {
            "first": float(np.max([each[0] for each in runs])),
            "most": float(np.max(runs)),
            "mean": float(np.mean(runs)),
        }
        for name, runs in found.items()
    }


def lines() -> dict[str, Comparison]:
    """Returns all comparisons by name."""
    basis = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std"}
    galore = {**basis, "scale": 0.25}
    apollo = {**basis, "proj": "random", "scale_type": "channel", "scale": 1}
    mini = {**apollo, "rank": 1, "scale_type": "tensor", "scale": 128}
    tracking = {"enable_lowrank": True, "rank": RANK}
    adam = {"lr": 1.0, "no_deprecation_warning": True}
    without = {"lr": 1.0, "rank": RANK, "error_feedback": False}
    found = {
        "ldadam, no error feedback": Comparison(
            "ldadam", tracking, without, _LDADAM, turned=True
        ),
        "ldadam, error feedback": Comparison(
            "ldadam",
            tracking,
            {**without, "error_feedback": True},
            {"new, exact SVD first": _LDADAM["new, exact SVD first"]},
            turned=True,
        ),
        "fira, alpha 0.25": Comparison("fira", {**basis, "alpha": 0.25}, adam, _FIRA),
        "fira, alpha 1": Comparison(
            "fira",
            {**basis, "alpha": 1.0},
            adam,
            {
                "old, their bases": lambda given: _old_fira(given, 1.0),
                "new, their bases": _fira(scale=1.0),
                "new, their bases, corrected": _fira(scale=1.0, corrected=True),
                'new, their bases, rebase="square"': _fira(scale=1.0, rebase="square"),
            },
        ),
        "apollo": Comparison("apollo", apollo, adam, _APOLLO),
        "apollo, no limiter": Comparison(
            "apollo",
            apollo,
            {**adam, "disable_nl": True},
            {"new, their bases": _apollo(growth=1e9)},
        ),
        "apollo-mini": Comparison("apollo", mini, adam, {"new, their bases": _mini}),
        "apollo-mini, scale_front": Comparison(
            "apollo", mini, {**adam, "scale_front": True}, {"new, their bases": _mini}
        ),
        "galore": Comparison("galore", galore, adam, _GALORE),
    }
    for size in (1e-3, 1e-5):
        for name, group, place in (
            ("galore", galore, _galore),
            ("fira", {**basis, "alpha": 0.25}, _fira),
            ("apollo", apollo, _apollo),
        ):
            settings = {
                "old eps, 1e-8": place(eps=1e-8),
                "new eps, 1e-6": place(),
                "raw_eps": place(raw_eps=True),
            }
            found[f"{name}, entries of {size:g}"] = Comparison(
                name, group, adam, settings, size
            )
    return found


def _old_ldadam(given: Given) -> optax.GradientTransformation:
    """An ordered basis of the gradient alone, Adam's decays, a mean not corrected."""
    del given

    def first(moment, r):
        return moment @ r

    def second(nu, mu, r, count):
        correction = 1 - 0.999 ** jnp.maximum(count, 1)
        variance = (nu / correction - mu**2) @ r**2
        return correction * jnp.abs(variance + (mu @ r) ** 2)

    return lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        RANK,
        basis=lowrank_optax.range_finder(0, 0.5, warm_start=True),
        refresh=lowrank_optax.every(1),
        rebase=lowrank_optax.RebaseRule(first, second),
    )


def _ldadam(**options: Any) -> Callable[[Given], optax.GradientTransformation]:
    return lambda given: lowrank_optax.scale_by_ldadam(RANK, **options)


SVD = lowrank_optax.exact_svd()
_LDADAM = {
    "old": _old_ldadam,
    "new": _ldadam(),
    "new, exact SVD first": _ldadam(start=SVD),
    "new, exact SVD first, rho 0": _ldadam(start=SVD, rho=0.0),
    "new, exact SVD first, decays of Adam": _ldadam(start=SVD, b1=0.9, b2=0.999),
}


def _old_fira(basis: Any, scale: float = 0.25) -> optax.GradientTransformation:
    """The old Fira: the scale on the whole update, G - R P^T, and re-based moments."""
    return lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        RANK,
        basis=basis,
        refresh=lowrank_optax.every(GAP),
        residual=lowrank_optax.scaled_residual(),
        scale=scale,
    )


def _fira(**options: Any) -> Callable[[Given], optax.GradientTransformation]:
    return lambda given: lowrank_optax.scale_by_fira(
        RANK, GAP, **{"basis": given, **options}
    )


_FIRA = {
    "old": lambda given: _old_fira(lowrank_optax.range_finder(power_iterations=1)),
    "old, their bases": _old_fira,
    "new": _fira(basis=None),
    "new, exact SVD": _fira(basis=SVD),
    "new, their bases": _fira(),
    "new, their bases, raw_eps": _fira(raw_eps=True),
    "new, their bases, taken=1": _fira(taken=1.0),
    "new, their bases, corrected": _fira(corrected=True),
    'new, their bases, rebase="square"': _fira(rebase="square"),
}


def _apollo(**options: Any) -> Callable[[Given], optax.GradientTransformation]:
    return lambda given: lowrank_optax.scale_by_apollo(
        RANK, GAP, **{"basis": given, **options}
    )


def _mini(given: Given) -> optax.GradientTransformation:
    return lowrank_optax.scale_by_apollo(
        1, GAP, 128**0.5, by_matrix=True, basis=given, raw_eps=True
    )


_APOLLO = {
    "old, their bases": _apollo(corrected=True, eps=1e-8),
    "new": _apollo(basis=None),
    "new, their bases": _apollo(),
    "new, their bases, raw_eps": _apollo(raw_eps=True),
    "new, their bases, corrected": _apollo(corrected=True),
}


def _galore(**options: Any) -> Callable[[Given], optax.GradientTransformation]:
    return lambda given: lowrank_optax.scale_by_galore(
        RANK, GAP, **{"basis": given, **options}
    )


_GALORE = {
    "old, their bases": _galore(eps=1e-8),
    "new": _galore(basis=None),
    "new, their bases": _galore(),
    "new, their bases, raw_eps": _galore(raw_eps=True),
}


def stored(checkouts: Path) -> dict[str, Any]:
    """Returns gradients with the authors' updates and bases, in few digits."""
    basis = {"rank": 2, "update_proj_gap": 3, "proj_type": "std"}
    apollo = {**basis, "proj": "random", "scale_type": "channel", "scale": 1}
    tensor = {**apollo, "rank": 1, "scale_type": "tensor", "scale": 128}
    tracking = {"lr": 1.0, "rank": 2, "error_feedback": False}
    cases = {
        "galore": ("galore", {**basis, "scale": 0.25}, {"lr": 1.0}),
        "fira": ("fira", {**basis, "alpha": 0.25}, {"lr": 1.0}),
        "apollo": ("apollo", apollo, {"lr": 1.0}),
        "apollo by matrix": ("apollo", tensor, {"lr": 1.0}),
        "ldadam": ("ldadam", {"enable_lowrank": True, "rank": 2}, tracking),
    }
    grads = np.round(gradients((6, 4), steps=7), 3)

    def short(array):
        return [float(f"{value:.6g}") for value in array.ravel()]

    found: dict[str, Any] = {"gradients": short(grads), "shape": grads.shape}
    for name, (method, group, options) in cases.items():
        run = authors.run(checkouts, method, grads, group, **options)
        found[name] = {
            "updates": short(run.updates),
            "bases": short(run.bases),
            "rank": run.bases.shape[-1],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--authors", type=Path, required=True, help="the checkouts")
    parser.add_argument("--stored", type=Path, help="write updates of theirs for tests")
    arguments = parser.parse_args()
    if arguments.stored is not None:
        arguments.stored.write_text(json.dumps(stored(arguments.authors)) + "\n")
    measurements = {}
    for name, line in lines().items():
        measurements[name] = compared(arguments.authors, line)
        for setting, values in measurements[name].items():
            each = ", ".join(f"{key} {value:.1e}" for key, value in values.items())
            print(f"{name:28} {setting:36} {each}", flush=True)
    record = {"environment": harness.environment(), "measurements": measurements}
    path = harness.RESULTS / "parity.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
