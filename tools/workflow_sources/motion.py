"""Clips between story pictures."""

from .graph import Graph, consistent, demo_story, sampler

VIDEO_STEPS = 20


def _pictures(graph: Graph, characters: str, panels: str, seed: int):
    """Panels of a consistent story, drawn by the demo picture model, and their conditioning."""
    loader, _, positive, negative = demo_story(graph, characters, panels, 2)
    count = len(panels.splitlines())
    model = consistent(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=count)
    drawn = sampler(graph, model(), positive(), negative(), latent(), seed)
    pictures = graph.add("VAEDecode", "Story pictures", samples=drawn(), vae=loader(2))
    graph.add("PreviewImage", "Story", images=pictures())
    return pictures, positive


def _predicted(graph: Graph, model, video, positive, pictures):
    """The predictor with its demo weights between `pictures`, eight frames a transition."""
    negative = graph.add("CLIPTextEncode", "Negative", clip=video(1), text="")
    trained = graph.add(
        "StoryweftLoadMotionPredictor", "Load Motion Predictor", file="demo predictor (comes with Storyweft)"
    )
    inputs = {
        "model": model,
        "positive": positive,
        "negative": negative(),
        "clip_vision": video(3),
        "first": pictures(),
        "frames_per_transition": 8,
        "motion_predictor": trained(),
        "strength": 1.0,
        "attach": "automatic",
        "ends": "as trained",
    }
    return graph.add("StoryweftSemanticMotionPredictor", "Semantic Motion Predictor", **inputs)


def _between(graph: Graph, predicted, video, pictures, seed: int):
    """Sampled frames, decoded; the pictures stay in the clip."""
    latent = graph.add(
        "StoryweftKeyframeLatent",
        "Keyframe Latent",
        vae=video(2),
        first=pictures(),
        frames_per_transition=8,
        keep_pictures=True,
    )
    drawn = sampler(graph, predicted(), predicted(1), predicted(2), latent(), seed, VIDEO_STEPS)
    return graph.add("VAEDecode", "Decode", samples=drawn(), vae=video(2))


def _film(graph: Graph, frames, name: str, fps=8.0) -> None:
    larger = graph.add("ImageScaleBy", "Larger", image=frames(), upscale_method="lanczos", scale_by=3.0)
    graph.add(
        "SaveAnimatedWEBP",
        "Save Clip",
        images=larger(),
        filename_prefix=f"storyweft/{name}",
        fps=fps,
        lossless=False,
        quality=90,
        method="default",
    )


def motion_between_pictures() -> tuple[dict, str]:
    graph = Graph()
    pictures, _ = _pictures(graph, "[Fox] a fox", "[Fox] in the forest by day\n[Fox] in the forest by day", 4)
    video = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    positive = graph.add("CLIPTextEncode", "Prompt", clip=video(1), text="a fox in the forest by day")
    predicted = _predicted(graph, video(), video, positive(), pictures)
    _film(graph, _between(graph, predicted, video, pictures, 3), "motion_between_pictures")
    return graph.nodes, (
        "## Motion between pictures\nTwo pictures of one story and the clip from one to the other. **Semantic Motion Predictor** "
        "describes both with CLIP vision and predicts an embedding for each of the eight frames, which the video model reads "
        "through the adapter trained with it; **Keyframe Latent** keeps the two pictures as first and last frame.\n\n"
        "For your own pictures: *Load Image* into *first* and *last*, AnimateDiff with ip-adapter_sd15 (see *Load Image "
        "Adapter*), 16 frames a transition; for SVD see *motion_between_pictures_svd*. The demo video model is small and "
        "undertrained."
    )


def story_to_film() -> tuple[dict, str]:
    graph = Graph()
    panels = "\n".join(
        f"[Fox] {place}" for place in ("in the forest by day", "in the meadow by day", "on the beach at sunset")
    )
    pictures, positive = _pictures(graph, "[Fox] a fox", panels, 4)
    video = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    windows = graph.add(
        "ContextWindowsManual",
        "One window a transition",
        model=video(),
        context_length=8,
        context_overlap=1,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=0,
        freenoise=False,
        cond_retain_index_list="",
        split_conds_to_windows=False,
        latent_retain_index_list="",
        causal_window_fix=False,
    )
    predicted = _predicted(graph, windows(), video, positive(), pictures)
    _film(graph, _between(graph, predicted, video, pictures, 3), "story_to_film")
    return graph.nodes, (
        "## Story to film\nA consistent story of three panels, then a film through them: 15 frames, eight from one panel to the next, "
        "neighbouring transitions sharing a panel. **Panel Conditioning** goes into the predictor too: each frame reads the prompt "
        "of the nearer panel. *Context Windows* of 8 frames with overlap 1 hold exactly one transition each, which is what the demo "
        "video model was trained for; **Keyframe Latent** keeps the panels in the film.\n\nChange the panels in **Story Script**: the "
        "number of frames follows."
    )


def motion_between_pictures_svd() -> tuple[dict, str]:
    graph = Graph()
    svd = graph.add("ImageOnlyCheckpointLoader", "SVD", ckpt_name="svd_xt.safetensors")
    first = graph.add("LoadImage", "First picture", image="example.png")
    last = graph.add("LoadImage", "Last picture", image="example.png")
    conditioned = graph.add(
        "SVD_img2vid_Conditioning",
        "SVD Conditioning",
        clip_vision=svd(1),
        init_image=first(),
        vae=svd(2),
        width=1024,
        height=576,
        video_frames=25,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    trained = graph.add("StoryweftLoadMotionPredictor", "Load Motion Predictor", file="motion_predictor.safetensors")
    predicted = graph.add(
        "StoryweftSemanticMotionPredictor",
        "Semantic Motion Predictor",
        model=svd(),
        positive=conditioned(),
        negative=conditioned(1),
        clip_vision=svd(1),
        first=first(),
        last=last(),
        frames_per_transition=25,
        motion_predictor=trained(),
        strength=1.0,
        attach="automatic",
        ends="as trained",
    )
    guided = graph.add("VideoLinearCFGGuidance", "Linear CFG", model=predicted(), min_cfg=1.0)
    drawn = sampler(graph, guided(), predicted(1), predicted(2), conditioned(2), 3, 20, 2.5)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=svd(2))
    _film(graph, frames, "motion_between_pictures_svd", 6.0)
    return graph.nodes, (
        "## Motion between pictures, SVD\nSVD reads one CLIP embedding for each frame. It has no input for a last picture: the "
        "embeddings alone pull the end of the clip towards it, weakly. Put a predictor you trained (`python -m "
        "training.motion_predictor`) into models/motion_predictor, or unplug *motion_predictor* for plain interpolation."
    )


WORKFLOWS = (motion_between_pictures, story_to_film, motion_between_pictures_svd)
