"""Who says whether a picture agrees with a caption and a sound: AudioCLIP, ImageBind, CLAP through words, or the demo encoders."""

import json
from pathlib import Path

import comfy.ops
import torch
from torch import Tensor

from ..models import act_frontend, audioclip, imagebind, imagebind_frontend
from ..models.sound_encoder import SoundEncoder
from . import clap, model_files
from . import imagebind as imagebind_host
from .demo import WEIGHTS, load_clip, read_weights
from .judge import Judge
from .sound_words import tokenize
from .sounds import resampled

FOLDER = "sound_judges"  # of models/
DEMO = "demo"
SAME = "the judge itself"
SECONDS = 10.0  # that AudioCLIP hears


def names() -> list[str]:
    """The demo encoders, and what lies in models/sound_judges."""
    return [DEMO, *model_files.names(FOLDER)]


class AudioClipJudge(Judge):
    """The authors' judge of sounds; its own towers also judge the caption. Sounds are cut or padded to 10 s."""

    def __init__(self, network: audioclip.AudioClip, authors_scale: bool):
        super().__init__(network)
        self.authors_scale = authors_scale
        self.log_scale = network.audio_image_scale.detach()

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        return self.network.encode_text(imagebind_host.tokenize([caption]).to(self.device))

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        samples = round(SECONDS * audioclip.RATE)
        wave = resampled(wave, rate, audioclip.RATE)[:samples]
        wave = torch.nn.functional.pad(wave, (0, samples - len(wave)))
        return self.network.encode_audio(wave[None].to(self.device), self.authors_scale)

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.network.encode_image(pixels)
        return seen, seen


class ImageBindJudge(Judge):
    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        return self.network.encode_text(imagebind_host.tokenize([caption]).to(self.device))

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        wave = resampled(wave, rate, imagebind_frontend.RATE)
        return self.network.encode_audio(imagebind_frontend.hear(wave[None], short="loop").to(self.device))

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.network.encode_vision(pixels)
        return seen, seen


class DemoJudge(Judge):
    """The demo CLIP's picture tower and the sound encoder that was trained into its space."""

    def __init__(self, folder: Path):
        # seconds of import that only those who use it should wait for
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        tensors, metadata = read_weights("clip", folder)
        settings = json.loads(metadata["vision"])
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, attn_implementation="sdpa"))
        own = {key.removeprefix("vision."): value for key, value in tensors.items() if key.startswith("vision.")}
        own = {key: value for key, value in own.items() if key in network.state_dict()}
        network.load_state_dict(own, strict=False)
        super().__init__(network.train(False).requires_grad_(False))
        self.size = settings["image_size"]
        self.clip = load_clip(str(folder))
        self.encoder, self.samples = demo_sound_encoder(folder)
        self.encoder.to(self.device)

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        pooled = self.clip.encode_from_tokens(tokenize(self.clip, caption), return_pooled=True)[1]
        projection = self.clip.cond_stage_model.clip_l.transformer.text_projection
        return projection(pooled.to(projection.weight)).to(self.device)

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        return self.encoder(demo_features(wave[None], rate, self.samples).to(self.device))

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.network(pixel_values=pixels).image_embeds
        return seen, seen


def demo_features(wave: Tensor, rate: int, samples: int) -> Tensor:
    return act_frontend.log_mel(resampled(wave.cpu(), rate, act_frontend.RATE), samples=samples)


def demo_sound_encoder(folder: Path = WEIGHTS) -> tuple[SoundEncoder, int]:
    """The small encoder of weights/ and the samples at 32 kHz that it hears."""
    tensors, metadata = read_weights("sound_encoder", folder)
    config = json.loads(metadata["config"])
    network = SoundEncoder(config["sizes"], comfy.ops.manual_cast)
    network.load_state_dict(tensors)
    return network.train(False).requires_grad_(False), round(config["seconds"] * act_frontend.RATE)


def load(name: str, authors_scale: bool, node_id: str, reader: str = SAME) -> clap.SeparateTextJudge | Judge:
    """The judge of a name of `names()`; `reader`: the CLIP of that name judges the caption in its place.

    Weights are normal tensors. Raises ValueError for a file of another kind, and for CLAP without a CLIP.
    """
    with torch.inference_mode(False):
        path = None if name == DEMO else model_files.located(FOLDER, name, node_id)
        kind = clap.kind_of(path) if path else ""
        if kind == "clip":
            raise ValueError(f"{node_id}: {name} is CLIP, which hears nothing; choose it at caption_judge.")
        if kind == "clap" and reader == SAME:
            raise ValueError(f"{node_id}: {name} is CLAP, which sees no pictures; choose a CLIP at caption_judge.")
        reading = None if reader == SAME else clap.ClipJudge(model_files.located(FOLDER, reader, node_id), node_id)
        if path is None:
            found = DemoJudge(WEIGHTS)
        elif path.is_dir():
            return clap.ClapJudge(path, reading, node_id)
        else:
            found = of_file(path, authors_scale, node_id)
        return found if reading is None else clap.SeparateTextJudge(found, reading)


def of_file(path: Path, authors_scale: bool, node_id: str) -> Judge:
    state = model_files.read(path, node_id)
    if any(key.startswith("modality_trunks.") for key in state):
        return ImageBindJudge(imagebind.build(state, imagebind.MODALITIES, f"{node_id}: {path.name}"))
    return AudioClipJudge(audioclip.build(state, f"{node_id}: {path.name}"), authors_scale)
