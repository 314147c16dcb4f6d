"""The Semantic Motion Predictor inside ComfyUI: files, CLIP embeddings of keyframes, and four ways into a video model.

SVD reads one embedding per frame as its conditioning. U-Nets whose batch is the clip read them through an image adapter of
published layout, or as further rows of the prompt. Wan's cross-attention gets a branch over the rows of its latent frame.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ..models.ip_adapter import build as build_adapter
from ..models.motion_predictor import FORMAT, MotionPredictor, build, film, latent_means
from ..story import transitions
from . import families, override
from .apa import layer_alphas
from .demo import read_weights
from .frame_rows import NODE_ID, WAN_STRIDE, AdapterRows, FrameRows, LatentRows, PromptRows
from .image_adapter import ENCODERS, LoadedAdapter, channels, check_features
from .transformer import FORMS
from .unet import UNetFamily

PANELS = "storyweft_panels"  # the panel of each row, of conditioning that a story made
ATTACH = ("automatic", "image adapter", "rows of the prompt")


@dataclass(eq=False)
class LoadedPredictor:
    """A predictor with the name and metadata of its file and the image adapter trained with it, if there is one.

    `patcher` moves the predictor to the device.
    """

    name: str
    network: MotionPredictor
    metadata: dict[str, str] = field(default_factory=dict)
    adapter: LoadedAdapter | None = None

    def __post_init__(self):
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.network,
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )

    @property
    def pinned(self) -> bool:
        return self.metadata.get("pinned", "true") == "true"


def load(path: str, node_id: str) -> LoadedPredictor:
    """The predictor of a .safetensors file, with the image adapter whose tensors stand beside it.

    Raises ValueError for files of another kind or format.
    """
    name = Path(path).name
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    metadata = dict(metadata or {})
    if metadata.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{node_id}: {name} has the format {metadata['format']}, not {FORMAT}.")
    return loaded(tensors, metadata, name, f"{node_id}: {name}")


def loaded(tensors: dict[str, Tensor], metadata: dict[str, str], name: str, source: str) -> LoadedPredictor:
    """The same of tensors that were read."""
    beside = {key: value for key, value in tensors.items() if key.startswith(("image_proj.", "ip_adapter."))}
    own = {key: value for key, value in tensors.items() if key not in beside}
    network = build(own, metadata, source, comfy.ops.manual_cast)
    adapter = LoadedAdapter(name, build_adapter(beside, source, comfy.ops.manual_cast)) if beside else None
    return LoadedPredictor(name, network, metadata, adapter)


def load_demo() -> LoadedPredictor:
    """The predictor of weights/ for the demo encoder and video model, with its adapter."""
    tensors, metadata = read_weights("motion", node_id="StoryweftLoadMotionPredictor")
    return loaded(tensors, metadata, "demo predictor", "demo predictor")


def encoder_name(clip_vision) -> str:
    """What predictor files call a CLIP vision model: its width, layers and the width of its pooled embedding."""
    config = clip_vision.config
    return f"clip-{config['hidden_size']}x{config['num_hidden_layers']}-{config['projection_dim']}"


def pooled(clip_vision, pictures: Tensor, node_id: str) -> Tensor:
    """Projected pooled embeddings [n, D] of pictures [n, h, w, 3], as they are, float32 on the CPU."""
    found = clip_vision.encode_image(pictures[..., :3])["image_embeds"]
    if found is None or found.ndim != 2:
        raise ValueError(
            f"{node_id}: clip_vision is a {clip_vision.model_type}, which has no pooled embedding of a picture; load the "
            "CLIP vision model (ViT-H for SVD and most adapters)."
        )
    return found.float().cpu()


def check_encoder(predictor: LoadedPredictor, clip_vision, node_id: str) -> None:
    """ValueError unless the predictor was trained on this encoder's embeddings."""
    made, given = predictor.metadata.get("encoder"), encoder_name(clip_vision)
    if made is not None and made != given:
        raise ValueError(f"{node_id}: {predictor.name} was trained on embeddings of {made} and clip_vision is {given}.")


