"""What is heard: sounds to captions whose words carry how sure the captioner was, and how likely each is a noun."""

from html import escape

import comfy.utils
import torch
from comfy_api.latest import io
from server import PromptServer

from ..host import captioners, demo_sounds, sound_pictures, sounds, taggers
from ..host.core_captioner import CoreCaptioner
from ..host.queueing import ABSENT, refusal
from ..story.heard import LEAST_CONFIDENCE, Caption, typed_caption

CATEGORY = "Storyweft/Sound"
CaptionType = io.Custom("STORYWEFT_CAPTION")
CORE = "language model (clip)"
SUREST, ALL = "surest window", "every window"

captioners.add_folder()
taggers.add_folder()


def tell(cls, text: str) -> None:
    """Show a text under the running node."""
    server = getattr(PromptServer, "instance", None)  # absent where nodes run without a page
    if server is not None and cls.hidden is not None and cls.hidden.unique_id is not None:
        server.send_progress_text(escape(text, quote=False), cls.hidden.unique_id)  # the page reads HTML


def captions_of(captions, node_id: str) -> list[Caption]:
    if not (isinstance(captions, list) and captions and all(isinstance(one, Caption) for one in captions)):
        raise ValueError(f"{node_id}: caption is {type(captions).__name__}; connect a caption of StoryweftAudioCaption.")
    return captions


def check_captioner(node_id: str, captioner: str, clip) -> None:
    if captioner == CORE and clip is None:
        raise ValueError(f"{node_id}: captioner is '{CORE}' and clip is not connected.")


class AudioCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftAudioCaption",
            display_name="Audio Caption",
            category=CATEGORY,
            description="Puts a sound into words, and says of every word how probable the captioner found it: its audio attention. "
            "Long sounds are heard in windows; of each sound the surest window is kept, or all.",
            search_aliases=["sound to text", "audio captioning", "describe sound", "whisper audio captioning", "ACT"],
            inputs=[
                io.Audio.Input("audio", tooltip="One sound or a batch. Stereo is mixed to mono; any sample rate."),
                io.Combo.Input(
                    "captioner",
                    options=[*captioners.names(), CORE],
                    default=captioners.DEMO,
                    tooltip="demo: the picture-book world's sounds. Files of models/audio_captioners: ACT's checkpoint with its word "
                    "list beside it, or the folder of a Whisper audio-captioning model. Or the language model at clip.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For 'language model (clip)': an audio-capable text encoder of the core, such as Gemma 4.",
                ),
                io.Float.Input(
                    "window",
                    default=0.0,
                    min=0.0,
                    max=600.0,
                    step=0.1,
                    tooltip="Seconds heard at once; longer sounds are cut. 0: what the captioner was made for (ACT 10, Whisper 30).",
                ),
                io.Float.Input(
                    "hop",
                    default=0.0,
                    min=0.0,
                    max=600.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Seconds from one window to the next. 0: a window. At most 600 windows a sound.",
                ),
                io.Combo.Input(
                    "keep",
                    options=[SUREST, ALL],
                    default=SUREST,
                    tooltip="One caption a sound, that of the surest window, or one for every window, as panels of a story.",
                ),
                io.Int.Input(
                    "search_width",
                    default=1,
                    min=1,
                    max=5,
                    advanced=True,
                    tooltip="ACT: 1 takes the best word each time, as the paper does; more searches for a likelier sentence.",
                ),
                io.Combo.Input(
                    "whisper_style",
                    options=list(sounds.STYLES),
                    default=sounds.STYLES[0],
                    advanced=True,
                    tooltip="Whisper: the data set whose manner it takes.",
                ),
                io.String.Input(
                    "prompt",
                    default=sounds.PROMPT,
                    multiline=True,
                    dynamic_prompts=False,
                    advanced=True,
                    tooltip="Language model: what it is asked.",
                ),
                io.Boolean.Input(
                    "geometric_mean",
                    default=False,
                    advanced=True,
                    tooltip="A word of several tokens gets the geometric mean of their probabilities and not their product, so that "
                    "long words are not punished.",
                ),
            ],
            outputs=[
                CaptionType.Output("caption", tooltip="Captions with a probability for every word, for the other nodes."),
                io.String.Output("text", tooltip="The captions alone, one a line."),
                io.String.Output("report", tooltip="Every window's words and probabilities, and warnings."),
                io.Int.Output("count", tooltip="Number of captions, for a latent's batch size."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, captioner=None, clip=ABSENT) -> bool | str:
        return refusal(cls, (check_captioner,), captioner=captioner, clip=clip)

    @classmethod
    def execute(
        cls, audio, captioner, window=0.0, hop=0.0, keep=SUREST, search_width=1, whisper_style=sounds.STYLES[0],
        prompt=sounds.PROMPT, geometric_mean=False, clip=None,
    ) -> io.NodeOutput:  # fmt: skip
        node_id = "StoryweftAudioCaption"
        check_captioner(node_id, captioner, clip)
        waves, rate = sounds.checked(audio, node_id)
        if captioner == CORE:
            listener = CoreCaptioner(clip, node_id)
        else:
            listener = captioners.load(captioner, node_id)
        asked = sounds.Asked(search_width, whisper_style, prompt, geometric_mean)
        seconds = window or listener.seconds
        found, report = [], []
        for number, wave in enumerate(waves, 1):
            parts = sounds.windows(wave, rate, seconds, hop or seconds, node_id)
            progress, heard = comfy.utils.ProgressBar(len(parts)), []
            for part in parts:
                one = caption_of(listener, part, asked, seconds)
                heard += [] if one is None else [one]
                progress.update(1)  # stops here when the user interrupts
            if not heard:
                raise ValueError(f"{node_id}: the captioner has no words for sound {number} of audio.")
            report += [f"Sound {number}, {len(parts)} windows:", *(one.describe() for one in heard)]
            found += heard if keep == ALL else [max(heard, key=surely)]
        text = "\n".join(one.text for one in found)
        tell(cls, text)
        return io.NodeOutput(found, text, "\n".join(report), len(found))


def surely(caption: Caption) -> float:
    return caption.confidence


def caption_of(listener, part: sounds.Window, asked: sounds.Asked, seconds: float) -> Caption | None:
    """The caption of one window, None if the captioner had no words; silence, guesses and cut sounds are noted."""
    words, chances = listener.caption(part, asked)
    if not words:
        return None
    notes = []
    if part.silent:
        notes.append("this part is nearly silent: captioners make things up there")
    if sum(chances) / len(chances) < LEAST_CONFIDENCE:
        notes.append(f"mean probability below {LEAST_CONFIDENCE}: a guess")
    if len(part.wave) > (listener.seconds + 0.01) * part.rate:
        notes.append(f"the captioner hears {listener.seconds:g} s of {seconds:g}")
    return Caption(tuple(words), tuple(chances), None, part.start, part.end, "; ".join(notes))


def typed(caption: str, audio_attention: str, noun_probability: str) -> Caption:
    try:
        return typed_caption(caption, audio_attention, noun_probability)
    except ValueError as error:
        raise ValueError(f"StoryweftTypedCaption: {error}") from error


class TypedCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftTypedCaption",
            display_name="Typed Caption",
            category=CATEGORY,
            description="A caption typed by hand, with a number for every word, where no captioner is wanted.",
            search_aliases=["word weights", "manual caption", "prompt weights"],
            inputs=[
                io.String.Input(
                    "caption", default="a dog barks in the rain", dynamic_prompts=False, tooltip="Words, separated by spaces."
                ),
                io.String.Input(
                    "audio_attention",
                    default="",
                    dynamic_prompts=False,
                    tooltip="One number from 0 up for each word, its audio attention. Empty: 1 for all.",
                ),
                io.String.Input(
                    "noun_probability",
                    default="",
                    dynamic_prompts=False,
                    tooltip="One number from 0 to 1 for each word. Empty: left to Sentence Attention.",
                ),
            ],
            outputs=[CaptionType.Output("caption", tooltip="The caption for the other nodes of sound.")],
        )

    @classmethod
    def validate_inputs(cls, caption=None, audio_attention="", noun_probability="") -> bool | str:
        given = {"caption": caption, "audio_attention": audio_attention, "noun_probability": noun_probability}
        return refusal(cls, (typed,), **given)

    @classmethod
    def execute(cls, caption, audio_attention="", noun_probability="") -> io.NodeOutput:
        return io.NodeOutput([typed(caption, audio_attention, noun_probability)])


class SentenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftSentenceAttention",
            display_name="Sentence Attention",
            category=CATEGORY,
            description="Finds how likely each word of a caption is a noun; nouns above 0.7 carry the picture.",
            search_aliases=["part of speech", "pos tagging", "noun weights"],
            inputs=[
                CaptionType.Input("caption", tooltip="From Audio Caption or Typed Caption."),
                io.Combo.Input(
                    "tagger",
                    options=taggers.names(),
                    default=taggers.BUILT_IN,
                    tooltip="The built-in list of nouns says 0 or 1 and needs nothing. nltk and spaCy work where they "
                    "are installed. Folders of models/pos_taggers: token classification models "
                    "with Penn (NN, NNS) or universal tags (NOUN, PROPN) give probabilities.",
                ),
            ],
            outputs=[
                CaptionType.Output("caption", tooltip="The caption with noun probabilities."),
                io.String.Output("report", tooltip="Every word with both attentions."),
            ],
        )

    @classmethod
    def execute(cls, caption, tagger) -> io.NodeOutput:
        node_id = "StoryweftSentenceAttention"
        captions, nouns_of = captions_of(caption, node_id), taggers.load(tagger, node_id)
        found = [one.with_nouns(nouns_of(one)) for one in captions]
        return io.NodeOutput(found, "\n".join(one.describe() for one in found))


