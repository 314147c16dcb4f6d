"""Sounds: heard, weighted, drawn; tuned; mapped; added; told as a story."""

from .graph import Graph, consistent, sampler, sheet


def _sound(graph: Graph, title: str, voice: str, place: str, loudness=0.6, background=0.3, before=None, second=("none", 0.6)):
    more = {} if before is None else {"before": before}
    return graph.add(
        "StoryweftDemoSound",
        title,
        voice=voice,
        loudness=loudness,
        place=place,
        background=background,
        second_voice=second[0],
        second_loudness=second[1],
        **more,
    )


def _heard(graph: Graph, audio, keep="surest window"):
    caption = graph.add(
        "StoryweftAudioCaption",
        "Audio Caption",
        audio=audio,
        captioner="demo",
        window=0.0,
        hop=0.0,
        keep=keep,
        search_width=1,
        whisper_style="clotho > caption: ",
        prompt="Caption the input audio in one short sentence, naming every sound and the place. No other words.",
        geometric_mean=False,
    )
    return caption, _nouns(graph, caption())


def _nouns(graph: Graph, caption):
    return graph.add("StoryweftSentenceAttention", "Sentence Attention", caption=caption, tagger="built-in word list")


WEIGHTING = {"rule": "code", "positional": True, "strength": 1.0}


def _prompt(graph: Graph, clip, caption, title="Audio Caption Embedding"):
    return graph.add(
        "StoryweftAudioCaptionEmbedding",
        title,
        clip=clip,
        caption=caption,
        **WEIGHTING,
        restore="norm",
        form="automatic",
        before="",
        after="",
    )


def _words(graph: Graph, caption):
    shaded = graph.add(
        "StoryweftWordAttention", "Word Attention Picture", caption=caption, **WEIGHTING, width=640, font_size=30
    )
    graph.add("PreviewImage", "Words", images=shaded())


def _drawn(graph: Graph, loader, model, positive, count, name: str, seed: int):
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=count)
    drawn = sampler(graph, model, positive, negative(), latent(), seed)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=pictures(), upscale_method="lanczos", scale_by=3.0)
    graph.add("SaveImage", "Save", images=larger(), filename_prefix=f"storyweft/{name}")


def sound_to_picture() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    sound = _sound(graph, "Sound", "owl", "forest")
    picture = graph.add("StoryweftSpectrogram", "Spectrogram", audio=sound(), height=192)
    graph.add("PreviewImage", "What is heard", images=picture())
    graph.add("PreviewAudio", "Listen", audio=sound())
    caption, nouns = _heard(graph, sound())
    prompt = _prompt(graph, loader(1), nouns())
    _words(graph, nouns())
    _drawn(graph, loader, loader(), prompt(), prompt(3), "sound_to_picture", 3)
    return graph.nodes, (
        "## Sound to picture\nAn owl in a forest is only *heard*. **Audio Caption** puts it into words and keeps "
        "how sure it was of each (audio attention), **Sentence Attention** finds the nouns, and words weigh "
        "accordingly in the prompt. Choose another voice and place, or put *Load Audio* or *Record Audio* in "
        "place of **Sound**.\n\nFor real sounds: ACT or a Whisper audio-captioning model in "
        "`models/audio_captioners`, and your SD1.5 or SDXL checkpoint in place of **Demo Loader** (restore: mean,"
        " 512 px, 40 steps, cfg 7.5). For Flux, Qwen-Image, Wan connect the model to **Audio Caption Embedding** "
        "too."
    )


def sound_optimise() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    sound = _sound(graph, "Sound", "elephant", "beach")
    _, nouns = _heard(graph, sound())
    judge = graph.add(
        "StoryweftLoadSoundJudge", "Load Sound Judge", judge="demo", authors_scale=False, caption_judge="the judge itself"
    )
    tuned = graph.add(
        "StoryweftSoundOptimise",
        "Sound Optimise",
        model=loader(),
        clip=loader(1),
        vae=loader(2),
        caption=nouns(),
        audio=sound(),
        judge=judge(),
        width=128,
        height=128,
        start_noise=1,
        rounds=8,
        rate=0.03,
        steps=12,
        cfg=4.0,
        gradient_calls=2,
        **WEIGHTING,
        restore="norm",
        keep_prompt=0.0001,
        agree_caption=1.0,
        agree_sound=0.9,
        method="ddim",
        scheduler="normal",
        augment=0,
    )
    larger = graph.add("ImageScaleBy", "Larger", image=tuned(2), upscale_method="lanczos", scale_by=2.0)
    graph.add("SaveImage", "Every round", images=larger(), filename_prefix="storyweft/sound_optimise_rounds")
    graph.add("PreviewAny", "Losses", source=tuned(4))
    _drawn(graph, loader, loader(), tuned(), 1, "sound_optimise", 1)
    return graph.nodes, (
        "## Sound optimise\nThe second stage of the paper: the same noise is drawn again and again while the "
        "weights of the prompt's rows are tuned, until the picture agrees with the caption and with the sound. "
        "**Every round** shows the pictures, **Losses** their three parts.\n\nReal models: "
        "`AudioCLIP-Full-Training.pt` and, as caption_judge, CLIP ViT-B/32 in `models/sound_judges`, SD1.5 at 512 px, "
        "PLMS, 40 steps, cfg 7.5, rate 0.01, keep_prompt 0.01, restore mean. A gradient of all calls costs three pictures a round, "
        "gradient_calls 1 little more than one."
    )


