"""What the axes of parameters mean: one table for LLaMA, encoder and adapters."""

import re
from typing import Any

import jax

# Path of a leaf -> names of its last axes. The axes before these stack layers.
# vocab: tokens. embed: the hidden size. heads: heads times their size. mlp: the inner
# size. None: anything that is small.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)(embedding|word)$", ("vocab", "embed")),
    (r"(^|/)(position|segment)$", (None, "embed")),
    (r"(^|/)head$", ("embed", "vocab")),
    (r"/(query|key|value)(/kernel)?$", ("embed", "heads")),
    (r"/output(/kernel)?$", ("heads", "embed")),
    (r"/(gate|up)(/kernel)?$", ("embed", "mlp")),
    (r"/down(/kernel)?$", ("mlp", "embed")),
    (r"(^|/)pooler/kernel$", ("embed", None)),
)
_ADAPTER = re.compile(r"^adapters/(?P<matrix>.*)/(?P<part>down|up)$")


def logical_axes(params: Any) -> Any:
    """Returns a tree like ``params`` of tuples, a name or None for each axis.

    Args:
        params: Arrays or shapes of a LLaMA or an encoder, with adapters or without. A
            vector has no names. The rank of an adapter has none either.
    """

    def of_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names = _of_path(name)[: leaf.ndim]
        return (*(None,) * (leaf.ndim - len(names)), *names)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _of_path(name: str) -> tuple[str | None, ...]:
    adapter = _ADAPTER.match(name)
    if adapter:
        rows, columns = _of_path("/" + adapter["matrix"].replace(".", "/"))
        return (rows, None) if adapter["part"] == "down" else (None, columns)
    for pattern, names in LOGICAL_AXES:
        if re.search(pattern, name):
            return names
    return ()
