"""The box editor in the real page, in both renderers: the mouse, the timeline, the keyboard, saving and loading, a connected picture."""
import json

import pytest
from opening import READY, settings
from test_browser import QUEUE

NEW = """async () => {
    await app.loadGraphData({nodes: [], links: [], version: 0.4}, true, true, 'boxes');
    const node = LiteGraph.createNode('StoryweftBoxTrack');
    app.graph.add(node);
    node.pos = [60, 60];
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
}"""
NODE = "app.graph.nodes.find(node => node.type === 'StoryweftBoxTrack')"
TEXT = f"() => {NODE}.widgets.find(widget => widget.name === 'boxes').value"
SHOWS = """colour => {
    const canvas = document.querySelector('.storyweft-boxes canvas');
    const seen = canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height * 0.97, 1, 1).data;
    return colour.every((value, channel) => Math.abs(seen[channel] - value) <= 3);
}"""
LINE = "fox | 0: 0.1 0.5 0.3 0.9 | 1: 0.6 0.5 0.8 0.9"


def render(page, url: str, vue: bool) -> None:
    settings(url, {"Comfy.VueNodes.Enabled": vue})
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=120000)
    page.wait_for_timeout(1500)


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def renderer(request, page, comfy):
    render(page, comfy.url, request.param == "nodes2")
    yield request.param
    render(page, comfy.url, False)


class Editor:
    """The editor of the one Box Track node on the page, with a square picture."""

    def __init__(self, page):
        self.page = page
        page.evaluate(NEW)
        page.wait_for_selector(".storyweft-boxes canvas", timeout=15000)
        page.wait_for_timeout(800)
        self.type(LINE)

    def type(self, text: str) -> None:
        self.page.evaluate(f"""text => {{
            const widget = {NODE}.widgets.find(widget => widget.name === 'boxes');
            widget.value = text;
            widget.callback?.(text);
        }}""", text)
        self.page.wait_for_timeout(200)

    @property
    def text(self) -> str:
        return self.page.evaluate(TEXT)

    @property
    def objects(self) -> list:
        return json.loads(self.text)["objects"]

    def canvas(self, number: int) -> dict:
        return self.page.locator(".storyweft-boxes canvas").nth(number).bounding_box()

    def at(self, x: float, y: float) -> tuple[float, float]:
        box = self.canvas(0)
        side = min(box["width"], box["height"])
        return box["x"] + (box["width"] - side) / 2 + x * side, box["y"] + (box["height"] - side) / 2 + y * side

    def moment(self, frame: int, row: int) -> tuple[float, float]:
        box = self.canvas(1)
        return box["x"] + 8 + (box["width"] - 16) * frame / 15, box["y"] + 16 * row + 8

    def drag(self, start, end) -> None:
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        mouse.move(*end)
        mouse.up()
        self.page.wait_for_timeout(150)

    def click(self, point) -> None:
        self.page.mouse.click(*point)
        self.page.wait_for_timeout(150)

    def button(self, name: str) -> None:
        self.page.locator(".storyweft-boxes button", has_text=name).click()
        self.page.wait_for_timeout(150)


def near(box) -> object:
    return pytest.approx(box, abs=0.02)


def test_a_box_is_drawn_named_moved_resized_keyed_and_comes_back(renderer, page, screenshots):
    editor = Editor(page)
    editor.drag(editor.at(0.5, 0.1), editor.at(0.8, 0.3))
    fox, new = editor.objects
    assert [key["box"] for key in fox["keyframes"]] == [[0.1, 0.5, 0.3, 0.9], [0.6, 0.5, 0.8, 0.9]]
    assert new["keyframes"] == [{"t": 0, "box": near([0.5, 0.1, 0.8, 0.3])}]

    page.locator(".storyweft-boxes input").fill("an owl")
    page.keyboard.press("Enter")
    assert (editor.objects[1]["words"], editor.objects[1]["id"]) == ("an owl", "an owl")

    editor.drag(editor.at(0.65, 0.2), editor.at(0.45, 0.3))
    assert editor.objects[1]["keyframes"][0]["box"] == near([0.3, 0.2, 0.6, 0.4])
    editor.drag(editor.at(0.6, 0.4), editor.at(0.7, 0.5))
    assert editor.objects[1]["keyframes"][0]["box"] == near([0.3, 0.2, 0.7, 0.5])

    editor.click(editor.moment(9, 1))
    editor.drag(editor.at(0.5, 0.3), editor.at(0.4, 0.2))
    keys = editor.objects[1]["keyframes"]
    assert [key["t"] for key in keys] == [0, 0.6] and keys[1]["box"] == near([0.2, 0.1, 0.6, 0.4])
    editor.drag(editor.moment(9, 1), editor.moment(12, 1))
    assert [key["t"] for key in editor.objects[1]["keyframes"]] == [0, 0.8]
    page.screenshot(path=str(screenshots / f"box_editor_{renderer}.png"))

    before = editor.text
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    values = next(node for node in json.loads(saved)["nodes"] if node["type"] == "StoryweftBoxTrack")["widgets_values"]
    assert values[0] == before and not any(isinstance(value, dict) for value in values)
    page.evaluate("async graph => { await app.loadGraphData(JSON.parse(graph), true, true, 'again'); }", saved)
    page.wait_for_timeout(1000)
    assert editor.text == before
    editor.drag(editor.at(0.2, 0.7), editor.at(0.3, 0.7))      # the editor shows the loaded boxes: there is one to move
    assert len(editor.objects) == 2 and editor.objects[0]["keyframes"][0]["box"] == near([0.2, 0.5, 0.4, 0.9])
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = [node["inputs"] for node in sent.values() if node["class_type"] == "StoryweftBoxTrack"]
    assert inputs["boxes"] == editor.text and "box_editor" not in inputs


