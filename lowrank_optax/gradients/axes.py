"""What the dimensions of a reshaped, transposed parameter are of its own axes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Atom:
    """A piece of one axis of a parameter: all its indices, or a digit of them.

    Attributes:
        axis: Axis of the parameter.
        size: Values of the digit.
        stride: Indices that one step of it skips.
    """

    axis: int
    size: int
    stride: int = 1


# What each dimension of an array made of a parameter consists of, outermost first.
Dims = tuple[tuple[Atom, ...], ...]


def dims_of(shape: tuple[int, ...]) -> Dims:
    """Returns the dimensions of a parameter itself."""
    return tuple(
        (Atom(axis, size),) if size > 1 else () for axis, size in enumerate(shape)
    )


def reshaped(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """Returns the dimensions after a reshape; None, if digits would be mixed."""
    atoms = [atom for dim in dims for atom in dim]
    found = []
    for size in shape:
        needed, dim = size, []
        while needed > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if needed % atom.size == 0:
                dim.append(atom)
                needed //= atom.size
            elif atom.size % needed == 0:
                rest = atom.size // needed
                dim.append(Atom(atom.axis, needed, atom.stride * rest))
                atoms.insert(0, Atom(atom.axis, rest, atom.stride))
                needed = 1
            else:
                return None
        found.append(tuple(dim))
    return tuple(found)


def in_order(
    dims: Dims, chosen: tuple[int, ...], axes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Returns the chosen dimensions in the order that spells the axes; None: none does.

    Args:
        dims: Of the array.
        chosen: Positions of some dimensions.
        axes: Axes of the parameter.
        shape: Of the parameter.
    """
    rank = {axis: place for place, axis in enumerate(axes)}
    if any(atom.axis not in rank for i in chosen for atom in dims[i]):
        return None

    def place(i: int):
        return (rank[dims[i][0].axis], -dims[i][0].stride) if dims[i] else (-1, 0)

    order = tuple(sorted(chosen, key=place))
    spelled = [atom for i in order for atom in dims[i]]
    for axis in axes:
        stride = shape[axis]
        while stride > 1:
            if not spelled or spelled[0].axis != axis:
                return None
            atom = spelled.pop(0)
            if atom.stride * atom.size != stride:
                return None
            stride = atom.stride
    return None if spelled else order
