"""The example workflows as API graphs; tools/make_workflows.py turns them into what the page opens."""

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


CAPTIONS = (
    "One morning the fox left the forest,",
    "rested by the sea,",
    "climbed the snowy hills",
    "and reached the city at night.",
    "The meadow was wide,",
    "the desert wider.",
    "Back in the dark wood",
    "it missed the streets,",
    "so it ran along the beach,",
    "over the hills again,",
    "slept under desert stars",
    "and came home at dusk.",
)


FOX = "\n".join(f"[Fox] {place} # {caption}" for place, caption in zip(PLACES, CAPTIONS, strict=True))


TWO = "\n".join(
    (
        "[Fox] in the forest by day # The fox lives in the forest,",
        "[Fox] in the meadow by day # and walks in the meadow.",
        "[Robot] in the city at night # The robot lives in the city,",
        "[Robot] in the city by day # which never sleeps.",
        "[Fox] on the beach at sunset # They both like the sea.",
        "[Robot] on the beach at sunset # Here is where they met.",
        "[NC] an owl in the forest at night # Only the owl saw the robot leave.",
        "[Fox] in the city at night # The fox went to look for it.",
    )
)


class Graph:
    """Nodes by number; `add` returns a function that gives links to their outputs."""

    def __init__(self):
        self.nodes = {}

    def add(self, node: str, title: str, **inputs):
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": node, "inputs": inputs, "_meta": {"title": title}}
        return lambda slot=0: [number, slot]


