"""The pack in ComfyUI's real page: workflows open, run and show their pictures, help pages open, errors are readable."""
import json

import pytest
from opening import READY, settings
from serving import ROOT, RUNNABLE

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
OPEN = """async ([graph, name]) => {
    await app.loadGraphData(graph, true, true, name);
    return app.graph.nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(node => node.type);
}"""
QUEUE = """() => new Promise(async done => {
    const ends = ['execution_success', 'execution_error', 'execution_interrupted'];
    for (const end of ends) app.api.addEventListener(end, event => done([end, event.detail]), {once: true});
    const queued = await app.queuePrompt(0, 1);
    if (queued === false || Object.keys(app.lastNodeErrors || {}).length) done(['refused', app.lastNodeErrors]);
})"""


RED = """() => app.graph.nodes.filter(node => node.has_errors).map(node => node.title)"""
PICTURES = """() => app.graph.nodes.filter(node => node.type === 'SaveImage' && !node.imgs?.length).length === 0"""
PLAYED = """async () => {
    const nodes = app.graph.nodes.filter(node => node.type === 'SaveVideo'), found = [];
    for (const video of document.querySelectorAll('video')) {
        await video.play();
        await new Promise(done => setTimeout(done, 800));
        found.push([video.videoWidth, video.currentTime, video.duration, video.webkitAudioDecodedByteCount]);
    }
    return [nodes.length, found];
}"""
CROWDED = """() => {
    const boxes = app.graph.nodes.map(node => [node.title, ...node.getBounding()]), pairs = [];
    for (const [one, x, y, w, h] of boxes)
        for (const [other, X, Y, W, H] of boxes)
            if (one !== other && x < X + W && X < x + w && y < Y + H && Y < y + h) pairs.push(`${one} over ${other}`);
    return pairs;
}"""


def open_workflow(page, name: str) -> None:
    missing = page.evaluate(OPEN, [json.loads((ROOT / "workflows" / f"{name}.json").read_text()), name])
    assert not missing


def shown(page, screenshots, name: str) -> None:
    """The whole graph in the window: no node over another, and large enough that the page writes the titles."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(2000)
    page.screenshot(path=str(screenshots / f"{name}.png"))
    assert page.evaluate(CROWDED) == []
    assert page.evaluate("() => app.canvas.low_quality") is False


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in RUNNABLE])
def test_a_workflow_for_other_models_opens_without_missing_nodes(page, screenshots, name):
    open_workflow(page, name)
    shown(page, screenshots, name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_workflow_runs_from_the_page_and_shows_its_pictures(page, screenshots, name):
    if name == "saved_character":       # its loader lists the file that long_story has just saved
        page.evaluate("async () => { await app.refreshComboInNodes(); }")
    open_workflow(page, name)
    kind, detail = page.evaluate(QUEUE)
    assert kind == "execution_success", detail
    images = page.evaluate("() => Object.values(app.nodeOutputs).flatMap(output => output.images || [])")
    assert images
    shown(page, screenshots, name)
    assert page.evaluate(RED) == []
    page.wait_for_function(PICTURES, timeout=15000)
    expected, played = page.evaluate(PLAYED)
    assert len(played) >= expected
    for width, reached, seconds, heard in played:
        assert width > 0 and reached > 0.3 and abs(seconds - 1.6) < 0.15 and heard > 0


def test_a_bad_input_is_refused_and_named_in_the_page(page, screenshots):
    open_workflow(page, "consistent_story")
    page.evaluate("""() => {
        const node = app.graph.nodes.find(node => node.type === 'StoryweftScript');
        node.widgets.find(widget => widget.name === 'panels').value = '[Nobody] in the forest';
    }""")
    kind, detail = page.evaluate(QUEUE)
    assert kind == "refused"
    assert "StoryweftScript: panels, line 1, '[Nobody]" in str(detail)
    page.click("text=View details", timeout=15000)
    page.wait_for_timeout(2000)
    page.screenshot(path=str(screenshots / "error.png"))
    assert "Story Script - panels" in page.inner_text("body")      # the page groups refusals by input; the sentence is in the answer


@pytest.fixture(scope="module", params=["en", "ko"])
def language(page, comfy, request):
    settings(comfy.url, {"Comfy.Locale": request.param})
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=120000)
    texts = json.loads((ROOT / "locales" / request.param / "nodeDefs.json").read_text())
    title = page.evaluate("() => LiteGraph.registered_node_types.StoryweftScript.title")
    assert title == texts["StoryweftScript"]["display_name"]
    return request.param


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_of_a_node_opens_in_its_language(page, node, language):
    text = ROOT / "web" / "docs" / (f"{node}.md" if language == "en" else f"{node}/{language}.md")
    title = text.read_text().splitlines()[0].removeprefix("# ")
    page.evaluate("""async type => {
        await app.loadGraphData({nodes: [], links: [], version: 0.4}, true, true, 'help');
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        app.canvas.selectNode(node);
        node.pos = [200, 200];
        app.canvas.setDirty(true, true);
    }""", node)
    page.wait_for_selector('[data-testid="info-button"]', timeout=15000)
    page.click('[data-testid="info-button"]')
    page.wait_for_selector(f'h1:has-text("{title}")', timeout=15000)
    page.keyboard.press("Escape")