def sound_mapping() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    sound = _sound(graph, "Sound", "robot", "city")
    encoder = graph.add(
        "StoryweftLoadJointEncoder", "Load Joint Encoder", encoder="demo", towers="all", licence_read=False
    )
    heard = graph.add("StoryweftJointEncode", "Joint Encode", encoder=encoder(), audio=sound(), text="", clips=3, short="loop")
    mapping = graph.add("StoryweftLoadPromptMapping", "Load Prompt Mapping", mapping="demo")
    prompt = _mapped(graph, mapping(), heard())
    _drawn(graph, loader, loader(), prompt(), 1, "sound_mapping", 3)
    return graph.nodes, (
        "## Mapping network\nNo words at all: the sound's one vector becomes a whole prompt through a trained "
        "network. ImageBind in `models/imagebind` and a mapping of `python -m training.sound_mapping` in "
        "`models/prompt_mappings` do it for real models."
    )


def _mapped(graph: Graph, mapping, embedding, **more):
    chosen = {"way": "replace text", "rows": 0, "gain": 1.0, "strength": 1.0, **more}
    return graph.add("StoryweftApplyPromptMapping", "Apply Prompt Mapping", mapping=mapping, embedding=embedding, **chosen)


def sound_and_text() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    sound = _sound(graph, "Who", "fox", "none")
    encoder = graph.add(
        "StoryweftLoadJointEncoder", "Load Joint Encoder", encoder="demo", towers="all", licence_read=False
    )
    heard = graph.add("StoryweftJointEncode", "Heard", encoder=encoder(), audio=sound(), text="", clips=3, short="loop")
    written = graph.add("StoryweftJointEncode", "Written", encoder=encoder(), text="on the beach at night", clips=3, short="loop")
    mixed = graph.add(
        "StoryweftEmbeddingMix",
        "Mix Embeddings",
        first=heard(),
        first_weight=0.5,
        second=written(),
        second_weight=0.6,
        third_weight=0.0,
        way="sum",
        norm=20.0,
    )
    mapping = graph.add("StoryweftLoadPromptMapping", "Load Prompt Mapping", mapping="demo")
    typed = graph.add(
        "StoryweftTypedCaption",
        "Typed Caption",
        caption="a fox on the beach at night",
        audio_attention="",
        noun_probability="",
    )
    nouns = _nouns(graph, typed())
    text = _prompt(graph, loader(1), nouns(), "Typed words")
    prompt = _mapped(graph, mapping(), mixed(), text=text(), strength=0.8)
    _drawn(graph, loader, loader(), prompt(), 1, "sound_and_text", 4)
    return graph.nodes, (
        "## Sound and text\nWho is *heard* and where is *written*: both become vectors of one space, which are "
        "added with weights, and the sum becomes a prompt. **Typed Caption** adds a fifth of a prompt with "
        "weighted words; strength 1 in **Apply Prompt Mapping** leaves it out."
    )


def sound_unclip() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("unCLIPCheckpointLoader", "Load unCLIP Checkpoint", ckpt_name="sd21-unclip-h.ckpt")
    sound = graph.add("LoadAudio", "Load Audio", audio="example.flac")
    encoder = graph.add(
        "StoryweftLoadJointEncoder",
        "Load Joint Encoder",
        encoder="imagebind_huge.pth",
        towers="audio only",
        licence_read=True,
    )
    heard = graph.add("StoryweftJointEncode", "Joint Encode", encoder=encoder(), audio=sound(), text="", clips=3, short="loop")
    scaled = graph.add(
        "StoryweftEmbeddingMix",
        "To the norm of pictures",
        first=heard(),
        first_weight=1.0,
        second_weight=0.0,
        third_weight=0.0,
        way="sum",
        norm=20.0,
    )
    vision = graph.add("StoryweftEmbeddingToVision", "Embedding as CLIP Vision Output", embedding=scaled(), model=loader())
    text = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="best quality, extremely detailed")
    prompt = graph.add(
        "unCLIPConditioning",
        "unCLIP Conditioning",
        conditioning=text(),
        clip_vision_output=vision(),
        strength=1.0,
        noise_augmentation=0.0,
    )
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=768, height=768, batch_size=1)
    drawn = sampler(graph, loader(), prompt(), negative(), latent(), 3, 50, 9.0)
    pictures = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    graph.add("SaveImage", "Save", images=pictures(), filename_prefix="storyweft/sound_unclip")
    return graph.nodes, (
        "## ImageBind and unCLIP\nNo training: the sound's ImageBind vector goes in where the unCLIP model "
        "expects that of a picture. Needs `sd21-unclip-h.ckpt`, ImageBind's `imagebind_huge.pth` in "
        "`models/imagebind` (CC BY-NC-SA 4.0, non-commercial) and a sound of yours in **Load Audio**. For the "
        "length of the vector connect pictures encoded by the checkpoint's CLIP_VISION to *reference*."
    )


def sound_story() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoLoader", "Demo Loader")
    sounds = None
    for number, place in enumerate(("forest", "beach", "snow", "desert"), 1):
        sounds = _sound(graph, f"Sound {number}", "fox", place, before=None if sounds is None else sounds())
    caption, nouns = _heard(graph, sounds())
    script = graph.add("StoryweftScript", "Story Script", characters="", id_panels=2, panels=caption(1), style="")
    prompt = _prompt(graph, loader(1), nouns())
    block = consistent(graph, loader())
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size", width=128, height=128, batch_size=prompt(3))
    drawn = sampler(graph, block(), prompt(), negative(), latent(), 6)
    _words(graph, nouns())
    sheet(graph, drawn(), loader(2), script(), "sound_story")
    return graph.nodes, (
        "## A story that is only heard\nFour sounds, one after the other: a fox in four places. Their captions "
        "become four panels with weighted words, and **Consistent Self-Attention** keeps the fox the same in all "
        "of them. **Story Script** gets the captions as its lines, for the sheet."
    )


WORKFLOWS = (sound_to_picture, sound_optimise, sound_mapping, sound_and_text, sound_story, sound_unclip)
