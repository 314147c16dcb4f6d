"""Writes workflows/*.json and workflows/api/*.json: the sources of workflow_sources, through the real page.

The page builds the graph from the API form, this script places the nodes and adds the note, and the page gives both
forms back, so that they are what a user's own "Save" and "Export (API)" would write. Names as arguments: only those.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, one_sentence, say  # noqa: E402
from opening import opened  # noqa: E402
from serve import free_port, running  # noqa: E402
from workflow_sources import WORKFLOWS  # noqa: E402

HEIGHT = 1180  # of a column of nodes, so that a whole graph fits a window at a size where titles can be read
BUILD = """async ([api, text, name, HEIGHT]) => {
    await app.loadApiJson(api, name);
    const depth = {};
    const of = id => depth[id] ??= 1 + Math.max(-1, ...Object.values(api[id].inputs).filter(Array.isArray).map(l => of(l[0])));
    const note = LiteGraph.createNode('MarkdownNote');
    app.graph.add(note);
    note.title = 'About';
    note.widgets[0].value = text;
    note.setSize([420, 300]);
    const nodes = app.graph.nodes.filter(node => node !== note).sort((a, b) => of(a.id) - of(b.id));
    let x = 40, y = 60, wide = 0;
    for (const node of [note, ...nodes]) {
        for (const widget of node.widgets || []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
        if (node !== note) {
            const size = node.computeSize(), long = node.widgets?.some(widget => widget.options?.multiline);
            node.setSize([Math.max(size[0], long ? 420 : 270),
                          Math.max(size[1], /Script|BoxPlanner/.test(node.type) ? 520 :
                                    /SaveImage|SaveAnimated|SaveVideo|Preview/.test(node.type) ? 320 : 0)]);
        }
        // these grow when they run
        const room = node.size[1] + (/Sampler|SoundOptimise/.test(node.type) ? 260 : /BoxTrack|AudioCaption$/.test(node.type) ? 120 : 0);
        if (y > 60 && y + room > HEIGHT) { x += wide + 70; y = 60; wide = 0; }
        node.pos = [x, y];
        y += room + 60; wide = Math.max(wide, node.size[0]);
    }
    const made = await app.graphToPrompt();
    return [made.workflow, made.output];
}"""


def main() -> None:
    (ROOT / "workflows" / "api").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, running(free_port(), Path(base)) as (url, _), opened(url, 1600, 1000) as page:
        for name in sys.argv[1:] or WORKFLOWS:
            api, note = WORKFLOWS[name]()
            workflow, output = page.evaluate(BUILD, [api, note, name, HEIGHT])
            (ROOT / "workflows" / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
            (ROOT / "workflows" / "api" / f"{name}.json").write_text(
                json.dumps(output, indent=1, ensure_ascii=False) + "\n"
            )
            say(f"wrote workflows/{name}.json, {len(output)} nodes")


if __name__ == "__main__":
    with one_sentence():
        main()
