"""Graph and the parts that many workflows share."""


class Graph:
    """Nodes by number; `add` returns a function that gives links to their outputs."""

    def __init__(self):
        self.nodes = {}

    def add(self, node: str, title: str, **inputs):
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": node, "inputs": inputs, "_meta": {"title": title}}
        return lambda slot=0: [number, slot]


PLACES = (
    "in the forest by day",
    "on the beach at sunset",
    "in the snow by day",
    "in the city at night",
    "in the meadow by day",
    "in the desert at sunset",
    "in the forest at night",
    "in the city by day",
    "on the beach by day",
    "in the snow at sunset",
    "in the desert at night",
    "in the meadow at sunset",
)


def demo_story(graph: Graph, characters: str, panels: str, id_panels: int, chosen: str = "all"):
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    script = graph.add(
        "StoryweftScript", "Story Script", characters=characters, panels=panels, id_panels=id_panels, style=""
    )
    positive = graph.add(
        "StoryweftPanelConditioning", "Panel Conditioning", clip=loader(1), story=script(), panels=chosen
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    return loader, script, positive, negative


def consistent(graph: Graph, model, share_early=1.0, first_step=0, layers="output path"):
    """The published numbers are 0.7 and 1, for 50 steps; the small demo model settles colours in the first of its 24."""
    return graph.add(
        "StoryweftConsistentSelfAttention",
        "Consistent Self-Attention",
        model=model,
        sampling_ratio=0.5,
        draw_seed=0,
        layers=layers,
        share_early=share_early,
        share_late=0.9,
        late_from=20,
        first_step=first_step,
        window=0,
        start_percent=0.0,
        end_percent=1.0,
    )


def sheet(graph: Graph, latent, vae, story, name: str, layout="grid", larger=3.0):
    pictures = graph.add("VAEDecode", "Decode", samples=latent, vae=vae)()
    if larger != 1:
        pictures = graph.add("ImageScaleBy", "Larger", image=pictures, upscale_method="lanczos", scale_by=larger)()
    sheet = graph.add(
        "StoryweftStoryboard",
        "Storyboard",
        images=pictures,
        story=story,
        captions="",
        layout=layout,
        columns=0,
        caption_position="below",
        font_size=0,
        gap=12,
        background="#ffffff",
    )
    graph.add("SaveImage", "Save Sheet", images=sheet(), filename_prefix=f"storyweft/{name}")
    return pictures


def sampler(graph: Graph, model, positive, negative, latent, seed: int, steps=24, cfg=4.0):
    return graph.add(
        "KSampler",
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="ddim",
        scheduler="normal",
        denoise=1.0,
    )
