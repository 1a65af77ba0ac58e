"""Adapters that peft writes, and what it computes with them and with ours.

    python -m tests.experiments.references.peft_adapters

writes peft_adapters.json: for a small LLaMA, BERT and RoBERTa the
``adapter_config.json`` of peft, the names and shapes of its tensors, and the logits of
the model with numbers of :func:`adapter_of` in them. It needs torch, transformers, peft
and safetensors, which the tests' environment does not have together; the file names
their versions. Write it again after a change of the recipes in ``encoder_logits.py``.

    python -m tests.experiments.references.peft_adapters check DIRECTORY

prints how far peft is from us. DIRECTORY holds ``NAME/base``, ``NAME/adapter`` and
``NAME/logits.npy`` for each NAME, as ``tests.experiments.test_peft.write_ours`` writes
them. With torch 2.13.0, transformers 5.24.0 and peft 0.21.2 the largest difference was
2e-6 for the LLaMA and 9e-7 for the encoders, where the largest logits are 1 to 3.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.experiments.references.encoder_logits import (
    BERT,
    ROBERTA,
    batch_of,
    tensors_of,
)

STORED = Path(__file__).with_suffix(".json")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
MODELS = {"llama": LLAMA, "bert": BERT, "roberta": ROBERTA}

# Ranks and scales differ by layer, layers are missing, the pooler has an adapter.
ADAPTERS = {
    "llama": {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 2},
    },
    "bert": {
        "task_type": "SEQ_CLS",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["query", "dense"],
    },
    "roberta": {
        "task_type": "SEQ_CLS",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["value", "output.dense"],
        "layers_to_transform": [1],
    },
}


def model_tensors(name: str) -> dict[str, np.ndarray]:
    """Random weights of a model, by Hugging Face's names, float32."""
    if name != "llama":
        return tensors_of(MODELS[name])
    shapes = {"model.embed_tokens": (19, 24), "model.norm": (24,), "lm_head": (19, 24)}
    for i in (0, 1):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (24,),
            f"{layer}.post_attention_layernorm": (24,),
            f"{layer}.self_attn.q_proj": (24, 24),
            f"{layer}.self_attn.k_proj": (12, 24),
            f"{layer}.self_attn.v_proj": (12, 24),
            f"{layer}.self_attn.o_proj": (24, 24),
            f"{layer}.mlp.gate_proj": (20, 24),
            f"{layer}.mlp.up_proj": (20, 24),
            f"{layer}.mlp.down_proj": (24, 20),
        }
    rng = np.random.default_rng(3)

    def draw(shape):
        noise = rng.standard_normal(shape).astype(np.float32)
        return 1 + noise / 4 if len(shape) == 1 else noise / np.float32(5)

    return {f"{name}.weight": draw(shape) for name, shape in shapes.items()}


def adapter_of(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random tensors of an adapter, by name, float32."""
    rng = np.random.default_rng(4)
    draws = {k: rng.standard_normal(shapes[k]) for k in sorted(shapes)}
    return {k: (0.3 * x).astype(np.float32) for k, x in draws.items()}


def inputs_of(name: str) -> dict[str, np.ndarray]:
    """What a model gets: tokens, and an encoder's mask and segments."""
    if name != "llama":
        return batch_of(MODELS[name])
    return {"tokens": np.random.default_rng(5).integers(0, 19, (2, 9))}


def write_model(directory: Path, name: str) -> Path:
    """Writes a model in Hugging Face's layout; returns its directory."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(MODELS[name]))
    file = directory / "model.safetensors"
    save_file(model_tensors(name), file, metadata={"format": "pt"})
    return directory


def _base(directory: Path, name: str):
    import torch
    import transformers

    kind = {"llama": "CausalLM"}.get(name, "SequenceClassification")
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )


def _logits(base: Path, adapter: Path, name: str) -> np.ndarray:
    """What the model computes with an adapter, as peft puts them together."""
    import peft
    import torch

    model = peft.PeftModel.from_pretrained(_base(base, name), adapter).eval()
    names = {
        "tokens": "input_ids",
        "mask": "attention_mask",
        "segments": "token_type_ids",
    }
    inputs = {names[k]: torch.tensor(v).long() for k, v in inputs_of(name).items()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def _stored(name: str, scratch: Path) -> dict:
    import peft
    from safetensors.numpy import load_file, save_file

    base, adapter = write_model(scratch / "base", name), scratch / "adapter"
    settings = peft.LoraConfig(**ADAPTERS[name])
    peft.get_peft_model(_base(base, name), settings).save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    shapes = {k: list(x.shape) for k, x in load_file(file).items()}
    save_file(adapter_of(shapes), file, metadata={"format": "pt"})
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = name
    logits = _logits(base, adapter, name)
    return {"config": raw, "shapes": shapes, "logits": logits.tolist()}


def _check(directory: Path) -> None:
    for place in sorted(directory.iterdir()):
        name = place.name.partition("-")[0]
        found = _logits(place / "base", place / "adapter", name)
        ours = np.load(place / "logits.npy")
        difference, largest = np.abs(found - ours).max(), np.abs(found).max()
        print(f"{place.name}: differs by {difference:.1e}, largest logit {largest:.2f}")


def main() -> None:
    if sys.argv[1:2] == ["check"]:
        _check(Path(sys.argv[2]))
        return
    import peft
    import torch
    import transformers

    used = (torch, transformers, peft, np)
    found: dict = {"versions": {module.__name__: module.__version__ for module in used}}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = _stored(name, Path(scratch))
    STORED.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
