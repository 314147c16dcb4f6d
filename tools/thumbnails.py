"""Draws workflows/NAME.jpg, the picture that ComfyUI's template browser shows, from what the workflow itself makes.

A real server runs workflows/api/NAME.json one after the other. Names as arguments: only those. Of a clip four frames are
shown, of a workflow with sheets the sheets, of one with a picture of its words that too.
"""

import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, Trouble, one_sentence, say  # noqa: E402

sys.path.insert(0, str(ROOT / "tests"))
import av  # noqa: E402
from PIL import Image, ImageSequence  # noqa: E402
from serving import RUNNABLE, Server, api, comfyui  # noqa: E402

SIDE, BYTES = 320, 9000
SHOWN = 4  # pictures of one node
GAP = 4
WORDS = "StoryweftWordAttention"


def frames(path: Path) -> list[Image.Image]:
    """All pictures of a file."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as clip:
            return [frame.to_image() for frame in clip.decode(video=0)]
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]


def spread(pictures: list[Image.Image]) -> list[Image.Image]:
    """The first, the last and what lies evenly between them."""
    count = min(len(pictures), SHOWN)
    return [pictures[round(index * (len(pictures) - 1) / max(count - 1, 1))] for index in range(count)]


def grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures row by row, all as wide as the first."""
    width = pictures[0].width
    pictures = [
        one.resize((width, round(one.height * width / one.width)), Image.Resampling.LANCZOS) for one in pictures
    ]
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(one.height for one in row) for row in rows]
    columns = min(columns, len(pictures))
    whole = Image.new("RGB", (columns * width + (columns - 1) * GAP, sum(heights) + (len(rows) - 1) * GAP), "white")
    for number, row in enumerate(rows):
        for column, one in enumerate(row):
            whole.paste(one, (column * (width + GAP), sum(heights[:number]) + number * GAP))
    return whole


def source(graph: dict, node: str) -> str:
    """Class of the node whose pictures an output node shows."""
    return next(graph[value[0]]["class_type"] for value in graph[node]["inputs"].values() if isinstance(value, list))


def picture(server: Server, graph: dict, outputs: dict) -> Image.Image:
    """The result of a run as one picture."""
    found = {}
    for node, output in outputs.items():
        paths = [
            server.base / image["type"] / image["subfolder"] / image["filename"] for image in output.get("images", [])
        ]
        if paths and (graph[node]["class_type"].startswith("Save") or source(graph, node) == WORDS):
            clip = paths[0].suffix in (".mp4", ".webp")
            found[node] = spread(frames(paths[0])) if clip else spread([frames(path)[0] for path in paths])
    words = [one for node, pictures in found.items() if source(graph, node) == WORDS for one in pictures[:1]]
    made = {node: pictures for node, pictures in found.items() if source(graph, node) != WORDS}
    sheets = [
        one for node, pictures in made.items() if source(graph, node) == "StoryweftStoryboard" for one in pictures
    ]
    shown = sheets or next(iter(made.values()))
    return grid([*words, grid(shown, 2)], 1)


def encoded(whole: Image.Image) -> bytes:
    """At most BYTES of JPEG, no wider and no higher than SIDE: as good as fits, smaller where that would not look well."""
    side = SIDE
    while True:
        small = whole.convert("RGB")
        small = small.resize(
            [max(1, round(edge * side / max(whole.size))) for edge in whole.size], Image.Resampling.LANCZOS
        )
        for quality in range(80, 45, -5):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
            if file.tell() <= BYTES:
                return file.getvalue()
        side -= 20


def main() -> None:
    names = sys.argv[1:] or RUNNABLE
    with tempfile.TemporaryDirectory() as base, comfyui(Path(base)) as server:
        for name in names:
            server.prepare(name)
            graph = api(name)
            followed = server.run(graph)
            if followed.status != 200 or followed.history["status"]["status_str"] != "success":
                raise Trouble(f"{name} did not run: {followed.answer} {followed.of('execution_error')}")
            data = encoded(picture(server, graph, followed.history["outputs"]))
            (ROOT / "workflows" / f"{name}.jpg").write_bytes(data)
            say(f"wrote workflows/{name}.jpg, {len(data)} bytes")


if __name__ == "__main__":
    with one_sentence():
        main()
