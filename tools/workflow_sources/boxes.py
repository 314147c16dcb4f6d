"""Objects in drawn boxes, on pictures and clips."""

from .graph import Graph, consistent, sampler

PLAN = """Reasoning: The fox runs from the left to the right, the owl flies up and away.
Frame 1: [{'id': 0, 'name': 'a fox', 'box': [20, 260, 160, 200]}, {'id': 1, 'name': 'an owl', 'box': [300, 150, 90, 90]}]
Frame 2: [{'id': 0, 'name': 'a fox', 'box': [120, 240, 165, 210]}, {'id': 1, 'name': 'an owl', 'box': [360, 90, 85, 85]}]
Frame 3: [{'id': 0, 'name': 'a fox', 'box': [220, 250, 170, 210]}, {'id': 1, 'name': 'an owl', 'box': [430, 20, 80, 80]}]
Frame 4: [{'id': 0, 'name': 'a fox', 'box': [320, 240, 175, 220]}]
Background keyword: forest
"""


def box_track(graph: Graph, title: str, boxes, frames: int, width: int, height: int, **more):
    size = {"frames": frames, "width": width, "height": height, "interpolation": "linear"}
    source = {"source_words": "", "source_width": 0.25, "source_height": 0.25}
    return graph.add("StoryweftBoxTrack", title, boxes=boxes, **size, **source, **more)


def masked_attention(graph: Graph, model, boxes, part: float, prompt="", **more):
    return graph.add(
        "StoryweftMaskedAttention",
        "Masked Attention",
        model=model,
        boxes=boxes,
        prompt=prompt,
        masked_part=part,
        masked_steps=0,
        spatial=True,
        temporal=True,
        layers="auto",
        frame_rule="average",
        sampling="by area",
        **more,
    )


def _beside(graph: Graph, clip, track, frames: int, width: int, height: int):
    """The clip, and to its right the same with the boxes drawn on it."""
    shown = box_track(graph, "Boxes on Clip", track(1), frames, width, height, images=clip)
    return graph.add(
        "ImageStitch",
        "Clip and Boxes",
        image1=clip,
        image2=shown(2),
        direction="right",
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
    )


def _clip_file(graph: Graph, images, name: str, fps: float) -> None:
    graph.add(
        "SaveAnimatedWEBP",
        "Save Clip",
        images=images,
        filename_prefix=f"storyweft/{name}",
        fps=fps,
        lossless=False,
        quality=90,
        method="default",
    )


def boxes_from_text() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    size = {"frames": 16, "width": 512, "height": 512}
    scene = "a fox in the forest by day"
    question = graph.add("StoryweftBoxPlanPrompt", "Box Plan Prompt", scene=scene, key_frames=4, **size)
    graph.add("PreviewAny", "Question for Generate Text", source=question())
    planner = graph.add("StoryweftBoxPlanner", "Box Planner", answer=PLAN, scene=scene, interpolation="smooth", **size)
    graph.add("PreviewAny", "Report", source=planner(3))
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text=planner(2))
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    drawn = sampler(graph, loader(), positive(), negative(), latent(), 3)
    picture = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))()
    picture = graph.add("ImageScaleBy", "Larger", image=picture, upscale_method="lanczos", scale_by=4.0)()
    track = graph.add(
        "StoryweftBoxTrack",
        "Box Track",
        boxes=planner(1),
        interpolation="smooth",
        images=picture,
        source_words="",
        source_width=0.25,
        source_height=0.25,
        **size,
    )
    graph.add(
        "SaveAnimatedWEBP",
        "Save Preview",
        images=track(2),
        filename_prefix="storyweft/boxes_from_text",
        fps=8.0,
        lossless=False,
        quality=80,
        method="default",
    )
    return graph.nodes, (
        "## Boxes from text\nA language model plans where things are: **Box Plan Prompt** writes the question, **Box Planner** reads the "
        "answer, reports what it mended, and gives boxes, their text and a prompt that names everything.\n\nHere the answer is typed, so "
        "that nothing is downloaded. With a model: *Load CLIP* (Gemma 3, Qwen 3, ...) and *Generate Text* between the two nodes: prompt to "
        "its *prompt*, its text to *answer*; max_length 1024.\n\nThe demo model draws one picture as the ground of the preview. Disconnect "
        "*boxes* of **Box Track** and paste the JSON there to go on with the mouse."
    )