def check_film(keyframes: int, length: int, node_id: str) -> None:
    """ValueError for fewer than two pictures or fewer than two frames from one to the next."""
    if keyframes < 2:
        raise ValueError(f"{node_id}: first holds {keyframes} picture and last none; give at least two pictures.")
    if length < 2:
        raise ValueError(f"{node_id}: frames_per_transition is {length}; give at least 2, both pictures counted.")


@torch.inference_mode()
def predict(predictor: LoadedPredictor | None, keyframes: Tensor, length: int, pinned: bool, node_id: str) -> Tensor:
    """Embeddings [frames, D] of the film through keyframes [M, D], float32 on the CPU; interpolated without a predictor.

    Raises ValueError for fewer than two keyframes or frames, embeddings of another width, and numbers that are not finite.
    """
    check_film(len(keyframes), length, node_id)
    bad = (~keyframes.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{node_id}: the embedding of picture {bad[0]} is not finite; load the CLIP vision model again."
        )
    for index, (one, other) in enumerate(zip(keyframes, keyframes[1:], strict=False)):
        if torch.equal(one, other):
            logging.info("%s: pictures %d and %d look the same to CLIP vision.", node_id, index, index + 1)
    places = transitions.places(len(keyframes), length)
    if predictor is None:
        return film(None, keyframes.float(), places)
    if predictor.network.dim != keyframes.shape[1]:
        raise ValueError(
            f"{node_id}: {predictor.name} predicts embeddings {predictor.network.dim} wide and clip_vision gives "
            f"{keyframes.shape[1]}; load the CLIP vision model it was trained with."
        )
    comfy.model_management.load_model_gpu(predictor.patcher)
    found = film(predictor.network, keyframes.float().to(predictor.patcher.load_device), places, pinned).cpu()
    if not found.isfinite().all():
        raise ValueError(f"{node_id}: {predictor.name} predicts numbers that are not finite; its file is damaged.")
    return found


@dataclass(frozen=True)
class Attachment:
    """What the node was given: embeddings [frames, D] of a film through `keyframes` pictures, and how they act."""

    embeddings: Tensor
    keyframes: int
    length: int
    predictor: LoadedPredictor | None = None
    adapter: LoadedAdapter | None = None
    how: str = ATTACH[0]
    strength: float = 1.0


def spread(conditioning: list, keyframes: int, length: int) -> list:
    """Conditioning with one row for each picture as one with a row for each frame, that of the nearer picture.

    Other conditioning is returned as it is.
    """
    rows = [segment + round(u) for segment, u in transitions.places(keyframes, length)]
    out = []
    for text, extras in conditioning:
        if len(text) != keyframes:
            out.append([text, extras])
            continue
        extras = {
            key: value[rows] if torch.is_tensor(value) and value.ndim > 1 and len(value) == keyframes else value
            for key, value in extras.items()
        }
        if PANELS in extras:
            extras[PANELS] = tuple(extras[PANELS][row] for row in rows)
        out.append([text[rows], extras])
    return out


def attach(model, positive: list, negative: list, given: Attachment) -> tuple:
    """(model, positive, negative) in which every frame sees its embedding; strength 0 gives the same objects back.

    Raises ValueError for models that have no way to read them, and for adapters and widths that do not fit.
    """
    family = families.find(model, NODE_ID)
    if isinstance(model.model, comfy.model_base.SVD_img2vid):
        form = _attach_svd
    elif isinstance(family, UNetFamily):
        form = _attach_unet
    elif getattr(family, "form", None) is FORMS["WanModel"]:
        form = _attach_wan
    else:
        raise ValueError(
            f"{NODE_ID}: {family.model_class} has no cross-attention over embeddings of a picture; use the first and last frame "
            "nodes of its own."
        )
    if form is not _attach_wan:
        positive, negative = (spread(one, given.keyframes, given.length) for one in (positive, negative))
    made = form(model, positive, negative, given, family)
    return made if given.strength else (model, positive, negative)


