import json
import shutil
import urllib.request

import pytest
from playwright.sync_api import sync_playwright
from serving import ROOT, comfyui

BROWSER = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
]
READY = """() => window.app?.vueAppReady && window.app?.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100"""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.RightSidePanel.IsOpen": False}


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    with comfyui(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")     # no longer: while it lives, its event loop runs in this thread and asyncio.run is refused
def page(comfy):
    """ComfyUI's page in headless Chromium, ready for graphs."""
    body = json.dumps(SETTINGS).encode()
    urllib.request.urlopen(urllib.request.Request(f"{comfy.url}/api/settings", body, {"Content-Type": "application/json"})).close()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        page = browser.new_page(viewport={"width": 1800, "height": 1100})
        page.goto(comfy.url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120000)
        yield page
        browser.close()


@pytest.fixture(scope="session")
def screenshots():
    folder = ROOT / "output" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
