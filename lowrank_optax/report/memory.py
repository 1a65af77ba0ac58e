"""The bytes of a run: of one parameter, of all parameters, and as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of one parameter, or of all parameters.

    Attributes:
        parameters: Bytes of the parameters.
        gradients: Bytes of the gradients, in the dtype of the parameters.
        subspace_gradients: The same, of a step that computes gradients inside the
            subspaces where the method allows it: (stack, a c, r) for a projected leaf,
            in float32 or wider.
        state: Bytes of the optimizer's state by kind: "basis", the fields of inner
            transformations ("mu", "nu", ...), "sums" of micro-batches, "scalars".
    """

    parameters: int
    gradients: int
    subspace_gradients: int
    state: Mapping[str, int]

    @property
    def optimizer(self) -> int:
        """Bytes of the whole optimizer state."""
        return sum(self.state.values())

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients and state."""
        return self.parameters + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class LeafMemory:
    """The memory of one parameter.

    Attributes:
        path: Key path, as ``jax.tree_util.keystr`` writes it.
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        projection: How the parameter is projected, or why it is not, in words.
        is_projected: Whether the parameter is projected.
        bytes: Bytes on all devices together, each array counted once.
        full_rank_bytes: Bytes of the state, if the parameter were not projected: no
            basis, and each moment as large as the parameter, in float32.
        per_device: Bytes on one device; None, if shardings are not known.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    projection: str
    is_projected: bool
    bytes: Bytes
    full_rank_bytes: int
    per_device: Bytes | None


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run; see :func:`memory_plan`. ``str`` gives a table.

    Attributes:
        leaves: One entry per parameter.
        other_bytes: Bytes of state without a parameter: counters.
        compiled: XLA's bytes of a compiled step: "arguments", "outputs", "aliased"
            (outputs in the memory of arguments), "temporaries", and "peak", the largest
            number of bytes in use at once. None, if no compiled step was given.
    """

    leaves: tuple[LeafMemory, ...]
    other_bytes: int
    compiled: Mapping[str, int] | None

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.bytes.parameters for leaf in self.leaves)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return sum(leaf.bytes.gradients for leaf in self.leaves)

    @property
    def subspace_gradient_bytes(self) -> int:
        """Bytes of all gradients, those inside the subspaces where methods allow it."""
        return sum(leaf.bytes.subspace_gradients for leaf in self.leaves)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of all arrays of the optimizer's state, exact to the byte."""
        return sum(leaf.bytes.optimizer for leaf in self.leaves) + self.other_bytes

    @property
    def full_rank_bytes(self) -> int:
        """Bytes of the state, if all moments were at full size, in float32 or wider."""
        return sum(leaf.full_rank_bytes for leaf in self.leaves) + self.other_bytes

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of the optimizer's state by kind."""
        total: dict[str, int] = {}
        for leaf in self.leaves:
            for field, size in leaf.bytes.state.items():
                total[field] = total.get(field, 0) + size
        total["scalars"] = total.get("scalars", 0) + self.other_bytes
        return total

    @property
    def bytes(self) -> Bytes:
        """All bytes on all devices together, each array counted once."""
        return Bytes(
            self.parameter_bytes,
            self.gradient_bytes,
            self.subspace_gradient_bytes,
            self.state_bytes,
        )

    @property
    def per_device(self) -> Bytes | None:
        """All bytes on one device; None, if shardings are not known."""
        parts = [leaf.per_device for leaf in self.leaves]
        if not all(parts):
            return None
        known = [part for part in parts if part is not None]
        state = {"scalars": self.other_bytes}
        for part in known:
            for field, size in part.state.items():
                state[field] = state.get(field, 0) + size
        return Bytes(
            sum(part.parameters for part in known),
            sum(part.gradients for part in known),
            sum(part.subspace_gradients for part in known),
            state,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dicts, lists, strings and ints, for JSON."""
        totals = {
            "parameter_bytes": self.parameter_bytes,
            "gradient_bytes": self.gradient_bytes,
            "subspace_gradient_bytes": self.subspace_gradient_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "full_rank_bytes": self.full_rank_bytes,
            "state_bytes": self.state_bytes,
        }
        per_device = self.per_device
        if per_device is not None:
            totals["per_device"] = dataclasses.asdict(per_device)
        return {**totals, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("leaf", "parameters", "gradients", "state", "full rank", "of it")
        ]
        for leaf in self.leaves:
            of_it = ", ".join(f"{k} {_text(v)}" for k, v in leaf.bytes.state.items())
            rows.append(
                (
                    leaf.projection,
                    _text(leaf.bytes.parameters),
                    _text(leaf.bytes.gradients),
                    _text(leaf.bytes.optimizer),
                    _text(leaf.full_rank_bytes),
                    of_it,
                )
            )
        of_it = ", ".join(f"{k} {_text(v)}" for k, v in self.state_bytes.items())
        sums = (self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes)
        rows.append(("in all", *map(_text, (*sums, self.full_rank_bytes)), of_it))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(x.rjust(w) for x, w in zip(row[1:5], widths[1:], strict=True)),
                    row[5],
                ]
            ).rstrip()
            for row in rows
        ]
        if self.per_device is not None:
            device = self.per_device
            lines.append(
                f"on each device: parameters {_text(device.parameters)}, gradients "
                f"{_text(device.gradients)}, state {_text(device.optimizer)}"
            )
        if self.compiled is not None:
            parts = (f"{name} {_text(size)}" for name, size in self.compiled.items())
            lines.append("compiled step: " + ", ".join(parts))
        return "\n".join(lines)


def _text(size: int) -> str:
    """Returns bytes with a unit of 1000, to three digits or more."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"
