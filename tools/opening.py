"""ComfyUI's page in headless Chromium, for the tests and for making workflows."""
import contextlib
import json
import shutil
import urllib.request

from playwright.sync_api import sync_playwright

BROWSER = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
]
READY = """() => window.app?.vueAppReady && window.app?.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100"""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.RightSidePanel.IsOpen": False}


def settings(url: str, changes: dict) -> None:
    """Change the page's settings; it reads them when it is loaded."""
    body = json.dumps(changes).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/api/settings", body, {"Content-Type": "application/json"})).close()


@contextlib.contextmanager
def opened(url: str, width: int, height: int):
    """The page of a server in a window of that size, ready for graphs."""
    settings(url, SETTINGS)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120000)
        yield page
        browser.close()