def boxes_image() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    track = graph.add(
        "StoryweftBoxTrack",
        "Box Track",
        boxes="fox | 0: 0.02 0.42 0.52 0.92 | 1: 0.48 0.42 0.98 0.92\n",
        frames=4,
        width=128,
        height=128,
        interpolation="linear",
        source_words="",
        source_width=0.25,
        source_height=0.25,
    )
    masked = graph.add(
        "StoryweftMaskedAttention",
        "Masked Attention",
        model=loader(),
        boxes=track(),
        clip=loader(1),
        prompt="a fox in the meadow by day",
        masked_part=0.25,
        masked_steps=0,
        spatial=True,
        temporal=True,
        cross=True,
        layers="auto",
        frame_rule="average",
        sampling="by area",
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=4)
    drawn = sampler(graph, masked(), masked(1), negative(), latent(), 3)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))()
    pictures = graph.add("ImageScaleBy", "Larger", image=pictures, upscale_method="lanczos", scale_by=3.0)()
    graph.add("SaveImage", "Save Pictures", images=pictures, filename_prefix="storyweft/boxes_image")
    shown = graph.add(
        "StoryweftBoxTrack",
        "Boxes on Pictures",
        boxes=track(1),
        frames=4,
        width=128,
        height=128,
        interpolation="linear",
        images=pictures,
        source_words="",
        source_width=0.25,
        source_height=0.25,
    )
    graph.add("SaveImage", "Save Boxes", images=shown(2), filename_prefix="storyweft/boxes_image_boxes")
    return graph.nodes, (
        "## Boxes in pictures\nFour pictures of one batch, each with its own box for the fox: **Box Track** holds two key frames, drag "
        "them in its editor. **Masked Attention** keeps fox and rest apart in the first quarter of the steps. Set *masked_part* 0 to see "
        "the pictures without boxes.\n\nFor real pictures swap **Demo Loader** for *Load Checkpoint* (SD1.5, SDXL), *masked_part* 0.1, "
        "*frames* 1 and batch_size 1; add objects as lines `words | 0: x0 y0 x1 y1`, each with its words in the prompt."
    )


def boxes_video() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    track = box_track(graph, "Box Track", "fox | 0: 0.02 0.44 0.48 0.9 | 1: 0.52 0.44 0.98 0.9\n", 8, 128, 128)
    alike = consistent(graph, loader(), layers="all")
    masked = masked_attention(graph, alike(), track(), 0.25, "a fox in the meadow by day", clip=loader(1), cross=True)
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size: batch = frames", width=128, height=128, batch_size=8)
    drawn = sampler(graph, masked(), masked(1), negative(), latent(), 5, 20)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=frames(), upscale_method="lanczos", scale_by=3.0)
    _clip_file(graph, _beside(graph, larger(), track, 8, 128, 128)(), "boxes_video", 8.0)
    return graph.nodes, (
        "## Boxes in a clip\nOne fox walks with its box from left to right: **Box Track** holds two key frames, **Masked Attention** "
        "keeps fox and rest apart, in space, in time and in words, for the first quarter of the steps. **Consistent Self-Attention** "
        "before it keeps the fox's colour, which the demo video model alone lets change from frame to frame; bypass it (Ctrl-B) to "
        "see that, or set *masked_part* 0 to see the clip without boxes.\n\nFor real clips swap the loader and leave out Consistent "
        "Self-Attention: *boxes_video_wan* shows Wan, *boxes_svd* SVD (no words: clip and prompt stay empty). AnimateDiff: *Load "
        "Checkpoint* (SD1.5, 512) and *Apply AnimateDiff Model* and *Use Evolved Sampling* before **Masked Attention**, 16 frames in "
        "*Box Track* and batch_size. There *masked_part* 0.05 to 0.1."
    )


