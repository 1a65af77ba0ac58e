"""The clients by name. Each is imported when it is asked for."""

import functools
import importlib
import importlib.util

from tests.clients.protocol import Client

# Those that make test runs, with one method.
QUICK = ("nnx", "linen")
# The methods that make test-slow runs beside these with a client of the development
# environment; all of them with NNX. make clients runs every method with every client.
TELLING = {
    "linen": ("adarankgrad",),
    "maxtext_like": ("low_rank_muon",),
    "equinox": ("projfactor",),
    "haiku": ("adarankgrad",),
}
# Name -> module and class, and the package that it is a client with.
CLIENTS = {
    "nnx": ("flax_nnx.NNX", "flax"),
    "linen": ("flax_linen.Linen", "flax"),
    "maxtext_like": ("maxtext_like.MaxTextLike", "flax"),
    "equinox": ("equinox_client.Equinox", "equinox"),
    "haiku": ("haiku_client.Haiku", "haiku"),
    "haliax": ("haliax_client.Haliax", "haliax"),
    "levanter": ("levanter_client.Levanter", "levanter"),
    "tunix": ("tunix_client.Tunix", "tunix"),
    "keras": ("keras_client.Keras", "keras"),
}


def is_installed(name: str) -> bool:
    """Returns whether the package of a client is there; it may still fail."""
    _, package = CLIENTS[name]
    return importlib.util.find_spec(package) is not None


@functools.cache
def client(name: str) -> Client:
    """Returns a client; its package is installed."""
    place, _ = CLIENTS[name]
    module, kind = place.split(".")
    found = importlib.import_module(f"tests.clients.{module}")
    return getattr(found, kind)()
