"""Tokenizers and tables so small that their ids can be written down."""

import json
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from tokenizers import models, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def small_shape(**changes):
    """What the data need to know of an encoder, of these tokenizers' vocabulary."""
    shape = {"vocab_size": 30, "max_positions": 16, "type_vocab_size": 2}
    return SimpleNamespace(**(shape | {"padding_id": 0} | changes))


def write_tokenizer(directory: Path, kind: str = "bert") -> Path:
    """Writes a tokenizer of letters: a is 4, z is 29.

    Args:
        directory: Where ``tokenizer.json`` goes.
        kind: "bert": [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3; "roberta": <pad> 0, <unk> 1,
            <s> 2, </s> 3; "none": BERT's, but no special tokens around a text.
    """
    names = ["<pad>", "<unk>", "<s>", "</s>"]
    if kind != "roberta":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {name: i for i, name in enumerate([*names, *LETTERS])}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=names[1]))
    model.add_special_tokens(names)
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if kind == "roberta":
        model.post_processor = processors.RobertaProcessing(
            ("</s>", 3), ("<s>", 2), trim_offsets=True, add_prefix_space=False
        )
    # As sentence-transformers leaves them in the file.
    model.enable_padding(length=9)
    model.enable_truncation(5)
    model.save(str(directory / "tokenizer.json"))
    return directory


def write_rows(path: Path, rows) -> str:
    """Writes JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
