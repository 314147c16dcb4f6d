"""StoryGen: stories and portraits with the demo weights and the published ones, and reference attention without any."""

from .graph import Graph, sampler, sheet

DEMO = "demo weights (come with Storyweft)"
CHARACTERS = "[Rex] a fox"
PANELS = (
    "[Rex] in the forest by day # Once upon a time there was a fox in the forest.\n"
    "[Rex] on the beach at sunset # He wandered down to the sea.\n"
    "[Rex] in the snow by day # Winter came early that year.\n"
    "[Rex] in the city at night # The city lights kept him awake.\n"
    "[Rex] in the meadow by day # Then he found a meadow.\n"
    "[Rex] in the desert at sunset # And far behind it, the desert."
)


def _demo(graph: Graph):
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    return loader, graph.add("StoryweftStoryGenWeights", "StoryGen demo weights", model=loader(), weights_name=DEMO)


def _story(graph: Graph, model, clip, vae, story, latent, name="StoryGen Story", **more):
    settings = {
        "prompts": "",
        "negative": "",
        "seed": 4,
        "steps": 25,
        "window": 3,
        "text_scale": 4.0,
        "image_scale": 2.0,
        "strength": 1.0,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "reference_range": "as trained",
        "keep_panels": True,
    } | more
    return graph.add(
        "StoryweftStoryGenStory", name, model=model, clip=clip, vae=vae, latent_image=latent, story=story, **settings
    )


def _script(graph: Graph, panels: str):
    return graph.add("StoryweftScript", "Story Script", characters=CHARACTERS, panels=panels, id_panels=1, style="")


def _references(graph: Graph, images, captions: str, clip, vae, side: int, title="References", **more):
    return graph.add(
        "StoryweftStoryGenReferences",
        title,
        images=images,
        captions=captions,
        clip=clip,
        vae=vae,
        width=side,
        height=side,
        ground="white",
        **more,
    )


def storygen_story() -> tuple[dict, str]:
    graph = Graph()
    loader, model = _demo(graph)
    script = _script(graph, PANELS)
    size = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    story = _story(graph, model(), loader(1), loader(2), script(), size())
    graph.add("PreviewAny", "What each panel read", source=story(1))
    sheet(graph, story(), loader(2), script(), "storygen_story")
    return graph.nodes, (
        "## A story with StoryGen\nThe first panel comes from its prompt alone, every other from its prompt and the three panels before "
        "it: **StoryGen Story** noises them, the older the more, and lets the new picture look at them. Each panel is saved as soon as "
        "it is done.\n\nThe demo weights are small and trained for minutes; docs/story_gen.md says what they do and what they do not. "
        "With the published weights see *storygen_story_sd15*."
    )


def storygen_portraits() -> tuple[dict, str]:
    graph = Graph()
    loader, model = _demo(graph)
    shown = graph.add("StoryweftDemoSubject", "Portrait", subject="blue fox")
    graph.add("PreviewImage", "The portrait", images=shown())
    portraits = _references(graph, shown(), "a fox in the city by day", loader(1), loader(2), 128, "Portraits")
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="a fox in the snow by day")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    guider = graph.add(
        "StoryweftStoryGenGuider",
        "StoryGen Guider",
        model=model(),
        positive=positive(),
        negative=negative(),
        references=portraits(),
        stage="multi-image-condition",
        text_scale=4.0,
        image_scale=2.0,
        strength=1.0,
        reference_seed=0,
        reference_range="as trained",
    )
    graph.add("PreviewAny", "What it takes", source=guider(1))
    noise = graph.add("RandomNoise", "Noise", noise_seed=7)
    chosen = graph.add("KSamplerSelect", "Sampler", sampler_name="ddim")
    steps = graph.add("BasicScheduler", "Steps", model=model(), scheduler="ddim_uniform", steps=25, denoise=1.0)
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=4)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        "Draw",
        noise=noise(),
        guider=guider(),
        sampler=chosen(),
        sigmas=steps(),
        latent_image=latent(),
    )
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=pictures(), upscale_method="lanczos", scale_by=3.0)
    graph.add("SaveImage", "Save", images=larger(), filename_prefix="storyweft/storygen_portraits")
    return graph.nodes, (
        "## Portraits\nA portrait with its caption, in stage *multi-image-condition*: all references get the same little noise, their "
        "order does not count. *image_scale* is the pull of the portrait, *text_scale* that of the prompt; 1 for image_scale leaves "
        "the grey branch out. Chain **StoryGen References** for more portraits; beyond three is beyond training.\n\nFor a story that "
        "reads portraits and its own panels, connect them to *portraits* of **StoryGen Story**."
    )