def _demo(graph: Graph, characters: str, panels: str, id_panels: int, chosen: str = "all"):
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    script = graph.add(
        "StoryweftScript", "Story Script", characters=characters, panels=panels, id_panels=id_panels, style=""
    )
    positive = graph.add(
        "StoryweftPanelConditioning", "Panel Conditioning", clip=loader(1), story=script(), panels=chosen
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    return loader, script, positive, negative


def _block(graph: Graph, model, share_early=1.0, first_step=0, layers="output path"):
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


def _sheet(graph: Graph, latent, vae, story, name: str, layout="grid", larger=3.0):
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


def _story_sampler(graph: Graph, model, positive, negative, latent, seed: int):
    return graph.add(
        "StoryweftStorySampler",
        "Story Sampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=24,
        cfg=4.0,
        sampler_name="ddim",
        scheduler="normal",
        denoise=1.0,
        memory="auto",
        panels_at_once=1,
        panel_seeds="",
        keep_panels=True,
    )


def _sampler(graph: Graph, model, positive, negative, latent, seed: int, steps=24, cfg=4.0):
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


def consistent_story() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = _demo(graph, "[Fox] a fox", "\n".join(FOX.splitlines()[:4]), 4)
    block = _block(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = _sampler(graph, block(), positive(), negative(), latent(), 7)
    pictures = _sheet(graph, drawn(), loader(2), script(), "consistent_story")
    graph.add("SaveImage", "Save Panels", images=pictures, filename_prefix="storyweft/consistent_story_panel")
    return graph.nodes, (
        "## Consistent story\nFour panels drawn as one batch; **Consistent Self-Attention** lets them look at each other, so the fox keeps "
        "its colour and hat. Bypass that node (Ctrl-B) to see the difference.\n\nFor real pictures swap **Demo Loader** for *Load "
        "Checkpoint* (SD1.5 at 512, SDXL at 1024), 50 steps, cfg 5, share_early 0.7, first_step 1."
    )


def long_story() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = _demo(graph, "[Fox] a fox", FOX, 4)
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    drawn = _story_sampler(graph, _block(graph, loader())(), positive(), negative(), latent(), 9)
    _sheet(graph, drawn(), loader(2), script(), "long_story")
    graph.add("StoryweftSaveCharacter", "Save Character", character=drawn(1), filename_prefix="demo")
    graph.add("PreviewAny", "Report", source=drawn(2))
    return graph.nodes, (
        "## Long story\nThe first four panels define the fox and are drawn together; the other eight read its bank one at a time, so "
        "memory does not grow with the story. Finished panels are kept: change one line and only what depends on it is drawn again. "
        "*panel_seeds* `7: 5` redoes panel 7 alone.\n\nThe character is saved; workflow **saved_character** uses it."
    )


def two_characters() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = _demo(graph, "[Fox] a fox\n[Robot] a robot", TWO, 2)
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    drawn = _story_sampler(graph, _block(graph, loader())(), positive(), negative(), latent(), 2)
    _sheet(graph, drawn(), loader(2), script(), "two_characters", "comic")
    return graph.nodes, (
        "## Two characters\nEach character is defined by the first two panels that name only it. Panels read the characters they name; "
        "`[NC]` panels read nobody. The demo model has never seen two kinds in one picture, so no panel here shows both; with a real "
        "checkpoint write both tags in one line."
    )


def saved_character() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = _demo(
        graph,
        "[Fox] a fox",
        "[Fox] in the city at sunset # Years later.\n[Fox] in the snow at night # The same fox.",
        0,
    )
    saved = graph.add("StoryweftLoadCharacter", "Load Character", file="demo_Fox.safetensors")
    model = graph.add("StoryweftRecallCharacter", "Recall Character", model=loader(), character=saved())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = _sampler(graph, model(), positive(), negative(), latent(), 21)
    _sheet(graph, drawn(), loader(2), script(), "saved_character", "strip")
    return graph.nodes, (
        "## Saved character\nRun **long_story** first: it saves `demo_Fox.safetensors`. Its fox comes back here in new panels, with core's "
        "KSampler. Keep size, steps, scheduler and model as they were. *id_panels* 0: looks come from the saved character."
    )


def consistent_story_sdxl() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors")
    script = graph.add(
        "StoryweftScript",
        "Story Script",
        characters="[Ana] a red-haired girl in a blue coat",
        id_panels=4,
        panels="[Ana] reads a book in a library # Ana found the map.\n[Ana] runs through the rain # She had to hurry.\n"
        "[Ana] sits in a train, looking out of the window # It was a long way.\n[Ana] stands on a hill above the sea # There it was.",
        style="{prompt}, comic book, clean lines",
    )
    positive = graph.add(
        "StoryweftPanelConditioning", "Panel Conditioning", clip=loader(1), story=script(), panels="all"
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="blurry, deformed, extra fingers")
    free = graph.add("FreeU", "FreeU as the authors", model=loader(), b1=1.1, b2=1.2, s1=0.6, s2=0.4)
    latent = graph.add("EmptyLatentImage", "Size", width=1024, height=1024, batch_size=script(1))
    drawn = _sampler(graph, _block(graph, free(), 0.7, 1)(), positive(), negative(), latent(), 3, 50, 5.0)
    _sheet(graph, drawn(), loader(2), script(), "consistent_story_sdxl", larger=1)
    return graph.nodes, (
        "## Consistent story on SDXL\nThe authors' settings: DDIM, 50 steps, cfg 5, FreeU 1.1 / 1.2 / 0.6 / 0.4, half the tokens shared. "
        "Choose your own SDXL checkpoint. Four panels of 1024 in one batch; with little memory use 768, or **Story Sampler** as in "
        "*long_story* with memory *recompute*."
    )


PLAN = """Reasoning: The fox runs from the left to the right, the owl flies up and away.
Frame 1: [{'id': 0, 'name': 'a fox', 'box': [20, 260, 160, 200]}, {'id': 1, 'name': 'an owl', 'box': [300, 150, 90, 90]}]
Frame 2: [{'id': 0, 'name': 'a fox', 'box': [120, 240, 165, 210]}, {'id': 1, 'name': 'an owl', 'box': [360, 90, 85, 85]}]
Frame 3: [{'id': 0, 'name': 'a fox', 'box': [220, 250, 170, 210]}, {'id': 1, 'name': 'an owl', 'box': [430, 20, 80, 80]}]
Frame 4: [{'id': 0, 'name': 'a fox', 'box': [320, 240, 175, 220]}]
Background keyword: forest
"""


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
    drawn = _sampler(graph, loader(), positive(), negative(), latent(), 3)
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


def _subject(graph: Graph, image, mask, title="Subject"):
    return graph.add(
        "StoryweftSubject",
        title,
        image=image,
        mask=mask,
        ground="black",
        crop=True,
        margin=0.05,
        edge="soft",
        resize_mask=False,
        vae_size=256,
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
    drawn = _sampler(graph, model, positive(), negative(), latent(), seed)
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
    drawn = _sampler(graph, model(), positive(), negative(), latent(), 5, 30, 6.0)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    graph.add("SaveImage", "Save", images=pictures(), filename_prefix="storyweft/subject_and_text_sdxl")
    return graph.nodes, (
        "## Subject and text on SDXL\nPut *ip-adapter-plus_sdxl_vit-h.safetensors* of h94/IP-Adapter into models/ipadapter, its ViT-H "
        "encoder into models/clip_vision and a BiRefNet model into models/background_removal. SAM3 or a painted mask do as well. "
        "Start at *alpha_image* 0.7; more keeps more of the picture and less of the prompt."
    )


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
    loader, script, positive, negative = _demo(graph, "", LIGHT, 0)
    block = _style(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = _sampler(graph, block(), positive(), negative(), latent(), 5)
    _sheet(graph, drawn(), loader(2), script(), "style_set")
    return graph.nodes, (
        "## Style set\nFour kinds in four places. Only the first prompt says *at night*, and none names a colour: the other "
        "pictures take light and colours from the first, which is what it would be alone. Bypass **StyleAligned** (Ctrl-B) to see the "
        "difference.\n\nFor real pictures see *style_set_sdxl*, or swap **Demo Loader** for an SD1.5 checkpoint at 512, 50 steps, cfg 7.5."
    )


def style_from_picture() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = _demo(graph, "", GIVEN, 0)
    alone = graph.add(
        "CLIPTextEncode", "Prompt of the given picture", clip=loader(1), text="a fox on the beach at sunset"
    )
    one = graph.add("EmptyLatentImage", "One picture", width=128, height=128, batch_size=1)
    first = _sampler(graph, loader(), alone(), negative(), one(), 2)
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
    drawn = _sampler(graph, reference(), positive(), negative(), reference(1), 5)
    _sheet(graph, drawn(), loader(2), script(), "style_from_picture")
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
    drawn = _sampler(graph, block(), positive(), negative(), latent(), 10, 50, 5.0)
    _sheet(graph, drawn(), loader(2), script(), "style_set_sdxl", larger=1)
    return graph.nodes, (
        "## Style set on SDXL\nThe authors' settings: DDIM, 50 steps, cfg 5, share_group_norm off. Choose your own SDXL checkpoint. "
        "The first picture sets the style; repeat its prompt and seed with new lines after it to draw more of the set. With a "
        "ControlNet (strength 0.8) only the pictures after the first are steered."
    )


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
    drawn = _sampler(graph, block(), block(1), negative(), board(), seed, steps, cfg)
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
    drawn = _sampler(graph, masked(), masked(1), negative(), latent(), 3)
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


def demo_video() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="a fox in the forest by day")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size: batch = frames", width=128, height=128, batch_size=8)
    drawn = _sampler(graph, loader(), positive(), negative(), latent(), 3, 20)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=frames(), upscale_method="lanczos", scale_by=3.0)
    graph.add(
        "SaveAnimatedWEBP",
        "Save Clip",
        images=larger(),
        filename_prefix="storyweft/demo_video",
        fps=8.0,
        lossless=False,
        quality=90,
        method="default",
    )
    return graph.nodes, (
        "## Demo video\nEight frames of the picture-book world in one batch: **Demo Video Loader** gives a text-to-video U-Net of "
        "ComfyUI's own kind (SVD's temporal layers), so the latent batch is the clip. The prompt says who, where and when; the "
        "model is undertrained, so the character jitters instead of walking.\n\nFor a video file with sound put *Create "
        "Video* and *Save Video* behind the decoder; for real clips use your own video model here."
    )


def _box_track(graph: Graph, title: str, boxes, frames: int, width: int, height: int, **more):
    size = {"frames": frames, "width": width, "height": height, "interpolation": "linear"}
    source = {"source_words": "", "source_width": 0.25, "source_height": 0.25}
    return graph.add("StoryweftBoxTrack", title, boxes=boxes, **size, **source, **more)


def _masked(graph: Graph, model, boxes, part: float, prompt="", **more):
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
    shown = _box_track(graph, "Boxes on Clip", track(1), frames, width, height, images=clip)
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


def boxes_video() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    track = _box_track(graph, "Box Track", "fox | 0: 0.02 0.44 0.48 0.9 | 1: 0.52 0.44 0.98 0.9\n", 8, 128, 128)
    alike = _block(graph, loader(), layers="all")
    masked = _masked(graph, alike(), track(), 0.25, "a fox in the meadow by day", clip=loader(1), cross=True)
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size: batch = frames", width=128, height=128, batch_size=8)
    drawn = _sampler(graph, masked(), masked(1), negative(), latent(), 5, 20)
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
    loader = graph.add(
        "UNETLoader", "Load Wan", unet_name="wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype="default"
    )
    clip = graph.add(
        "CLIPLoader",
        "Load umT5",
        clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        type="wan",
        device="default",
    )
    vae = graph.add("VAELoader", "Load Wan VAE", vae_name="wan_2.1_vae.safetensors")
    shifted = graph.add("ModelSamplingSD3", "Shift", model=loader(), shift=8.0)
    track = _box_track(
        graph, "Box Track", "red panda | 0: 0.02 0.4 0.37 0.9 | 1: 0.62 0.35 0.98 0.88\n", 33, 832, 480
    )
    prompt = "A red panda walks along a mossy branch in a misty bamboo forest, soft morning light, film grain."
    masked = _masked(graph, shifted(), track(), 0.1, prompt, clip=clip(), cross=True)
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
        "SaveVideo", "Save Video", video=video(), filename_prefix="storyweft/boxes_video_wan", format="auto", codec="auto"
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
    track = _box_track(graph, "Box Track", "object | 0: 0.05 0.4 0.4 0.9 | 1: 0.6 0.4 0.95 0.9\n", 14, 1024, 576)
    masked = _masked(graph, loader(), track(), 0.1, cross=False)
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


WORKFLOWS = {
    f.__name__: f
    for f in (
        consistent_story,
        long_story,
        two_characters,
        saved_character,
        consistent_story_sdxl,
        boxes_from_text,
        subject_and_text,
        two_subjects,
        subject_and_text_sdxl,
        style_set,
        style_from_picture,
        style_set_sdxl,
        board_story,
        board_replace_frame,
        board_story_sdxl,
        boxes_image,
        demo_video,
        boxes_video,
        boxes_video_wan,
        boxes_svd,
    )
}
