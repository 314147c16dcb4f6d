"""Frame-story boards."""

from .boxes import box_track, masked_attention
from .graph import PLACES, Graph, sampler

FOXES = (0.01, 0.11, 0.01, 0.11)  # left edges of the boxes within their frames, in board widths
BOARD_CAPTIONS = "\n".join(f"a fox {place}" for place in PLACES[:4])


def _board(graph: Graph, clip, captions: str, rows=2, columns=2, side=128, **more):
    given = {
        "captions": captions,
        "rows": rows,
        "columns": columns,
        "frame_width": side,
        "frame_height": side,
        "order": "row by row",
        "known_frames": "",
        "draw_frames": "",
        "boards": 1,
        "missing_captions": "refuse",
        "other_sizes": "refuse",
    }
    return graph.add("StoryweftBoard", "Board", clip=clip, **given | more)


def _frame_story(graph: Graph, model, conditioning, blend=0.0, **more):
    return graph.add(
        "StoryweftFrameStoryCrossAttention",
        "Frame-Story Cross Attention",
        model=model,
        conditioning=conditioning,
        blend=blend,
        known_frames="renoise",
        layers="all",
        start_percent=0.0,
        end_percent=1.0,
        **more,
    )


def _captioned(graph: Graph, pictures, captions: str, name: str, larger=2.0):
    if larger != 1:
        pictures = graph.add("ImageScaleBy", "Larger", image=pictures, upscale_method="lanczos", scale_by=larger)()
    sheet = graph.add(
        "StoryweftStoryboard",
        "Storyboard",
        images=pictures,
        captions=captions,
        layout="grid",
        columns=2,
        caption_position="below",
        font_size=0,
        gap=12,
        background="#ffffff",
    )
    graph.add("SaveImage", "Save Sheet", images=sheet(), filename_prefix=f"storyweft/{name}")


def _drawn_board(graph: Graph, loader, board, negative, seed: int, steps=24, cfg=4.0, blend=0.0, **more):
    block = _frame_story(graph, loader(), board(1), blend, **more)
    drawn = sampler(graph, block(), block(1), negative(), board(), seed, steps, cfg)
    return graph.add("StoryweftBoardFrames", "Board Frames", samples=drawn(), board=board(2), vae=loader(2))


def board_story() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    board = _board(graph, loader(1), BOARD_CAPTIONS, 1, 4)
    frames = _drawn_board(graph, loader, board, negative, 3)
    _captioned(graph, frames(), BOARD_CAPTIONS, "board_story")
    graph.add("PreviewAny", "Report", source=board(3))
    return graph.nodes, (
        "## Board story\nFour frames drawn as **one** picture, so that they share one look; **Frame-Story Cross Attention** gives each "
        "frame its own caption. Bypass it (Ctrl-B) and the model reads one joined prompt: places melt into each other.\n\nThe demo "
        "model was made for single pictures of 128 px: foxes may be missing, doubled or cut by a border. For real pictures swap "
        "**Demo Loader** for *Load Checkpoint*: SDXL with 2 x 2 frames of 512, or see *board_story_sdxl*."
    )


def board_replace_frame() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    board = _board(graph, loader(1), BOARD_CAPTIONS, 1, 4)
    frames = _drawn_board(graph, loader, board, negative, 3)
    changed = BOARD_CAPTIONS.replace(PLACES[2], "in the desert at night")
    again = _board(
        graph, loader(1), changed, 1, 4, draw_frames="3", known_images=frames(), known_latents=frames(1), vae=loader(2)
    )
    second = _drawn_board(graph, loader, again, negative, 8)
    _captioned(graph, frames(), BOARD_CAPTIONS, "board_before")
    _captioned(graph, second(), changed, "board_replace_frame")
    graph.add("PreviewAny", "Report", source=again(3))
    return graph.nodes, (
        "## Replace one frame\nThe first board is drawn whole. The second takes its pictures **and** latents as known frames, draws "
        "frame 3 anew with another caption and seed, and keeps the other three to the last bit. Leave *draw_frames* empty and give "
        "fewer pictures to continue a story instead."
    )


def _trained_board(graph: Graph, loader, board, negative, seed: int, steps=24, cfg=4.0):
    """A board drawn with the demo module, cut into its frames."""
    trained = graph.add("StoryweftLoadTrainedBoard", "Load Trained Board", file="demo board (comes with Storyweft)")
    block = graph.add(
        "StoryweftTrainedBoard",
        "Trained Board",
        model=loader(),
        trained_board=trained(),
        positive=board(1),
        negative=negative(),
        strength=1.0,
        known_frames="clean",
    )
    drawn = sampler(graph, block(), block(1), block(2), board(), seed, steps, cfg)
    return graph.add("StoryweftBoardFrames", "Board Frames", samples=drawn(), board=board(2), vae=loader(2))


