import pytest
from serving import ROOT, comfyui  # puts tools/ on the path

import opening  # isort: skip


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    with comfyui(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")     # no longer: while it lives, its event loop runs in this thread and asyncio.run is refused
def page(comfy):
    """ComfyUI's page in headless Chromium, ready for graphs."""
    with opening.opened(comfy.url, 1800, 1100) as page:
        yield page


@pytest.fixture(scope="session")
def screenshots():
    folder = ROOT / "output" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
