"""Sets of pictures in one style."""

from .graph import Graph, demo_story, sampler, sheet

LIGHT = "\n".join(
    (
        "a fox in the forest at night # At night",
        "an owl in the snow # all of them",
        "a bear in the city # are of one colour,",
        "a robot on the beach # and nobody said which.",
    )
)


GIVEN = "\n".join(
    (
        "a fox on the beach at sunset # The picture that was given.",
        "an elephant in the desert # The desert takes its light,",
        "a rabbit in the forest # the forest too,",
        "a dinosaur in the snow # and everybody its colours.",
    )
)


def _style(graph: Graph, model, shift=0.0, group_norm=True):
    return graph.add(
        "StoryweftStyleAligned",
        "StyleAligned",
        model=model,
        shared_score_shift=shift,
        shared_score_scale=1.0,
        only_self_level=0.0,
        share_group_norm=group_norm,
        share_attention=True,
        adain_queries=True,
        adain_keys=True,
        adain_values=False,
        full_attention_share=False,
        control_first_picture=False,
        start_percent=0.0,
        end_percent=1.0,
    )


def style_set() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(graph, "", LIGHT, 0)
    block = _style(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = sampler(graph, block(), positive(), negative(), latent(), 5)
    sheet(graph, drawn(), loader(2), script(), "style_set")
    return graph.nodes, (
        "## Style set\nFour kinds in four places. Only the first prompt says *at night*, and none names a colour: the other "
        "pictures take light and colours from the first, which is what it would be alone. Bypass **StyleAligned** (Ctrl-B) to see the "
        "difference.\n\nFor real pictures see *style_set_sdxl*, or swap **Demo Loader** for an SD1.5 checkpoint at 512, 50 steps, cfg 7.5."
    )


def style_from_picture() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(graph, "", GIVEN, 0)
    alone = graph.add(
        "CLIPTextEncode", "Prompt of the given picture", clip=loader(1), text="a fox on the beach at sunset"
    )
    one = graph.add("EmptyLatentImage", "One picture", width=128, height=128, batch_size=1)
    first = sampler(graph, loader(), alone(), negative(), one(), 2)
    given = graph.add("VAEDecode", "The given picture", samples=first(), vae=loader(2))
    encoded = graph.add("VAEEncode", "Encode", pixels=given(), vae=loader(2))
    block = _style(graph, loader(), 0.69)
    reference = graph.add(
        "StoryweftStyleReference",
        "Style Reference Picture",
        model=block(),
        positive=positive(),
        negative=negative(),
        latent=encoded(),
        batch_size=script(1),
        steps=24,
        scheduler="normal",
        inversion_cfg=2.0,
        offset=2,
    )
    drawn = sampler(graph, reference(), positive(), negative(), reference(1), 5)
    sheet(graph, drawn(), loader(2), script(), "style_from_picture")
    return graph.nodes, (
        "## Style from a picture\nThe given picture is inverted to noise and replayed as the first of the batch; the others take its "
        "light and colours. Here another sampler draws it, so that nothing must be loaded: put *Load Image* in place of **The given "
        "picture** for your own, and describe it in the first line of the script.\n\nSampler and **Style Reference Picture** need the "
        "same steps and scheduler. SDXL: 50 steps, offset 5, cfg 10, negative through *ConditioningZeroOut*."
    )


def style_set_sdxl() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors")
    script = graph.add(
        "StoryweftScript",
        "Story Script",
        characters="",
        id_panels=0,
        panels="a toy train # Train\na toy airplane # Airplane\na toy bicycle # Bicycle\na toy car # Car",
        style="{prompt}, macro photo, 3d game asset",
    )
    positive = graph.add(
        "StoryweftPanelConditioning", "Panel Conditioning", clip=loader(1), story=script(), panels="all"
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    block = _style(graph, loader(), group_norm=False)
    latent = graph.add("EmptyLatentImage", "Size", width=1024, height=1024, batch_size=script(1))
    drawn = sampler(graph, block(), positive(), negative(), latent(), 10, 50, 5.0)
    sheet(graph, drawn(), loader(2), script(), "style_set_sdxl", larger=1)
    return graph.nodes, (
        "## Style set on SDXL\nThe authors' settings: DDIM, 50 steps, cfg 5, share_group_norm off. Choose your own SDXL checkpoint. "
        "The first picture sets the style; repeat its prompt and seed with new lines after it to draw more of the set. With a "
        "ControlNet (strength 0.8) only the pictures after the first are steered."
    )


WORKFLOWS = (style_set, style_from_picture, style_set_sdxl)
