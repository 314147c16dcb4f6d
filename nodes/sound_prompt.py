"""What is heard becomes what is drawn: weighted prompts, their picture, and weights tuned until the picture agrees."""

import math

from comfy_api.latest import io

from ..attention.sound import RESTORED, RULES
from ..host import judges, model_files, sound_pictures, sound_prompt, sound_sampling, sounds
from ..host.queueing import refusal
from ..sampling.multistep import METHODS, calls
from ..sampling.sound_optimise import Terms, best
from ..story.heard import Caption

CATEGORY = "Storyweft/Sound"
CaptionType = io.Custom("STORYWEFT_CAPTION")
JudgeType = io.Custom("STORYWEFT_SOUND_JUDGE")
OPTIMISE = "StoryweftSoundOptimise"

model_files.add_folder(judges.FOLDER)


def captions_of(captions, node_id: str) -> list[Caption]:
    if not (isinstance(captions, list) and captions and all(isinstance(one, Caption) for one in captions)):
        raise ValueError(f"{node_id}: caption is {type(captions).__name__}; connect a caption of StoryweftSentenceAttention.")
    for one in captions:
        if one.nouns is None:
            raise ValueError(f"{node_id}: caption '{one.text}' has no noun probabilities; put StoryweftSentenceAttention before it.")
    return captions


def weighting() -> list:
    """The inputs that make weights of attentions."""
    return [
        io.Combo.Input(
            "rule",
            options=list(RULES),
            default=RULES[0],
            tooltip="code: what the authors' program does, nouns weigh their noun probability and a tenth of what was heard, other "
            "words what was heard. paper: the sum of both for all words.",
        ),
        io.Boolean.Input(
            "positional",
            default=True,
            tooltip="Add the term that grows with a word's place, since captioners grow sure of themselves as they go on.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=4.0,
            step=0.01,
            tooltip="How far weights are from 1: 0 is the plain prompt, 1 the paper, more is more.",
        ),
        io.Combo.Input(
            "restore",
            options=list(RESTORED),
            default=RESTORED[0],
            advanced=True,
            tooltip="What of the prompt is put back after weighting: its mean as in the paper, or its norm, for text encoders whose mean "
            "is near 0.",
        ),
    ]


