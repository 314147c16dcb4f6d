"""Pictures of subjects beside the text."""

from .graph import Graph, sampler


def _subject(graph: Graph, image, mask, title="Subject", crop=True, vae_size=256):
    return graph.add(
        "StoryweftSubject",
        title,
        image=image,
        mask=mask,
        ground="black",
        crop=crop,
        margin=0.05,
        edge="soft",
        resize_mask=False,
        vae_size=vae_size,
    )


def _aligned(graph: Graph, model, adapter, vision, image, title="Adaptive Prompt Alignment", **more):
    factors = {f"{branch}_{path}": 1.0 for branch in ("text", "image") for path in ("input", "middle", "output")}
    inputs = {
        "alpha_text": 1.0,
        "alpha_image": 1.0,
        "guidance": "IP-Adapter",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "text_at_end": 1.0,
        "image_at_end": 1.0,
    }
    return graph.add(
        "StoryweftAdaptivePromptAlignment",
        title,
        model=model,
        image_adapter=adapter,
        clip_vision=vision,
        image=image,
        **(inputs | factors | more),
    )


def _demo_subjects(graph: Graph, *names: str):
    """Loader, adapter, and the cut-out of each named demo subject."""
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    adapter = graph.add(
        "StoryweftLoadImageAdapter",
        "Load Image Adapter",
        file="demo adapter (comes with Storyweft)",
        learned_alphas="none",
    )
    cut = []
    for name in names:
        shown = graph.add("StoryweftDemoSubject", "Demo Subject", subject=name)
        cut.append(_subject(graph, shown(), shown(1)))
        graph.add("PreviewImage", "Cut out", images=cut[-1]())
    return loader, adapter, cut


def _drawn(graph: Graph, loader, model, text: str, batch: int, seed: int, name: str) -> None:
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text=text)
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=batch)
    drawn = sampler(graph, model, positive(), negative(), latent(), seed)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=pictures(), upscale_method="lanczos", scale_by=3.0)
    graph.add("SaveImage", "Save", images=larger(), filename_prefix=f"storyweft/{name}")


def subject_and_text() -> tuple[dict, str]:
    graph = Graph()
    loader, adapter, (cut,) = _demo_subjects(graph, "blue fox")
    model = _aligned(graph, loader(), adapter(), loader(3), cut())
    _drawn(graph, loader, model(), "a fox in the snow by day", 4, 5, "subject_and_text")
    return graph.nodes, (
        "## Subject and text\nThe fox of the picture, in the place the prompt names. **Subject** cuts it out; **Adaptive Prompt "
        "Alignment** adds its answer to that of the text in every cross-attention layer. *alpha_image* 0 is the plain model, more is "
        "more of the picture; *alpha_text* below 1 lets it win over the prompt.\n\nFor your own pictures: *Load Image* and *Remove "
        "Background* instead of **Demo Subject**, a checkpoint, its CLIP vision and its IP-Adapter: see *subject_and_text_sdxl*."
    )


def two_subjects() -> tuple[dict, str]:
    graph = Graph()
    loader, adapter, cut = _demo_subjects(graph, "blue fox", "red bear with a crown")
    empty = graph.add("SolidMask", "Nothing", value=0.0, width=128, height=128)
    half = graph.add("SolidMask", "Half", value=1.0, width=64, height=128)
    model = loader
    for title, left, subject in (("left", 0, cut[0]), ("right", 64, cut[1])):
        region = graph.add(
            "MaskComposite", f"The {title}", destination=empty(), source=half(), x=left, y=0, operation="add"
        )
        model = _aligned(
            graph, model(), adapter(), loader(3), subject(), f"On the {title}", alpha_image=2.0, region=region()
        )
    _drawn(graph, loader, model(), "a rabbit drawn twice in the meadow by day", 4, 7, "two_subjects")
    return graph.nodes, (
        "## Two subjects\nOne **Adaptive Prompt Alignment** after the other, each with a *region*: the picture of the fox acts on the "
        "left half, that of the bear on the right. The text, which here names two rabbits, acts everywhere: they take the colours of "
        "their pictures. *alpha_image* is 2, because the demo model wants two characters of one scene to be alike and has to be "
        "overruled.\n\n*alpha_text* of several nodes multiply: leave all but one at 1."
    )


