"""Writes workflows/*.json and workflows/api/*.json: the sources of workflow_sources.py, through the real page.

The page builds the graph from the API form, this script places the nodes and adds the note, and the page gives both
forms back, so that they are what a user's own "Save" and "Export (API)" would write.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, one_sentence, say  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from serve import free_port, request, running  # noqa: E402
from workflow_sources import WORKFLOWS  # noqa: E402

BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
]
READY = """() => window.app?.vueAppReady && window.app?.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100"""
BUILD = """async ([api, note, name]) => {
    await app.loadApiJson(api, name);
    const depth = {};
    const of = id => depth[id] ??= 1 + Math.max(-1, ...Object.values(api[id].inputs).filter(Array.isArray).map(l => of(l[0])));
    const columns = [];
    for (const node of app.graph.nodes)
        for (const widget of node.widgets || []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
    for (const node of app.graph.nodes) (columns[of(node.id)] ??= []).push(node);
    let x = 40;
    for (const column of columns) {
        let y = 60, wide = 0;
        for (const node of column) {
            const size = node.computeSize();
            node.setSize([Math.max(size[0], node.widgets?.some(w => w.options?.multiline) || node.type === 'StoryweftScript' ? 420 : 270),
                          Math.max(size[1], /Script|BoxPlanner/.test(node.type) ? 520 : /SaveImage|Preview/.test(node.type) ? 320 : 0)]);
            node.pos = [x, y];
            y += node.size[1] + 70; wide = Math.max(wide, node.size[0]);
        }
        x += wide + 70;
    }
    const text = LiteGraph.createNode('MarkdownNote');
    app.graph.add(text);
    text.title = 'About';
    text.widgets[0].value = note;
    text.setSize([420, 330]);
    text.pos = [-420, 60];
    const made = await app.graphToPrompt();
    return [made.workflow, made.output];
}"""


def main() -> None:
    (ROOT / "workflows" / "api").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, running(free_port(), Path(base)) as (url, _), sync_playwright() as play:
        request(f"{url}/object_info/StoryweftScript")
        body = json.dumps(
            {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.RightSidePanel.IsOpen": False}
        ).encode()
        urllib.request.urlopen(
            urllib.request.Request(f"{url}/api/settings", body, {"Content-Type": "application/json"})
        ).close()
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=BROWSER)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120000)
        for name, source in WORKFLOWS.items():
            api, note = source()
            workflow, output = page.evaluate(BUILD, [api, note, name])
            (ROOT / "workflows" / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
            (ROOT / "workflows" / "api" / f"{name}.json").write_text(
                json.dumps(output, indent=1, ensure_ascii=False) + "\n"
            )
            say(f"wrote workflows/{name}.json, {len(output)} nodes")
        browser.close()


if __name__ == "__main__":
    with one_sentence():
        main()