def boxes_video_wan() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("UNETLoader", "Load Wan", unet_name="wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype="default")
    clip = graph.add(
        "CLIPLoader",
        "Load umT5",
        clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        type="wan",
        device="default",
    )
    vae = graph.add("VAELoader", "Load Wan VAE", vae_name="wan_2.1_vae.safetensors")
    shifted = graph.add("ModelSamplingSD3", "Shift", model=loader(), shift=8.0)
    track = box_track(graph, "Box Track", "red panda | 0: 0.02 0.4 0.37 0.9 | 1: 0.62 0.35 0.98 0.88\n", 33, 832, 480)
    prompt = "A red panda walks along a mossy branch in a misty bamboo forest, soft morning light, film grain."
    masked = masked_attention(graph, shifted(), track(), 0.1, prompt, clip=clip(), cross=True)
    negative = graph.add(
        "CLIPTextEncode", "Negative", clip=clip(), text="blurry, still picture, subtitles, watermark, deformed"
    )
    latent = graph.add("EmptyHunyuanLatentVideo", "Size", width=832, height=480, length=33, batch_size=1)
    drawn = graph.add(
        "KSampler",
        "KSampler",
        model=masked(),
        positive=masked(1),
        negative=negative(),
        latent_image=latent(),
        seed=3,
        steps=30,
        cfg=6.0,
        sampler_name="uni_pc",
        scheduler="simple",
        denoise=1.0,
    )
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=vae())
    both = _beside(graph, frames(), track, 33, 832, 480)
    video = graph.add("CreateVideo", "Create Video", images=both(), fps=16.0, bit_depth=8)
    graph.add(
        "SaveVideo",
        "Save Video",
        video=video(),
        filename_prefix="storyweft/boxes_video_wan",
        format="auto",
        codec="auto",
    )
    return graph.nodes, (
        "## Boxes on Wan\nA red panda walks with its box. Wan attends over the whole clip at once: *spatial* covers frames "
        "and time, *temporal* has nothing to do. **Box Track** counts the video's 33 frames; *length* must agree (or 1 frame for "
        "a box that stands).\n\nChoose your own Wan 2.1 or 2.2 files; *masked_part* 0.05 to 0.1 is the paper's range for U-Nets "
        "and was not tuned on Wan: raise it if the box is ignored, lower it if the picture suffers. Use *frame_rule* any for fast "
        "objects, because one latent frame holds four of the video."
    )


def boxes_svd() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("ImageOnlyCheckpointLoader", "Load SVD", ckpt_name="svd.safetensors")
    start = graph.add("LoadImage", "Start picture", image="example.png")
    track = box_track(graph, "Box Track", "object | 0: 0.05 0.4 0.4 0.9 | 1: 0.6 0.4 0.95 0.9\n", 14, 1024, 576)
    masked = masked_attention(graph, loader(), track(), 0.1, cross=False)
    guided = graph.add("VideoLinearCFGGuidance", "Guidance by frame", model=masked(), min_cfg=1.0)
    given = graph.add(
        "SVD_img2vid_Conditioning",
        "Start",
        clip_vision=loader(1),
        init_image=start(),
        vae=loader(2),
        width=1024,
        height=576,
        video_frames=14,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    drawn = graph.add(
        "KSampler",
        "KSampler",
        model=guided(),
        positive=given(),
        negative=given(1),
        latent_image=given(2),
        seed=3,
        steps=20,
        cfg=2.5,
        sampler_name="euler",
        scheduler="karras",
        denoise=1.0,
    )
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    _clip_file(graph, _beside(graph, frames(), track, 14, 1024, 576)(), "boxes_svd", 6.0)
    return graph.nodes, (
        "## Boxes on SVD\nSVD reads a picture and no words, so **Masked Attention** has no *clip* and *cross* is off: space and "
        "time alone are masked, and it is the words that place things in the paper. Expect the box to steer where motion happens "
        "rather than to create an object.\n\nDraw the first box around the thing that shall move in your own start picture; "
        "frames, *video_frames* and the size must agree. *svd_xt* has 25 frames."
    )


WORKFLOWS = (boxes_from_text, boxes_image, boxes_video, boxes_video_wan, boxes_svd)
