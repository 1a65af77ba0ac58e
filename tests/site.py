"""The documentation site as Sphinx builds it, once for all tests that look at it."""

import fcntl
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def built_site(directory: Path, notebooks: str = "off") -> Path:
    """Returns the folder of the site's HTML.

    Args:
        directory: Where it is; processes that name the same one build it once.
        notebooks: "off", or "force" to run them.

    Raises:
        AssertionError: If Sphinx warns.
    """
    directory.mkdir(exist_ok=True)
    log, html = directory / "log", directory / "html"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
            command += ["-D", f"nb_execution_mode={notebooks}", DOCS, html]
            # Without the simulated devices and the compiler of the tests.
            environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            log.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")
    status, _, output = log.read_text().partition("\n")
    assert status == "0", output
    return html


class Page(HTMLParser):
    """What a page of HTML refers to, and what can be referred to in it.

    Attributes:
        links: href of every anchor.
        sources: What a browser loads by itself: scripts, style sheets, images.
        undescribed: Images without a text for those who do not see them.
        anchors: Every id.
        titles: Number of its headings of the first level.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.undescribed: list[str] = []
        self.anchors: set[str] = set()
        self.titles = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes note of one tag."""
        values = {name: value for name, value in attrs if value}
        if "id" in values:
            self.anchors.add(values["id"])
        self.titles += tag == "h1"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values:
            self.sources.append(values["href"])
        # Sphinx writes the name of the file where there is no text.
        if tag == "img" and " " not in values.get("alt", ""):
            self.undescribed.append(values["src"])
        if "src" in values:
            self.sources.append(values["src"])