def positive_weights(node_id: str, captions: list[Caption], words: list[list[float]]) -> None:
    """Raise ValueError for a weight that is no number from 0 up."""
    for caption, weights in zip(captions, words, strict=True):
        for word, weight in zip(caption.words, weights, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{node_id}: the word '{word}' weighs {weight:.3g}; choose a lower strength.")


class AudioCaptionEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftAudioCaptionEmbedding",
            display_name="Audio Caption Embedding",
            category=CATEGORY,
            description="The prompt of a heard caption, in which words the captioner was sure of and nouns weigh more. One row for each "
            "caption of a batch.",
            search_aliases=["audio to conditioning", "weighted caption", "sound prompt", "audio attention"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model that draws."),
                CaptionType.Input("caption", tooltip="From Sentence Attention."),
                *weighting(),
                io.Combo.Input(
                    "form",
                    options=list(sound_prompt.FORMS),
                    default=sound_prompt.FORMS[0],
                    advanced=True,
                    tooltip="U-Nets take scaled rows, as in the paper. Flux, SD3, Qwen-Image, Wan, LTX and others normalise rows first, "
                    "which takes a scale away: there the model adds the weight's logarithm to attention. automatic knows which.",
                ),
                io.String.Input(
                    "before",
                    default="",
                    dynamic_prompts=False,
                    tooltip="Words before every caption, of weight 1: a style, or a character.",
                ),
                io.String.Input(
                    "after", default="", dynamic_prompts=False, tooltip="Words after every caption, of weight 1."
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model that draws; needed where keys are weighted in place of rows."
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="A weighted row for each caption."),
                io.Model.Output("model", tooltip="The model, with keys weighted if that is the form; else as it came."),
                io.String.Output("report", tooltip="The weight of every word."),
                io.Int.Output("count", tooltip="Number of rows, for a latent's batch size."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip, caption, rule, positional=True, strength=1.0, restore=RESTORED[0], form=sound_prompt.FORMS[0],
        before="", after="", model=None,
    ) -> io.NodeOutput:  # fmt: skip
        node_id = sound_prompt.NODE
        if clip is None:
            raise ValueError(f"{node_id}: clip is empty, the checkpoint has no text encoder; add a CLIP loader node.")
        captions = captions_of(caption, node_id)
        words = [sound_prompt.weights_of(one, rule, positional, strength) for one in captions]
        positive_weights(node_id, captions, words)
        keys = form == sound_prompt.FORMS[2]
        if form == sound_prompt.FORMS[0]:
            keys = sound_prompt.cancels(model) if model is not None else not sound_prompt.clip_text(clip)
        if keys and model is None:
            raise ValueError(
                f"{node_id}: this text encoder belongs to models whose first norm takes a row's scale away; connect the model, so "
                "that keys can be weighted in it."
            )
        if keys and any(weight <= 0 for weights in words for weight in weights):
            raise ValueError(f"{node_id}: a word weighs 0, which keys cannot; leave the word out.")
        made, _, guarded = sound_prompt.encode(clip, captions, words, keys, before.strip(), after.strip(), restore)
        model = sound_prompt.weight_rule(model) if keys else model
        return io.NodeOutput(made, model, sound_prompt.describe(captions, words, guarded, keys), len(captions))


class WordPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftWordAttention",
            display_name="Word Attention Picture",
            category=CATEGORY,
            description="A picture of a caption whose words are shaded by their weight.",
            search_aliases=["attention visualisation", "caption heat map", "word weights"],
            inputs=[
                CaptionType.Input("caption", tooltip="From Sentence Attention."),
                *weighting()[:3],
                io.Int.Input("width", default=768, min=128, max=4096, step=8, tooltip="Width of the picture in pixels."),
                io.Int.Input("font_size", default=30, min=10, max=200, tooltip="Height of the words in pixels."),
            ],
            outputs=[io.Image.Output("image", tooltip="A picture for each caption.")],
        )

    @classmethod
    def execute(cls, caption, rule, positional=True, strength=1.0, width=768, font_size=30) -> io.NodeOutput:
        captions = captions_of(caption, "StoryweftWordAttention")
        words = [sound_prompt.weights_of(one, rule, positional, strength) for one in captions]
        return io.NodeOutput(sound_pictures.word_picture(captions, words, width, font_size))


class LoadSoundJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadSoundJudge",
            display_name="Load Sound Judge",
            category=CATEGORY,
            description="Loads who compares pictures with a sound and its caption while weights are tuned.",
            search_aliases=["audioclip", "imagebind", "sound similarity", "clip score"],
            inputs=[
                io.Combo.Input(
                    "judge",
                    options=judges.names(),
                    default=judges.DEMO,
                    tooltip="demo: the picture-book encoders. Of models/sound_judges: AudioCLIP-Full-Training.pt as in the paper, "
                    "imagebind_huge.pth (non-commercial), or the folder of a CLAP, which hears through words and needs a CLIP below.",
                ),
                io.Boolean.Input(
                    "authors_scale",
                    default=False,
                    advanced=True,
                    tooltip="AudioCLIP: leave out the 16-bit range it was trained on, as the authors of the sound-to-image code do. "
                    "Sounds are then 85 dB too quiet for it.",
                ),
                io.Combo.Input(
                    "caption_judge",
                    options=[judges.SAME, *judges.names()[1:]],
                    default=judges.SAME,
                    optional=True,
                    tooltip="Who compares pictures with the caption. The paper takes a CLIP ViT-B/32: its folder or model.safetensors "
                    "in models/sound_judges.",
                ),
            ],
            outputs=[JudgeType.Output("judge", tooltip="For Sound Optimise.")],
        )

    @classmethod
    def execute(cls, judge, authors_scale=False, caption_judge=judges.SAME) -> io.NodeOutput:
        return io.NodeOutput(judges.load(judge, authors_scale, "StoryweftLoadSoundJudge", caption_judge))


def check_gradient_calls(gradient_calls: int, method: str, steps: int) -> None:
    if gradient_calls > calls(method, steps):
        raise ValueError(f"{OPTIMISE}: gradient_calls is {gradient_calls} of {calls(method, steps)} model calls; 0 means all.")