class Spectrogram(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftSpectrogram",
            display_name="Spectrogram",
            category=CATEGORY,
            description="A picture of a sound as the captioner gets it: time from left to right, pitch from low to high.",
            search_aliases=["audio preview", "mel spectrogram", "waveform picture"],
            inputs=[
                io.Audio.Input("audio", tooltip="One sound or a batch, of one length."),
                io.Int.Input(
                    "height", default=256, min=64, max=2048, step=8, tooltip="Height of the picture in pixels."
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="A picture for each sound.")],
        )

    @classmethod
    def execute(cls, audio, height=256) -> io.NodeOutput:
        waves, rate = sounds.checked(audio, "StoryweftSpectrogram")
        return io.NodeOutput(torch.cat([sound_pictures.spectrogram(wave, rate, height) for wave in waves]))


def sources(
    node_id: str, voice: str, loudness: float, place: str, background: float, second_voice: str, second_loudness: float
) -> list[tuple[str, float]]:
    """Names and loudness of what is to be heard; ValueError for nothing."""
    parts = [(f"voice_{voice}", voice, loudness), (f"place_{place}", place, background)]
    parts.append((f"voice_{second_voice}", second_voice, second_loudness))
    chosen = [(name, level) for name, word, level in parts if word != demo_sounds.NOBODY and level > 0]
    if not chosen:
        raise ValueError(f"{node_id}: voice is '{voice}' and place is '{place}', or both are silent; choose one.")
    return chosen


class DemoSound(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        voices, places = demo_sounds.names()
        return io.Schema(
            node_id="StoryweftDemoSound",
            display_name="Demo Sound",
            category="Storyweft/Demo",
            description="A sound of the picture-book world: one or two voices in a place, each at a loudness. For your own sounds put "
            "Load Audio here. It can be joined with others into a batch through before.",
            search_aliases=["example sound", "test audio", "storyweft demo"],
            inputs=[
                io.Combo.Input("voice", options=[demo_sounds.NOBODY, *voices], tooltip="Who is heard."),
                io.Float.Input(
                    "loudness", default=0.6, min=0.0, max=2.0, step=0.01, tooltip="Loudness of the voice; 1 is full scale."
                ),
                io.Combo.Input("place", options=[demo_sounds.NOBODY, *places], tooltip="What is heard around."),
                io.Float.Input(
                    "background", default=0.3, min=0.0, max=2.0, step=0.01, tooltip="Loudness of the place."
                ),
                io.Combo.Input(
                    "second_voice",
                    options=[demo_sounds.NOBODY, *voices],
                    default=demo_sounds.NOBODY,
                    advanced=True,
                    tooltip="Somebody else who is heard at the same time.",
                ),
                io.Float.Input(
                    "second_loudness", default=0.6, min=0.0, max=2.0, step=0.01, advanced=True,
                    tooltip="Loudness of the second voice.",
                ),
                io.Audio.Input("before", optional=True, tooltip="Demo sounds that come before this one in the batch."),
            ],
            outputs=[io.Audio.Output("audio", tooltip="The sound, after those of before.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, voice=None, loudness=None, place=None, background=None, second_voice=demo_sounds.NOBODY, second_loudness=0.6
    ) -> bool | str:
        return refusal(
            cls, (sources,), voice=voice, loudness=loudness, place=place, background=background, second_voice=second_voice,
            second_loudness=second_loudness,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, voice, loudness, place, background, second_voice=demo_sounds.NOBODY, second_loudness=0.6, before=None
    ) -> io.NodeOutput:
        node_id = "StoryweftDemoSound"
        chosen = sources(node_id, voice, loudness, place, background, second_voice, second_loudness)
        wave, rate = demo_sounds.mix(chosen)
        wave = wave[None, None]
        if before is not None:
            earlier, own = sounds.checked(before, node_id)
            earlier = sounds.resampled(earlier, own, rate)[:, None]
            length = max(earlier.shape[-1], wave.shape[-1])
            wave = torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[-1])) for x in (earlier, wave)])
        return io.NodeOutput({"waveform": wave, "sample_rate": rate})


NODES = [AudioCaption, TypedCaption, SentenceAttention, Spectrogram, DemoSound]