def board_trained() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    board = _board(graph, loader(1), BOARD_CAPTIONS)
    frames = _trained_board(graph, loader, board, negative, 3)
    _captioned(graph, frames(), BOARD_CAPTIONS, "board_trained")
    return graph.nodes, (
        "## Trained board\nStoryImager's trained parts on the demo model: **Trained Board** gives each frame its caption through a "
        "LoRA, the whole board the story that an extractor makes of all captions, and a prior for each frame. *strength* 0 is the "
        "training-free form, for comparison.\n\nTrain your own with `python -m training.story_board` on folders of stories "
        "(pictures and captions.txt, PororoSV, FlintstonesSV). The demo module is small and briefly trained."
    )


def board_continue() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    given = graph.add("StoryweftDemoSubject", "Given picture", subject="blue fox")
    captions = "\n".join(f"a fox {place}" for place in (PLACES[4], *PLACES[:3]))
    board = _board(graph, loader(1), captions, known_images=given(), vae=loader(2))
    frames = _trained_board(graph, loader, board, negative, 5)
    _captioned(graph, frames(), captions, "board_continue")
    graph.add("PreviewAny", "Report", source=board(3))
    return graph.nodes, (
        "## Continue a story\nThe first frame is a given picture, which **Board** keeps and **Trained Board** shows the model without "
        "noise; the other three are drawn to go on from it. Give more pictures, or choose with *known_frames* and *draw_frames* of "
        "**Board** which frames are kept: the same module fills any gap."
    )


def board_story_sdxl() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="blurry, deformed, text, frame borders")
    captions = "\n".join(
        f"comic panel, a red-haired girl in a blue coat {deed}, clean lines"
        for deed in (
            "reads a book in a library",
            "runs through the rain",
            "sits in a train",
            "stands on a hill by the sea",
        )
    )
    summary = graph.add(
        "CLIPTextEncode",
        "Summary",
        clip=loader(1),
        text="four comic panels about one red-haired girl in a blue coat, the same artist and colours throughout",
    )
    board = _board(graph, loader(1), captions, side=512)
    frames = _drawn_board(graph, loader, board, negative, 3, 30, 6.0, 0.2, summary=summary())
    _captioned(graph, frames(), captions, "board_story_sdxl", 1)
    return graph.nodes, (
        "## Board story on SDXL\n2 x 2 frames of 512 px make one picture of 1024, the size SDXL knows. The **summary** is what the story "
        "branch reads; *blend* is its weight. Choose your own SDXL checkpoint. Frames must be multiples of 32 px."
    )


def board_boxes() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    board = _board(graph, loader(1), BOARD_CAPTIONS, 1, 4)
    lines = [f"fox | 0: {0.25 * frame + left:g} 0.42 {0.25 * frame + left + 0.13:g} 0.92\n" for frame, left in enumerate(FOXES)]
    track = box_track(graph, "Box Track", "".join(lines), 1, 512, 128)
    block = _frame_story(graph, loader(), board(1))
    masked = masked_attention(graph, block(), track(), 0.25, clip=loader(1), cross=True, board_conditioning=block(1))
    drawn = sampler(graph, masked(), masked(1), negative(), board(), 3, 24, 4.0)
    frames = graph.add("StoryweftBoardFrames", "Board Frames", samples=drawn(), board=board(2), vae=loader(2))
    _captioned(graph, frames(), BOARD_CAPTIONS, "board_boxes", 1)
    picture = graph.add("VAEDecode", "Whole Board", samples=drawn(), vae=loader(2))
    shown = box_track(graph, "Boxes on Board", track(1), 1, 512, 128, images=picture())
    graph.add("SaveImage", "Save Boxes", images=shown(2), filename_prefix="storyweft/board_boxes_drawn")
    return graph.nodes, (
        "## Boxes on a board\nOne box a frame, drawn on the whole board: **Masked Attention** takes the board's conditioning in place of "
        "a prompt and looks for the word *fox* in every caption. Set *masked_part* 0 to see the board without boxes.\n\nFor real "
        "pictures swap **Demo Loader** for *Load Checkpoint*, frames of 512 and *masked_part* 0.1."
    )


WORKFLOWS = (board_story, board_replace_frame, board_story_sdxl, board_boxes, board_trained, board_continue)