def _magdiff(graph: Graph, loader, image, mask):
    """The demo model with all three alignments of MagDiff for what `mask` keeps of a picture of 128 pixels."""
    adapter = graph.add(
        "StoryweftLoadImageAdapter",
        "Load Image Adapter",
        file="demo adapter (comes with Storyweft)",
        learned_alphas="none",
    )
    trained = graph.add(
        "StoryweftLoadMagDiff",
        "Load MagDiff",
        file="demo alignment (comes with Storyweft)",
        image_adapter=adapter(),
    )
    seen = _subject(graph, image, mask, "Seen by CLIP")
    placed = _subject(graph, image, mask, "In its place", False, 128)
    graph.add("PreviewImage", "What is kept", images=placed(1))
    beside = graph.add(
        "StoryweftHighFidelityAlignment",
        "High-Fidelity Alignment",
        model=loader(),
        magdiff=trained(),
        vae=loader(2),
        image=placed(1),
        strength=1.0,
        guidance="MagDiff",
        every_frame=False,
        ground="black",
    )
    return _aligned(graph, beside(), trained(1), loader(3), seen(), guidance="MagDiff")


def subject_video() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    shown = graph.add("StoryweftDemoSubject", "Demo Subject", subject="blue fox")
    model = _magdiff(graph, loader, shown(), shown(1))
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="a fox in the meadow by day")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size: batch = frames", width=128, height=128, batch_size=8)
    drawn = sampler(graph, model(), positive(), negative(), latent(), 3, 20)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=frames(), upscale_method="lanczos", scale_by=3.0)
    graph.add(
        "SaveAnimatedWEBP",
        "Save Clip",
        images=larger(),
        filename_prefix="storyweft/subject_video",
        fps=8.0,
        lossless=False,
        quality=90,
        method="default",
    )
    return graph.nodes, (
        "## Subject video\nMagDiff's three alignments on the demo video model: **Subject** cuts the fox out, **High-Fidelity "
        "Alignment** puts its latents beside the noise of the first frame, **Adaptive Prompt Alignment** with learned alphas lets all "
        "frames look at it.\n\nNobody published weights: train your own with `python -m training.magdiff`. The demo's are small, and "
        "its video model is undertrained."
    )


def keep_region() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    shown = graph.add("StoryweftDemoSubject", "Demo Subject", subject="blue fox")
    rest = graph.add("InvertMask", "Everything but the fox", mask=shown(1))
    model = _magdiff(graph, loader, shown(), rest())
    _drawn(graph, loader, model(), "a bear in the city by day", 4, 5, "keep_region")
    return graph.nodes, (
        "## Keep a region\nMagDiff's way of editing: what is kept is the subject. Here everything but the fox is kept, and the prompt "
        "asks for a bear. The demo's weights are undertrained and keep the scene only roughly; to keep it exactly add *Set Latent "
        "Noise Mask*.\n\nSwap the mask's **Invert Mask** out "
        "to keep the fox and draw a new scene instead."
    )


def subject_and_text_sdxl() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors")
    vision = graph.add("CLIPVisionLoader", "CLIP Vision", clip_name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    adapter = graph.add(
        "StoryweftLoadImageAdapter",
        "Load Image Adapter",
        file="ip-adapter-plus_sdxl_vit-h.safetensors",
        learned_alphas="none",
    )
    image = graph.add("LoadImage", "Your subject", image="example.png")
    remover = graph.add(
        "LoadBackgroundRemovalModel", "Background Removal Model", bg_removal_name="birefnet.safetensors"
    )
    mask = graph.add("RemoveBackground", "Remove Background", bg_removal_model=remover(), image=image())
    cut = _subject(graph, image(), mask())
    graph.add("PreviewImage", "Cut out", images=cut())
    model = _aligned(graph, loader(), adapter(), vision(), cut(), alpha_image=0.7)
    positive = graph.add(
        "CLIPTextEncode", "Prompt", clip=loader(1), text="riding a bicycle through the snow, photograph"
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="blurry, deformed")
    latent = graph.add("EmptyLatentImage", "Size", width=1024, height=1024, batch_size=1)
    drawn = sampler(graph, model(), positive(), negative(), latent(), 5, 30, 6.0)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    graph.add("SaveImage", "Save", images=pictures(), filename_prefix="storyweft/subject_and_text_sdxl")
    return graph.nodes, (
        "## Subject and text on SDXL\nPut *ip-adapter-plus_sdxl_vit-h.safetensors* of h94/IP-Adapter into models/ipadapter, its ViT-H "
        "encoder into models/clip_vision and a BiRefNet model into models/background_removal. SAM3 or a painted mask do as well. "
        "Start at *alpha_image* 0.7; more keeps more of the picture and less of the prompt."
    )


WORKFLOWS = (subject_and_text, two_subjects, subject_video, keep_region, subject_and_text_sdxl)
