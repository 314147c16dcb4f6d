"""Clips between story pictures."""

from .graph import Graph, consistent, demo_story, sampler

VIDEO_STEPS = 20


def _pictures(graph: Graph, characters: str, panels: str, seed: int):
    """Panels of a consistent story, drawn by the demo picture model, and its loader."""
    loader, _, positive, negative = demo_story(graph, characters, panels, 2)
    count = len(panels.splitlines())
    model = consistent(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=count)
    drawn = sampler(graph, model(), positive(), negative(), latent(), seed)
    pictures = graph.add("VAEDecode", "Story pictures", samples=drawn(), vae=loader(2))
    graph.add("PreviewImage", "Story", images=pictures())
    return pictures


def _predicted(graph: Graph, video, adapter, pictures, text: str, **more):
    positive = graph.add("CLIPTextEncode", "Prompt", clip=video(1), text=text)
    negative = graph.add("CLIPTextEncode", "Negative", clip=video(1), text="")
    inputs = {
        "model": video(),
        "positive": positive(),
        "negative": negative(),
        "clip_vision": video(3),
        "first": pictures(),
        "frames_per_transition": 8,
        "image_adapter": adapter(),
        "strength": 1.0,
        "attach": "automatic",
        "ends": "as trained",
    }
    return graph.add("StoryweftSemanticMotionPredictor", "Semantic Motion Predictor", **(inputs | more))


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


def _demo_adapter(graph: Graph):
    return graph.add(
        "StoryweftLoadImageAdapter",
        "Load Image Adapter",
        file="demo adapter (comes with Storyweft)",
        learned_alphas="none",
    )


def motion_between_pictures() -> tuple[dict, str]:
    graph = Graph()
    pictures = _pictures(graph, "[Fox] a fox", "[Fox] in the forest by day\n[Fox] in the forest by day", 4)
    video = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    predicted = _predicted(graph, video, _demo_adapter(graph), pictures, "a fox in the forest by day")
    latent = graph.add(
        "StoryweftKeyframeLatent",
        "Keyframe Latent",
        vae=video(2),
        first=pictures(),
        frames_per_transition=8,
        keep_pictures=True,
    )
    drawn = sampler(graph, predicted(), predicted(1), predicted(2), latent(), 3, VIDEO_STEPS)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=video(2))
    _film(graph, frames, "motion_between_pictures")
    return graph.nodes, (
        "## Motion between pictures\nTwo pictures of one story and the clip from one to the other. **Semantic Motion Predictor** "
        "describes both with CLIP vision and gives each of the eight frames an embedding of its own, which the video model reads "
        "through the adapter; **Keyframe Latent** keeps the two pictures as first and last frame.\n\nFor your own pictures: *Load "
        "Image* into *first* and *last*, AnimateDiff with ip-adapter_sd15 (see *Load Image Adapter*), 16 frames a transition; for "
        "SVD see *motion_between_pictures_svd*. The demo video model is small and undertrained."
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


WORKFLOWS = (motion_between_pictures, motion_between_pictures_svd)
