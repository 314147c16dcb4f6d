"""StoryGen's weights on ComfyUI's terms: published U-Nets, their own tensors added to another SD1.5 model, the demo weights.

A published U-Net gets attn3 and norm4 inside its transformer blocks, so that core moves, patches and saves them with all
others. Added to a model that others may use too, they are a model of their own beside it.
"""

import pickle
import weakref
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ..models.story_gen import ImageAttention, sites, split
from .demo import read_weights
from .story_gen import ImageSites

KEY = "storyweft_storygen"
PREFIX = "model.diffusion_model."
LOADER_ID = "StoryweftStoryGenLoader"
_blocks = weakref.WeakKeyDictionary()  # diffusion model -> its transformer blocks


@dataclass(frozen=True, eq=False)
class StoryGenWeights:
    """What a MODEL carries: see ImageSites; pixel_range (low, high) of references as the weights were trained with."""

    name: str
    sites: ImageSites
    pixel_range: tuple[float, float] = (0.0, 1.0)
    added: bool = False  # to a model that was not trained with them


def transformer_blocks(diffusion_model) -> dict[tuple[str, int, int], BasicTransformerBlock]:
    """(path, block, depth) -> transformer block of a U-Net, in execution order."""
    if diffusion_model not in _blocks:
        _blocks[diffusion_model] = {
            _place(name): module
            for name, module in diffusion_model.named_modules()
            if isinstance(module, BasicTransformerBlock)
        }
    return _blocks[diffusion_model]


def _place(name: str) -> tuple[str, int, int]:
    path, *numbers, depth = name.replace("_blocks", "").replace("_block", "").split(".")
    return path, 0 if path == "middle" else int(numbers[0]), int(depth)


def site_names(unet_config: dict) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Site prefixes, published (diffusers) ones and ComfyUI's own, each -> (path, block, depth)."""
    ending = "attn1.to_q.weight"
    pairs = [pair for pair in comfy.utils.unet_to_diffusers(unet_config).items() if pair[0].endswith(ending)]
    return tuple(
        {pair[side].removesuffix(ending): _place(pair[1].removesuffix("." + ending)) for pair in pairs} for side in (0, 1)
    )


