"""Pages of the site as a browser shows them, on a desk and on a phone."""

import shutil
from collections.abc import Iterator

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
PAGES = ("index", "methods/low_rank_muon", "memory_and_speed")
WINDOWS = {"desk": (1280, 800), "phone": (390, 844)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium, absent on PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield found
        found.close()


WIDTH = "document.documentElement.scrollWidth"
IMAGES = "[...document.images].map(x => [x.src, x.complete && x.naturalWidth])"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_loads_without_a_complaint(
    name, window, scheme, site, browser, tmp_path
):
    width, height = WINDOWS[window]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto((site / f"{name}.html").as_uri())
    # Images below the first window are loaded when they are near.
    page.evaluate("[...document.images].forEach(x => (x.loading = 'eager'))")
    page.wait_for_load_state("networkidle")
    assert page.evaluate(WIDTH) <= width
    images = page.evaluate(IMAGES)
    assert images
    assert all(size for _, size in images), images
    assert not complaints
    screenshot = page.screenshot(path=tmp_path / f"{window}.png", full_page=True)
    assert len(screenshot) > 10_000
    context.close()
