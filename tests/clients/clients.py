"""The clients by name. Each is imported when it is asked for."""

import importlib

from tests.clients.protocol import Client

# Those that make test runs, with one method.
QUICK = ("nnx", "linen")
# Name -> module and class.
CLIENTS = {
    "nnx": "flax_nnx.NNX",
    "linen": "flax_linen.Linen",
    "maxtext_like": "maxtext_like.MaxTextLike",
    "equinox": "equinox_client.Equinox",
    "haiku": "haiku_client.Haiku",
    "haliax": "haliax_client.Haliax",
    "levanter": "levanter_client.Levanter",
    "tunix": "tunix_client.Tunix",
    "keras": "keras_client.Keras",
}


def client(name: str) -> Client:
    """Returns a client.

    Raises:
        ImportError: If something that it needs is not installed.
    """
    module, kind = CLIENTS[name].split(".")
    found = importlib.import_module(f"tests.clients.{module}")
    return getattr(found, kind)()
