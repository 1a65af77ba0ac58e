"""The axes of stacked layers in each leaf, where a model scans over its layers."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.names import (
    InAttention,
    Kind,
    Leaf,
    in_attention,
    is_attention,
    is_convolution,
    is_norm,
    is_of_experts,
    is_of_layers,
    stack_axes_by_name,
)

ScanAxis = int | Mapping[str, int]
"""The axis of stacked layers in every leaf under a name like layers, blocks, stack or
scan; or {regular expression: axis} for the leaves whose key path matches."""


class Modules:
    """The leaves of a tree, by module.

    Attributes:
        leaves: All leaves.
        inside: Module -> the leaves inside it, at any depth.
    """

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = leaves
        self.inside: dict[tuple[str, ...], list[Leaf]] = defaultdict(list)
        kernels: dict[tuple[str, ...], list[tuple[Leaf, InAttention]]]
        kernels = defaultdict(list)
        for leaf in leaves:
            for module in leaf.containers:
                self.inside[module].append(leaf)
            if found := in_attention(leaf):
                kernels[found.module].append((leaf, found))
        self._attentions = {
            module: members
            for module, members in kernels.items()
            if is_attention(module, (kernel.kind for _, kernel in members))
        }

    def attention(self, leaf: Leaf) -> InAttention | None:
        """Returns the attention kernel that a leaf is, or None."""
        found = in_attention(leaf)
        return found if found and found.module in self._attentions else None

    def kernels(
        self, module: tuple[str, ...], kind: Kind
    ) -> list[tuple[Leaf, InAttention]]:
        """Returns the kernels of one kind in an attention."""
        return [(leaf, x) for leaf, x in self._attentions[module] if x.kind == kind]

    def has_heads(self, leaf: Leaf, kernel: InAttention) -> bool:
        """Returns whether an attention kernel has an axis of heads, judged by shapes.

        A kernel (d, heads, width) must be told from layers (layers, d, heads x width).
        In the former d is the length of the attention's output, or at least the width
        of a head.
        """
        shape = leaf.shape
        if kernel.kind == "fused" or kernel.heads_first or len(shape) > 3:
            return len(shape) > 2
        if len(shape) < 3:
            return False
        queries = self.kernels(kernel.module, "in")
        if kernel.kind == "out" and queries:
            return any(self.has_heads(*query) for query in queries)
        if kernel.kind == "out":
            return shape[-2] < shape[-1]
        return shape[0] >= shape[-1] or shape[0] in self.returned(kernel.module)

    def returned(self, module: tuple[str, ...]) -> set[int]:
        """Returns the lengths that an attention's output may have."""
        outputs = self.kernels(module, "out")
        return {leaf.shape[-1] for leaf, _ in outputs if leaf.shape}


def stack_axes(
    modules: Modules, scan_axis: ScanAxis | None = None
) -> dict[tuple, tuple[int, ...]]:
    """Returns the axes of stacked layers of each leaf, by its key path.

    The names of axes or ``scan_axis`` give the layer axis. Otherwise shapes show the
    axis: in a scanned module it has the same length in all leaves. A stacked norm has
    one axis more than a vector. Without norms, all matrices must agree.

    Raises:
        ValueError: If ``scan_axis`` cannot be the axis of stacked layers.
    """
    said = _said(modules.leaves, scan_axis)
    shown: dict[tuple[str, ...], tuple[int, ...]] = {}
    for module in sorted(modules.inside, key=len):
        outer = next((m for m in shown if module[: len(m)] == m), None)
        if outer is None and (found := _shown(modules.inside[module], modules)):
            shown[module] = found

    def axes(leaf):
        if leaf.axes:
            return stack_axes_by_name(leaf)
        if leaf.path in said:
            return (said[leaf.path],)
        return next((shown[m] for m in leaf.containers if m in shown), ())

    return {leaf.path: axes(leaf) for leaf in modules.leaves}


def _shown(group: Sequence[Leaf], modules: Modules) -> tuple[int, ...]:
    """Returns the layer axes that the shapes in a module show, () if none."""
    fewest = min(len(leaf.shape) for leaf in group)
    shared = tuple(
        axis for axis in range(fewest) if len({leaf.shape[axis] for leaf in group}) == 1
    )
    norms = [len(leaf.shape) for leaf in group if is_norm(leaf)]
    if norms:
        if len(group) == len(norms) or min(norms) < 2:
            return ()
        if len(shared) == min(norms):
            # All leaves share all axes of a norm. The longest one is the norm's vector.
            longest = max(shared, key=lambda axis: group[0].shape[axis])
            shared = tuple(axis for axis in shared if axis != longest)
        return shared if len(shared) == min(norms) - 1 else ()
    if len(shared) != 1 or not all(_may_be_layers(x, *shared, modules) for x in group):
        return ()
    return shared


def _may_be_layers(leaf: Leaf, axis: int, modules: Modules) -> bool:
    """Returns whether an axis of a leaf may be an axis of layers, by its position."""
    if axis > 1 or is_convolution(leaf):
        return False
    kernel = modules.attention(leaf)
    if kernel and modules.has_heads(leaf, kernel):
        return len(leaf.shape) > (4 if kernel.kind == "fused" else 3)
    if is_of_experts(leaf):
        return len(leaf.shape) > 3
    # An axis between the sides of a matrix is of layers only if it is the shortest.
    return len(leaf.shape) > 2 and (axis == 0 or leaf.shape[1] <= min(leaf.shape))


def _said(leaves: Iterable[Leaf], scan_axis: ScanAxis | None) -> dict[tuple, int]:
    """Returns the layer axis of each leaf that ``scan_axis`` names, by key path."""
    if scan_axis is None:
        return {}
    found: dict[tuple, int] = {}
    by_pattern = scan_axis if isinstance(scan_axis, Mapping) else {"": scan_axis}
    for pattern, axis in by_pattern.items():
        of_pattern: dict[int, str] = {}
        for leaf in leaves:
            name = leaf_name(leaf.path)
            if not (re.search(pattern, name) if pattern else is_of_layers(leaf)):
                continue
            ndim = len(leaf.shape)
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"scan_axis {axis}: {name} has {ndim} axes; give scan_axis by key "
                    "path, {regular expression: axis}, of the stacked layers alone."
                )
            found[leaf.path] = axis % ndim
            of_pattern.setdefault(leaf.shape[axis], name)
        if len(of_pattern) > 1:
            (length, name), (other, second) = list(of_pattern.items())[:2]
            raise ValueError(
                f"scan_axis {axis}: {name} has {length} layers there, {second} has "
                f"{other}; give scan_axis by key path, {{regular expression: axis}}."
            )
        if not of_pattern:
            raise ValueError(
                f"scan_axis {axis}: no leaf's key path has "
                + (f"{pattern!r}." if pattern else "a word like layers or blocks.")
            )
    return found
