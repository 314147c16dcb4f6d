"""Joint encoders on the host's terms: ImageBind's towers, or the demo CLIP with its sound encoder; mapping networks of files."""

import json
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models import imagebind, imagebind_frontend
from ..models.sound_mapping import PromptMapping, build
from . import imagebind as imagebind_host
from .demo import WEIGHTS, load_clip, load_clip_vision, read_weights
from .judges import demo_features, demo_sound_encoder
from .model_files import read
from .sound_words import tokenize
from .sounds import resampled

FOLDER, MAPPINGS = "imagebind", "prompt_mappings"  # of models/
DEMO = "demo"
MODALITIES = ("audio", "image", "text")
WANTED = {"all": ("audio", "vision", "text"), "audio only": ("audio",), "audio and text": ("audio", "text")}


@dataclass(frozen=True)
class Embedding:
    """Vectors [n, width] of one space; modality "" once several are mixed."""

    vectors: Tensor
    modality: str
    space: str


def add_folders() -> None:
    for folder in (FOLDER, MAPPINGS):
        folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))


def names(folder: str) -> list[str]:
    return [DEMO, *folder_paths.get_filename_list(folder)]


class ImageBindEncoder:
    """Published towers; those that were not loaded are refused by name."""

    space = "ImageBind"

    def __init__(self, network: imagebind.ImageBind, modalities, node_id: str):
        self.network, self.modalities, self.node_id = network, modalities, node_id
        self.device = comfy.model_management.get_torch_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, self.device, comfy.model_management.unet_offload_device()
        )

    def _ready(self, tower: str, name: str) -> None:
        if tower not in self.modalities:
            raise ValueError(f"{self.node_id}: the {name} tower of ImageBind was not loaded; choose 'all' in its loader.")
        comfy.model_management.load_models_gpu([self.patcher])

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, clips: int, short: str) -> Tensor:
        self._ready("audio", "audio")
        heard = imagebind_frontend.hear(resampled(wave, rate, imagebind_frontend.RATE), clips, short)
        return self.network.encode_audio(heard.to(self.device)).cpu()

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        self._ready("vision", "image")
        return self.network.encode_vision(imagebind_host.see(images).to(self.device)).cpu()

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        self._ready("text", "text")
        return self.network.encode_text(imagebind_host.tokenize(texts).to(self.device)).cpu()


class DemoEncoder:
    """The demo CLIP and the sound encoder in its space."""

    space = "demo"

    def __init__(self, folder: Path = WEIGHTS):
        self.sounds, self.samples = demo_sound_encoder(folder)
        self.clip, self.vision = load_clip(str(folder)), load_clip_vision(str(folder))

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, clips: int, short: str) -> Tensor:
        return self.sounds(demo_features(wave, rate, self.samples))

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        return self.vision.encode_image(images)["image_embeds"].cpu().float()

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        projection = self.clip.cond_stage_model.clip_l.transformer.text_projection
        found = []
        for text in texts:
            pooled = self.clip.encode_from_tokens(tokenize(self.clip, text), return_pooled=True)[1]
            found.append(projection(pooled.to(projection.weight)).cpu())
        return torch.cat(found)


def check_licence(node_id: str, encoder: str, licence_read: bool) -> None:
    if encoder != DEMO and not licence_read:
        raise ValueError(
            f"{node_id}: ImageBind is CC BY-NC-SA 4.0, for non-commercial use; switch licence_read on to load it."
        )


def load_encoder(name: str, towers: str, licence: bool, node_id: str):
    """The encoder of a name. Raises ValueError without the licence's acknowledgement and for other files."""
    with torch.inference_mode(False):
        if name == DEMO:
            return DemoEncoder()
        check_licence(node_id, name, licence)
        state = read(folder_paths.get_full_path_or_raise(FOLDER, name), node_id)
        network = imagebind.build(state, WANTED[towers], f"{node_id}: {name}")
        return ImageBindEncoder(network, WANTED[towers], node_id)


def load_mapping(name: str, node_id: str) -> PromptMapping:
    """The mapping network of a name. Raises ValueError for a file of another kind."""
    with torch.inference_mode(False):
        if name == DEMO:
            tensors, about = read_weights("sound_mapping", WEIGHTS, node_id)
        else:
            path = folder_paths.get_full_path_or_raise(MAPPINGS, name)
            if not path.endswith(".safetensors"):
                raise ValueError(f"{node_id}: {name} is no safetensors file.")
            tensors, about = comfy.utils.load_torch_file(path, return_metadata=True)
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        return build(tensors, about, f"{node_id}: {name}", comfy.ops.manual_cast)


def as_vision_output(vectors: Tensor) -> comfy.clip_vision.Output:
    """What core's unCLIP conditioning reads, from embeddings [n, 1024]."""
    found = comfy.clip_vision.Output()
    found.image_embeds = vectors
    found.last_hidden_state = found.penultimate_hidden_states = None
    return found


def check_unclip(model, width: int, node_id: str) -> None:
    """Raise ValueError unless the model takes image embeddings of `width` beside as many numbers of the noise level."""
    takes = model.model.model_config.unet_config.get("adm_in_channels")
    if takes != 2 * width or not hasattr(model.model, "noise_augmentor"):
        name = type(model.model).__name__
        raise ValueError(
            f"{node_id}: the model ({name}, adm_in_channels {takes}) takes no image embeddings of {width}; load the unCLIP model "
            "sd21-unclip-h."
        )


def describe(embedding: Embedding) -> str:
    unit = normalize(embedding.vectors, dim=-1)
    norms = ", ".join(f"{norm:.2f}" for norm in embedding.vectors.norm(dim=-1).tolist()[:8])
    alike = "" if len(unit) < 2 else f"; cosine of the first two {float(unit[0] @ unit[1]):.3f}"
    return f"{embedding.space} {embedding.modality or 'mixture'} {tuple(embedding.vectors.shape)}, norms {norms}{alike}"


def settings(mapping: PromptMapping) -> str:
    shown = ("arch", "inside", "length", "width", "pooled", "target")
    return json.dumps({key: mapping.config.get(key) for key in shown})
