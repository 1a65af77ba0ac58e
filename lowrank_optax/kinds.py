"""What a field of an optimizer's state is: a first moment, a second, a constant."""

from collections.abc import Mapping
from typing import Literal, get_args

Kind = Literal["first", "second", "constant"]

_KNOWN: dict[str, Kind] = {
    "mu": "first",  # Adam and its family, Lion, Muon
    "trace": "first",  # momentum
    "ema": "first",
    "m1": "first",  # AdEMAMix
    "m2": "first",
    "nu": "second",  # Adam and its family, RMS
    "nu_max": "second",  # AMSGrad
    "sum_of_squares": "second",  # Adagrad
    "ns_coeffs": "constant",  # Muon
}


def kinds_of(moments: Mapping[str, Kind] | None) -> dict[str, Kind]:
    """Returns the kinds of fields by their names: Optax' own, and the caller's.

    Args:
        moments: Name -> kind, beside the known ones, or in their place.

    Raises:
        ValueError: If a kind is unknown.
    """
    for field, kind in (moments or {}).items():
        if kind not in get_args(Kind):
            raise ValueError(
                f"moments[{field!r}] must be one of {get_args(Kind)}, got {kind!r}."
            )
    return {**_KNOWN, **(moments or {})}