def storygen_story_sd15() -> tuple[dict, str]:
    graph = Graph()
    model = graph.add("StoryweftStoryGenLoader", "Load StoryGen U-Net", unet_name="storygen_storysalon_unet.bin")
    loader = graph.add(
        "CheckpointLoaderSimple", "SD1.5 for CLIP and VAE", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"
    )
    prompts = (
        "Once upon a time there was a little white cat in the forest.\n"
        "The little white cat met a big brown dog near the river.\n"
        "The little white cat and the big brown dog played in the snow.\n"
        "The little white cat slept under a tree."
    )
    size = graph.add("EmptyLatentImage", "Size", width=512, height=512, batch_size=1)
    settings = {"prompts": prompts, "steps": 40, "text_scale": 7.0, "image_scale": 3.5, "window": 1}
    inputs = {
        "negative": "",
        "seed": 4,
        "strength": 1.0,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "reference_range": "as trained",
        "keep_panels": True,
    }
    story = graph.add(
        "StoryweftStoryGenStory",
        "StoryGen Story",
        model=model(),
        clip=loader(1),
        vae=loader(2),
        latent_image=size(),
        **(inputs | settings),
    )
    graph.add("PreviewAny", "What each panel read", source=story(1))
    pictures = graph.add("VAEDecode", "Decode", samples=story(), vae=loader(2))
    graph.add("SaveImage", "Save", images=pictures(), filename_prefix="storyweft/storygen_story_sd15")
    return graph.nodes, (
        "## StoryGen with the published weights\nPut unet/diffusion_pytorch_model.bin of haoningwu/StoryGen "
        "(checkpoint_StorySalon) into models/diffusion_models as *storygen_storysalon_unet.bin* (3.6 GB); text encoder and VAE are those "
        "of any SD1.5 checkpoint. Authors: 512 x 512, ddim, 40 steps, scales 7 and 3.5, several seeds of which they keep the best."
    )


def reference_attention() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    shown = graph.add("StoryweftDemoSubject", "Reference", subject="green owl with a crown")
    graph.add("PreviewImage", "The reference", images=shown())
    references = _references(graph, shown(), "an owl in the desert at sunset", loader(1), loader(2), 128)
    model = graph.add(
        "StoryweftReferenceAttention",
        "Reference Attention",
        model=loader(),
        references=references(),
        stage="multi-image-condition",
        strength=0.5,
        reference_seed=0,
    )
    graph.add("PreviewAny", "What it takes", source=model(1))
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="an owl in the forest by day")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=4)
    drawn = sampler(graph, model(), positive(), negative(), latent(), 5)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=pictures(), upscale_method="lanczos", scale_by=3.0)
    graph.add("SaveImage", "Save", images=larger(), filename_prefix="storyweft/reference_attention")
    return graph.nodes, (
        "## Reference attention\nNo training and no weights: the model passes over the noised reference with its caption, and the rows "
        "of the prompt look at what its self-attention held. Works on SD1.5, SD2 and SDXL; for SDXL give references of 1024 x 1024. "
        "It is not StoryGen, whose attention is trained for this."
    )


WORKFLOWS = (storygen_story, storygen_portraits, storygen_story_sd15, reference_attention)
