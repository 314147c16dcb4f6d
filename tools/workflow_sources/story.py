"""Stories with Consistent Self-Attention."""

from .graph import PLACES, Graph, consistent, demo_story, sampler, sheet

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


def consistent_story() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(graph, "[Fox] a fox", "\n".join(FOX.splitlines()[:4]), 4)
    block = consistent(graph, loader())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = sampler(graph, block(), positive(), negative(), latent(), 7)
    pictures = sheet(graph, drawn(), loader(2), script(), "consistent_story")
    graph.add("SaveImage", "Save Panels", images=pictures, filename_prefix="storyweft/consistent_story_panel")
    return graph.nodes, (
        "## Consistent story\nFour panels drawn as one batch; **Consistent Self-Attention** lets them look at each other, so the fox keeps "
        "its colour and hat. Bypass that node (Ctrl-B) to see the difference.\n\nFor real pictures swap **Demo Loader** for *Load "
        "Checkpoint* (SD1.5 at 512, SDXL at 1024), 50 steps, cfg 5, share_early 0.7, first_step 1."
    )


def long_story() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(graph, "[Fox] a fox", FOX, 4)
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    drawn = _story_sampler(graph, consistent(graph, loader())(), positive(), negative(), latent(), 9)
    sheet(graph, drawn(), loader(2), script(), "long_story")
    graph.add("StoryweftSaveCharacter", "Save Character", character=drawn(1), filename_prefix="demo")
    graph.add("PreviewAny", "Report", source=drawn(2))
    return graph.nodes, (
        "## Long story\nThe first four panels define the fox and are drawn together; the other eight read its bank one at a time, so "
        "memory does not grow with the story. Finished panels are kept: change one line and only what depends on it is drawn again. "
        "*panel_seeds* `7: 5` redoes panel 7 alone.\n\nThe character is saved; workflow **saved_character** uses it."
    )


def two_characters() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(graph, "[Fox] a fox\n[Robot] a robot", TWO, 2)
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=1)
    drawn = _story_sampler(graph, consistent(graph, loader())(), positive(), negative(), latent(), 2)
    sheet(graph, drawn(), loader(2), script(), "two_characters", "comic")
    return graph.nodes, (
        "## Two characters\nEach character is defined by the first two panels that name only it. Panels read the characters they name; "
        "`[NC]` panels read nobody. The demo model has never seen two kinds in one picture, so no panel here shows both; with a real "
        "checkpoint write both tags in one line."
    )


def saved_character() -> tuple[dict, str]:
    graph = Graph()
    loader, script, positive, negative = demo_story(
        graph,
        "[Fox] a fox",
        "[Fox] in the city at sunset # Years later.\n[Fox] in the snow at night # The same fox.",
        0,
    )
    saved = graph.add("StoryweftLoadCharacter", "Load Character", file="demo_Fox.safetensors")
    model = graph.add("StoryweftRecallCharacter", "Recall Character", model=loader(), character=saved())
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=script(1))
    drawn = sampler(graph, model(), positive(), negative(), latent(), 21)
    sheet(graph, drawn(), loader(2), script(), "saved_character", "strip")
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
    drawn = sampler(graph, consistent(graph, free(), 0.7, 1)(), positive(), negative(), latent(), 3, 50, 5.0)
    sheet(graph, drawn(), loader(2), script(), "consistent_story_sdxl", larger=1)
    return graph.nodes, (
        "## Consistent story on SDXL\nThe authors' settings: DDIM, 50 steps, cfg 5, FreeU 1.1 / 1.2 / 0.6 / 0.4, half the tokens shared. "
        "Choose your own SDXL checkpoint. Four panels of 1024 in one batch; with little memory use 768, or **Story Sampler** as in "
        "*long_story* with memory *recompute*."
    )


WORKFLOWS = (consistent_story, long_story, two_characters, saved_character, consistent_story_sdxl)
