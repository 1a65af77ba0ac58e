"""The adapter of a fine-tuned model, and what it leaves out."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np

import lowrank_optax
from experiments.errors import UserError
from experiments.model.adapters import check_adapter_rank
from experiments.model.peft import WHOLE


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The adapter of a fine-tuned model; ``str`` gives a table.

    Attributes:
        params: Parameters with adapters, of scale 1: the pre-trained model's, with the
            tuned classifier and pooler in their place.
        ranks: Path of a block matrix -> rank of each layer, int32 (*stack,).
        errors: Path of a block matrix -> ||D - A B|| / ||D|| of each layer, where D is
            the change of the matrix.
        left_out: Paths of the parameters that changed and are not in the adapter.
        adapter_bytes: Bytes of the adapter, with the classifier and the pooler.
        weight_bytes: Bytes of all parameters of the model.
    """

    params: Any
    ranks: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    left_out: tuple[str, ...]
    adapter_bytes: int
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the parameters, for JSON."""
        return {
            "ranks": {name: ranks.tolist() for name, ranks in self.ranks.items()},
            "errors": {name: errors.tolist() for name, errors in self.errors.items()},
            "left_out": list(self.left_out),
            "adapter_bytes": self.adapter_bytes,
            "weight_bytes": self.weight_bytes,
        }

    def __str__(self) -> str:
        rows = [("matrix", "rank", "relative error")]
        for name, ranks in self.ranks.items():
            rows.append((name, _span(ranks, "d"), _span(self.errors[name], ".3f")))
        wide, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [
            f"{name.ljust(wide)}  {ranks.rjust(middle)}  {errors}"
            for name, ranks, errors in rows
        ]
        share = self.adapter_bytes / self.weight_bytes
        lines.append(
            f"adapter {self.adapter_bytes / 1e6:.2f} MB, {share:.1%} of the model's "
            f"{self.weight_bytes / 1e6:.2f} MB"
        )
        if self.left_out:
            names = ", ".join(self.left_out)
            lines.append(f"changed, and not in the adapter: {names}")
        return "\n".join(lines)


def extract(
    tuned: Any,
    pretrained: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Extracted:
    """Returns the adapter of a fine-tuned model by truncated SVD.

    The block matrices get adapters, see :func:`lowrank_optax.extract_adapter`. The
    classifier and the pooler are kept as a whole, as PEFT does with new heads.

    Args:
        tuned: Parameters after fine-tuning, adapters merged.
        pretrained: Parameters before it.
        rank: Rank of every adapter, from 1 to the shorter side of every block matrix.
        energy: Instead of a rank: the share of ||D||^2 to keep, in (0, 1].

    Raises:
        UserError: If the rank or the energy is out of its range, or a change is not
            finite.
    """
    if rank is not None:
        check_adapter_rank(pretrained, rank)
    elif energy is not None and not 0 < energy <= 1:
        raise UserError(f"adapter: energy is {energy}; give a share in (0, 1]")
    whole = [name for name in WHOLE if name in pretrained]
    patterns: dict[str, Literal["frozen"]]
    patterns = {rf"^\['{name}'\]": "frozen" for name in whole}
    try:
        found = lowrank_optax.extract_adapter(
            tuned, pretrained, rank, energy, patterns=patterns
        )
    except ValueError as error:
        raise UserError(f"adapter: {error}") from error
    model = {**pretrained, **{name: tuned[name] for name in whole}}
    names = {
        jax.tree_util.keystr(path): _name(path)
        for path, _ in jax.tree.leaves_with_path(model)
    }
    adapters = {names[k]: factors._asdict() for k, factors in found.factors.items()}
    ranks = {names[k]: ranks for k, ranks in found.ranks.items()}
    return Extracted(
        params={"model": model, "adapters": adapters},
        ranks=ranks,
        errors={names[k]: errors for k, errors in found.errors.items()},
        left_out=left_out(tuned, pretrained, adapters),
        adapter_bytes=_bytes(model[name] for name in whole)
        + sum(
            int(ranks[name].sum()) * (x["down"].shape[-2] + x["up"].shape[-1]) * 4
            for name, x in adapters.items()
        ),
        weight_bytes=_bytes([pretrained]),
    )


def left_out(tuned: Any, pretrained: Any, adapters: Iterable[str]) -> tuple[str, ...]:
    """Returns the paths of parameters that changed and that an adapter lacks.

    Args:
        tuned: Parameters after fine-tuning, without adapters.
        pretrained: Parameters before it.
        adapters: Paths of the matrices that have adapters.
    """
    known, found = set(adapters), []
    pairs = zip(
        jax.tree.leaves_with_path(tuned), jax.tree.leaves(pretrained), strict=True
    )
    for (path, after), before in pairs:
        name = _name(path)
        is_saved = name in known or name.split(".")[0] in WHOLE
        if not is_saved and not np.array_equal(after, before):
            found.append(name)
    return tuple(found)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _span(values: np.ndarray, form: str) -> str:
    """Returns one number, or the smallest and the largest."""
    ends = [format(value, form) for value in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _bytes(trees: Iterable[Any]) -> int:
    return sum(leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree))
