"""The notebooks, copied under Sphinx' own directory, outside of which it is blind."""

from pathlib import Path

import nbformat

# A copy runs where its original lies: what it opens is named from there.
_GO_THERE = "import os\n\nos.chdir('../../notebooks')"


def copy_notebooks(source: Path, target: Path) -> None:
    """Writes those that have changed, each with a hidden first cell.

    Args:
        source: Directory of the notebooks.
        target: Where the copies go, two levels below the root.
    """
    target.mkdir(exist_ok=True)
    originals = {path.name: path for path in source.glob("*.ipynb")}
    for copy in target.glob("*.ipynb"):
        if copy.name not in originals:
            copy.unlink()
    for name, path in originals.items():
        notebook = nbformat.read(path, as_version=4)
        first = nbformat.v4.new_code_cell(
            _GO_THERE, id="directory", metadata={"tags": ["remove-cell"]}
        )
        notebook.cells.insert(0, first)
        text = nbformat.writes(notebook)
        copy = target / name
        # Sphinx reads a file again when its time is another.
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")