def test_keys_and_buttons_change_key_frames_and_leave_the_node_alone(renderer, page):
    editor = Editor(page)
    page.evaluate(f"() => app.canvas.selectNode({NODE})")
    place = page.evaluate(f"() => [...{NODE}.pos]")
    editor.click(editor.at(0.2, 0.7))
    for key in ("ArrowRight", "Shift+ArrowUp"):
        page.keyboard.press(key)
    page.wait_for_timeout(150)
    assert editor.objects[0]["keyframes"][0]["box"] == near([0.11, 0.45, 0.31, 0.85])
    assert page.evaluate(f"() => [...{NODE}.pos]") == place

    for _ in range(5):
        page.keyboard.press(".")
    editor.button("Absent")
    assert editor.objects[0]["keyframes"][1] == {"t": 0.3333, "box": None}
    editor.click(editor.moment(10, 0))
    editor.drag(editor.at(0.4, 0.1), editor.at(0.6, 0.3))      # drawn where it is absent: it comes back here
    assert len(editor.objects) == 1
    assert editor.objects[0]["keyframes"][2] == {"t": 0.6667, "box": near([0.4, 0.1, 0.6, 0.3])}

    editor.click(editor.at(0.5, 0.2))
    page.keyboard.press("Delete")
    page.wait_for_timeout(150)
    assert [key["t"] for key in editor.objects[0]["keyframes"]] == [0, 0.3333, 1]
    editor.click(editor.moment(1, 0))
    editor.button("Key")
    assert [key["t"] for key in editor.objects[0]["keyframes"]] == [0, 0.0667, 0.3333, 1]
    editor.click(editor.moment(2, 0))
    page.keyboard.press("Delete")
    page.wait_for_timeout(150)
    assert editor.text == "" and page.evaluate(f"() => !!{NODE}")


def test_a_text_it_cannot_draw_stays_as_it_is(renderer, page):
    editor = Editor(page)
    plan = "Frame 1: [{'id': 0, 'name': 'fox', 'box': [1, 2, 30, 40]}]"
    editor.type(plan)
    editor.drag(editor.at(0.2, 0.2), editor.at(0.6, 0.6))
    assert editor.text == plan


def test_it_shows_the_connected_picture_and_the_text_runs_as_drawn(renderer, page, screenshots):
    editor = Editor(page)
    blue = {"classic": 0xA0, "nodes2": 0xB0}[renderer]      # else the second run finds everything cached and tells the page nothing
    page.evaluate(f"""blue => {{
        const add = (type, x) => {{
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [x, 60];
            return node;
        }};
        const picture = add('EmptyImage', 560), shown = add('PreviewImage', 900);
        picture.widgets.find(widget => widget.name === 'color').value = 0x306000 + blue;
        const track = {NODE};
        picture.connect(0, track, track.inputs.findIndex(input => input.name === 'images'));
        track.connect(2, shown, 0);
    }}""", blue)
    editor.drag(editor.at(0.2, 0.7), editor.at(0.2, 0.3))
    kind, detail = page.evaluate(QUEUE)
    assert kind == "execution_success", detail
    page.wait_for_function(SHOWS, arg=[0x30, 0x60, blue], timeout=30000)
    page.screenshot(path=str(screenshots / f"box_editor_picture_{renderer}.png"))
    assert page.evaluate("() => Object.values(app.nodeOutputs).flatMap(output => output.images || []).length") == 16