def _attach_svd(model, positive, negative, given: Attachment, family) -> tuple:
    """[frames, 1, D] as positive, one row of zeros as negative; everything else in the conditionings stays."""
    if given.adapter is not None or given.how != ATTACH[0] or given.strength not in (0, 1):
        raise ValueError(
            f"{NODE_ID}: SVD reads the embeddings by itself; remove the image_adapter, set attach to automatic and strength to 1 "
            f"(or 0: nothing), not {given.strength}."
        )
    width = channels(family)[1]
    if given.embeddings.shape[1] != width:
        raise ValueError(
            f"{NODE_ID}: the model reads embeddings {width} wide and clip_vision gives {given.embeddings.shape[1]}; load the "
            f"{ENCODERS.get(width, 'right')} CLIP vision model."
        )
    rows = given.embeddings[:, None]
    positive = [[rows, dict(extras)] for _, extras in positive]
    negative = [[torch.zeros_like(rows[:1]), dict(extras)] for _, extras in negative]
    return override.register(model, FrameRows(len(rows))), positive, negative


def _tokens(given: Attachment, projection) -> tuple[Tensor, Tensor]:
    """Tokens of a pooled projection for every frame and for no picture, whose embedding is zero."""
    seen = torch.cat([given.embeddings, torch.zeros_like(given.embeddings[:1])])
    with torch.inference_mode():
        tokens = projection(seen)
    return tokens[:-1], tokens[-1:]


def _adapter_tokens(given: Attachment) -> tuple[Tensor, Tensor]:
    check_features(given.adapter, given.embeddings, NODE_ID)
    return _tokens(given, given.adapter.network.image_proj.cpu())


def _attach_unet(model, positive, negative, given: Attachment, family) -> tuple:
    if given.adapter is not None and given.how != "rows of the prompt":
        even = dict.fromkeys(("input", "middle", "output"), 1.0)
        alphas = layer_alphas(model, given.adapter, even, dict.fromkeys(even, given.strength), NODE_ID)
        rule = AdapterRows(given.adapter, *_adapter_tokens(given), alphas)
    elif given.how == "image adapter":
        raise ValueError(f"{NODE_ID}: attach is image adapter and image_adapter is not connected.")
    else:
        rule = PromptRows(*_prompt_tokens(given, family))
    return override.register(model, rule), positive, negative


def _prompt_tokens(given: Attachment, family) -> tuple[Tensor, Tensor]:
    width = channels(family)[1]
    trained = None if given.predictor is None else given.predictor.network.context_proj
    if given.strength not in (0, 1):
        raise ValueError(
            f"{NODE_ID}: strength is {given.strength} and rows of the prompt share its softmax; set it to 1 or give an "
            "image_adapter."
        )
    if trained is None and given.how == ATTACH[0]:
        raise ValueError(
            f"{NODE_ID}: {family.model_class} cannot read embeddings of pictures by itself; connect an image_adapter of its "
            "family (Load Image Adapter) or a motion_predictor that was trained with a projection for it."
        )
    found = given.embeddings.shape[1] if trained is None else trained.width
    if found != width:
        raise ValueError(
            f"{NODE_ID}: the rows are {found} wide and the model's prompt {width}; give an image_adapter of its family instead."
        )
    return _tokens(given, nn.Unflatten(1, (1, width)) if trained is None else trained.cpu())


def _attach_wan(model, positive, negative, given: Attachment, family) -> tuple:
    if given.adapter is None or given.how == "rows of the prompt":
        raise ValueError(
            f"{NODE_ID}: {family.model_class} gives all frames the same picture tokens and no weights are published that would "
            "let it read one embedding a frame; connect an image_adapter trained for its blocks or use core's "
            "WanFirstLastFrameToVideo."
        )
    own, made = [family.width] * len(family.cross_layers), given.adapter.network.channels
    if made != own:
        raise ValueError(
            f"{NODE_ID}: {given.adapter.name} has {len(made)} layers {made[0]} wide and the model {len(own)} blocks "
            f"{family.width} wide; load the adapter that was trained for it."
        )
    total = len(given.embeddings)
    if not transitions.held(total, WAN_STRIDE):
        near = " or ".join(map(str, transitions.nearest_lengths(given.keyframes, given.length, WAN_STRIDE)))
        raise ValueError(
            f"{NODE_ID}: the film has {total} frames and the model's VAE holds 1, 5, 9, 13...; set frames_per_transition to "
            f"{near}, not {given.length}."
        )
    means = latent_means(given.embeddings, transitions.latent_frames(total, WAN_STRIDE))
    rule = LatentRows(given.adapter, *_adapter_tokens(replace(given, embeddings=means)), given.strength, family)
    return override.register(model, rule), positive, negative
