"""Weights in several files, as Hugging Face cuts large ones up."""

import json

from safetensors.numpy import save_file


def into_two_shards(directory, tensors):
    """Writes tensors in the place of model.safetensors, every other one to a file."""
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for shard in (0, 1):
        name = f"model-{shard}.safetensors"
        part = {k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == shard}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