class SoundOptimise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=OPTIMISE,
            display_name="Sound Optimise",
            category=CATEGORY,
            description="Draws the same noise again and again and tunes the weights of the prompt's rows, until the picture agrees with "
            "the caption and the sound. Slow: a round costs about three pictures, or little more than one with a gradient of one call.",
            search_aliases=["direct sound optimization", "audio guided", "sound to image", "audioclip guidance"],
            inputs=[
                io.Model.Input("model", tooltip="U-Net of SD1.5, SD2 or SDXL, before other Storyweft blocks."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its picture autoencoder."),
                CaptionType.Input("caption", tooltip="From Sentence Attention: one caption."),
                io.Audio.Input("audio", tooltip="The sound the caption describes; the first of a batch."),
                JudgeType.Input("judge", tooltip="From Load Sound Judge."),
                io.Int.Input("width", default=512, min=64, max=4096, step=8, tooltip="Width of the picture in pixels."),
                io.Int.Input("height", default=512, min=64, max=4096, step=8, tooltip="Height of the picture in pixels."),
                io.Int.Input(
                    "start_noise",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Number of the noise that every round starts from.",
                ),
                io.Int.Input("rounds", default=10, min=1, max=1000, tooltip="How often the weights are tuned. Paper: 10."),
                io.Float.Input(
                    "rate", default=0.01, min=0.0001, max=1.0, step=0.0001, tooltip="Step of Adam. Paper: 0.01."
                ),
                io.Int.Input("steps", default=20, min=2, max=1000, tooltip="Steps of each picture. Authors: 40."),
                io.Float.Input("cfg", default=7.5, min=1.0, max=100.0, step=0.1, tooltip="Guidance. Authors: 7.5."),
                io.Int.Input(
                    "gradient_calls",
                    default=0,
                    min=0,
                    max=1001,
                    tooltip="Through how many of the last model calls the gradient flows. 0: all, as the authors do, at three times the "
                    "cost of a picture; 1: the cheapest.",
                ),
                *weighting(),
                io.Float.Input(
                    "keep_prompt", default=0.01, min=0.0, max=100.0, step=0.0001, advanced=True,
                    tooltip="Weight of the distance from the plain prompt. Paper: 0.01.",
                ),
                io.Float.Input(
                    "agree_caption", default=1.0, min=0.0, max=100.0, step=0.01, advanced=True,
                    tooltip="Weight of the disagreement with the caption. Paper: 1.",
                ),
                io.Float.Input(
                    "agree_sound", default=0.9, min=0.0, max=100.0, step=0.01, advanced=True,
                    tooltip="Weight of the disagreement with the sound. Paper: 0.9.",
                ),
                io.Combo.Input(
                    "method", options=list(METHODS), default=METHODS[0], advanced=True,
                    tooltip="How pictures are drawn: PLMS as the authors do, or DDIM.",
                ),
                io.Combo.Input(
                    "scheduler", options=list(sound_sampling.SCHEDULERS), default="ddim_uniform", advanced=True,
                    tooltip="Noise levels of the steps.",
                ),
                io.Int.Input(
                    "augment", default=0, min=0, max=64, optional=True, advanced=True,
                    tooltip="Crops of every picture, some of them mirrored, that are judged beside it, the same in every round. 0: the "
                    "picture alone, as the authors' code does; the paper's figure shows augmentation.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid; without it the empty prompt."),
            ],
            outputs=[
                io.Conditioning.Output("best", tooltip="The prompt of the round with the least loss."),
                io.Conditioning.Output("last", tooltip="The prompt after the last round."),
                io.Image.Output("images", tooltip="The picture of every round; the first shows the weights before tuning."),
                io.Latent.Output("latents", tooltip="Their latents."),
                io.String.Output("report", tooltip="The loss of every round and its three parts."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, gradient_calls=None, method=METHODS[0], steps=None) -> bool | str:
        return refusal(cls, (check_gradient_calls,), gradient_calls=gradient_calls, method=method, steps=steps)

    @classmethod
    def execute(
        cls, model, clip, vae, caption, audio, judge, width, height, start_noise, rounds, rate, steps, cfg,
        gradient_calls, rule, positional=True, strength=1.0, restore=RESTORED[0], keep_prompt=0.01, agree_caption=1.0,
        agree_sound=0.9, method=METHODS[0], scheduler="ddim_uniform", augment=0, negative=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_gradient_calls(gradient_calls, method, steps)
        captions = captions_of(caption, OPTIMISE)
        if len(captions) != 1:
            raise ValueError(f"{OPTIMISE}: caption holds {len(captions)} captions; give one at a time.")
        waves, sample_rate = sounds.checked(audio, OPTIMISE)
        words = sound_prompt.weights_of(captions[0], rule, positional, strength)
        positive_weights(OPTIMISE, captions, [words])
        plain, rows, _ = sound_prompt.encode(clip, captions, [[1.0] * len(words)], False)
        sound_sampling.check(model, plain[0][0], vae, OPTIMISE)
        if len(plain) != 1:
            raise ValueError(f"{OPTIMISE}: the clip's hooks give the prompt a schedule of {len(plain)}; remove them.")
        _, rows, _ = sound_prompt.encode(clip, captions, [words], False)
        negative = negative or clip.encode_from_tokens_scheduled(clip.tokenize(""))
        shape = sound_sampling.latent_shape(model, vae, width, height)
        chosen = sound_sampling.Settings(
            steps, method, scheduler, cfg, rounds, rate, gradient_calls or None,
            Terms(keep_prompt, agree_caption, agree_sound), restore, augment,
        )  # fmt: skip
        found = sound_sampling.run(
            model, vae, plain, negative, rows[0], judge, captions[0].text, (waves[0], sample_rate), shape, start_noise, chosen
        )
        number = best(found.rounds)
        lines = [
            f"round {index}: loss {one.loss:.4f} = prompt {one.terms[0]:.4f} + caption {one.terms[1]:.4f} + sound {one.terms[2]:.4f}"
            + (" (best)" if index == number else "")
            for index, one in enumerate(found.rounds)
        ]
        return io.NodeOutput(
            [[found.rounds[number].prompt.cpu(), dict(plain[0][1])]],
            [[found.after, dict(plain[0][1])]],
            sound_sampling.pictures(found.rounds),
            {"samples": found.latents.cpu()},
            "\n".join(lines),
        )


NODES = [AudioCaptionEmbedding, WordPicture, LoadSoundJudge, SoundOptimise]
