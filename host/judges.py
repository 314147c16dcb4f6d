"""Who says whether a picture agrees with a caption and a sound: AudioCLIP, ImageBind, or the demo encoders.

A judge answers to `text(caption)` and `audio(wave, rate)` with features [1, width] that are made once, and to
`see(picture)` with the picture's feature in the space of each; gradients flow through `see` alone.
"""

import json
import pickle
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..models import act_frontend, audioclip, imagebind, imagebind_frontend
from ..models.sound_encoder import SoundEncoder
from ..sampling.sound_optimise import LARGEST, prepare
from . import imagebind as imagebind_host
from .demo import WEIGHTS, load_clip, read_weights
from .sound_words import tokenize
from .sounds import resampled

FOLDER = "sound_judges"  # of models/
DEMO = "demo"
SECONDS = {"audioclip": 10.0}


def add_folder() -> None:
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def names() -> list[str]:
    """The demo encoders and the files of models/sound_judges."""
    return [DEMO, *folder_paths.get_filename_list(FOLDER)]


def read(path: str, node_id: str) -> dict[str, Tensor]:
    """Tensors of a file that holds nothing else. Raises ValueError otherwise."""
    try:
        return comfy.utils.load_torch_file(path, safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{node_id}: {Path(path).name} holds more than weights and is not opened.") from error


class Judge:
    """The common part: a network on the device and pictures as it takes them."""

    size = 224
    log_scale: Tensor | float = LARGEST

    def __init__(self, network: torch.nn.Module):
        self.device = comfy.model_management.get_torch_device()
        self.network = network.to(self.device)

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of prepared pictures in the space of texts and in that of sounds."""
        raise NotImplementedError

    def see(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Features of pictures [n, 3, h, w] in [0, 1] in the space of texts and in that of sounds."""
        return self._both(prepare(picture.float().to(self.device), self.size))


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
    def audio(self, wave: Tensor, rate: int) -> Tensor:
        samples = round(SECONDS["audioclip"] * audioclip.RATE)
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
    def audio(self, wave: Tensor, rate: int) -> Tensor:
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
    def audio(self, wave: Tensor, rate: int) -> Tensor:
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


def load(name: str, authors_scale: bool, node_id: str) -> Judge:
    """The judge of a name of `names()`, weights as normal tensors. Raises ValueError for a file of another kind."""
    with torch.inference_mode(False):
        if name == DEMO:
            return DemoJudge(WEIGHTS)
        state = read(folder_paths.get_full_path_or_raise(FOLDER, name), node_id)
        if any(key.startswith("modality_trunks.") for key in state):
            return ImageBindJudge(imagebind.build(state, imagebind.MODALITIES, f"{node_id}: {name}"))
        return AudioClipJudge(audioclip.build(state, f"{node_id}: {name}"), authors_scale)