def read(path: str, node_id: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file. ValueError when it holds more than weights."""
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{node_id}: {Path(path).name} holds more than weights and is not opened; get a file of weights only."
        ) from error
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, metadata or {}


def own_sites(own: dict, diffusion_model, unet_config: dict, source: str) -> dict[tuple, dict[str, Tensor]]:
    """A file's own tensors by place in the U-Net. Raises ValueError; see models/story_gen.sites."""
    published, native = site_names(unet_config)
    names = native if set(own) & set(native) else published
    blocks = transformer_blocks(diffusion_model)
    widths = {
        name: (blocks[place].attn1.to_q.in_features, blocks[place].attn1.dim_head) for name, place in names.items()
    }
    return {names[name]: tensors for name, tensors in sites(own, widths, source).items()}


def heads(diffusion_model) -> dict[tuple, int]:
    """Width of one head in each transformer block."""
    return {site: block.attn1.dim_head for site, block in transformer_blocks(diffusion_model).items()}


def check_model(model, source: str, prediction: str = "EPS") -> None:
    """ValueError unless a MODEL is SD1.5-shaped and predicts what the weights were trained with."""
    base = model.model
    if not isinstance(base.model_config, comfy.supported_models.SD15):
        raise ValueError(
            f"{source}: made for U-Nets of SD1.5 and the model is {type(base.model_config).__name__} "
            f"({type(base.diffusion_model).__name__}); load an SD1.5 checkpoint."
        )
    if base.model_type.name != prediction:
        raise ValueError(
            f"{source}: made for {prediction} prediction and the model predicts {base.model_type.name}; load a model of that kind."
        )


def detect(state: dict[str, Tensor], source: str):
    """(model config, U-Net tensors in ComfyUI's names, own tensors) of a whole U-Net. ValueError unless nothing is left over."""
    base, own = split(state)
    if not own:
        raise ValueError(
            f"{source}: it holds no attn3 tensors, so it is no StoryGen U-Net (first tensors: {', '.join(list(state)[:3])})."
        )
    diffusers = "conv_in.weight" in base
    find = comfy.model_detection.model_config_from_diffusers_unet if diffusers else _config_from_unet
    config = find(base)
    if not isinstance(config, comfy.supported_models.SD15):
        found = "none that is known" if config is None else type(config).__name__
        raise ValueError(f"{source}: its U-Net is not SD1.5's ({found}), which StoryGen is made of.")
    if diffusers:
        base = renamed(base, config.unet_config, source)
    return config, base, own


def _config_from_unet(base: dict):
    return comfy.model_detection.model_config_from_unet(base, "")


def renamed(base: dict, unet_config: dict, source: str) -> dict:
    names, known = comfy.utils.unet_to_diffusers(unet_config), shapes(unet_config)
    expected = {key for key in names if names[key] in known}
    missing, unknown = sorted(expected - set(base)), sorted(set(base) - expected)
    if missing or unknown:
        what = f"{len(missing)} tensors are missing ({', '.join(missing[:3])})" if missing else ""
        more = f"{len(unknown)} are not known ({', '.join(unknown[:3])})" if unknown else ""
        raise ValueError(f"{source}: of the U-Net {' and '.join(filter(None, (what, more)))}; the file is not whole.")
    return {names[key]: base[key] for key in base}


def shapes(unet_config: dict) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of such a U-Net."""
    known = {key: value for key, value in unet_config.items() if key not in ("dtype", "device")}
    made = UNetModel(
        **known, device="meta", operations=comfy.ops.disable_weight_init
    )
    return {key: value.shape for key, value in made.state_dict().items()}


def load_unet(path: str, disable_dynamic: bool = False):
    """The MODEL of a published StoryGen U-Net; also what core calls to build it anew without dynamic memory."""
    source = f"{LOADER_ID}: {Path(path).name}"
    state, metadata = read(path, LOADER_ID)
    config, base, own = detect(state, source)
    patcher = comfy.sd.load_diffusion_model_state_dict(base, {}, metadata, disable_dynamic)
    patcher = graft(patcher, own, Path(path).name, source)
    patcher.cached_patcher_init = (load_unet, (path,))
    return patcher


def graft(patcher, own: dict, name: str, source: str):
    """A patcher of the same model with the own tensors inside its transformer blocks."""
    model = patcher.model
    network = model.diffusion_model
    found = own_sites(own, network, model.model_config.unet_config, source)
    operations = comfy.ops.pick_operations(network.dtype, model.manual_cast_dtype, model_config=model.model_config)
    for site, block in transformer_blocks(network).items():
        made = _module(found[site], operations, block.attn1.to_q.weight.dtype)
        block.attn3, block.norm4 = made.attn3, made.norm4
    comfy.model_management.archive_model_dtypes(network)
    grown = type(patcher)(model, load_device=patcher.load_device, offload_device=patcher.offload_device)
    grown.set_attachments(KEY, StoryGenWeights(name, ImageSites(transformer_blocks, heads(network))))
    return grown


def _module(tensors: dict[str, Tensor], operations, dtype) -> ImageAttention:
    inner, channels = tensors["attn3.to_q.weight"].shape
    with torch.inference_mode(False):
        made = ImageAttention(channels, inner, operations, dtype, "cpu")
        made.load_state_dict(tensors)
    return made.requires_grad_(False)


def add(model, state: dict[str, Tensor], metadata: dict, name: str, node_id: str):
    """Clone of an SD1.5 MODEL with the own tensors of a StoryGen file beside it. Raises ValueError for what does not fit."""
    source = f"{node_id}: {name}"
    check_model(model, source, metadata.get("prediction", "EPS"))
    base = model.model
    own = own_sites(split(state)[1], base.diffusion_model, base.model_config.unet_config, source)
    made = torch.nn.ModuleDict(
        {"_".join(map(str, site)): _module(t, comfy.ops.manual_cast, base.get_dtype()) for site, t in own.items()}
    )
    modules = dict(zip(own, made.values(), strict=True))
    patcher = comfy.model_patcher.ModelPatcher(
        made, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    model = model.clone()
    model.set_additional_models(KEY, [patcher])

    def of_any(diffusion_model) -> dict:
        return modules

    twice = metadata.get("residual", "twice") == "twice"
    low, high = map(float, metadata.get("pixel_range", "0 1").split())
    weights = StoryGenWeights(name, ImageSites(of_any, heads(base.diffusion_model), twice), (low, high), True)
    model.set_attachments(KEY, weights)
    return model


def add_demo(model, node_id: str):
    """The demo U-Net with the weights of weights/storygen.safetensors."""
    state, metadata = read_weights("storygen", node_id=node_id)
    return add(model, state, metadata, "demo weights", node_id)


def weights_of(model, node_id: str) -> StoryGenWeights:
    """The StoryGen weights of a MODEL. ValueError when it has none."""
    found = model.get_attachment(KEY)
    if found is None:
        raise ValueError(
            f"{node_id}: model carries no StoryGen weights (attn3, norm4); load it with StoryweftStoryGenLoader, or send it through "
            "StoryweftStoryGenWeights."
        )
    return found
