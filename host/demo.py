"""The demo models of weights/ in ComfyUI's own classes: SD1.5-shaped UNetModel, SD1 CLIP, CLIP vision, VAE.

The video model is UNetModel with SVD's temporal layers between the picture model's own, which its file does not repeat.

Everything core does with a checkpoint's MODEL, CLIP, VAE and CLIP_VISION works on these unchanged. What is ours is the
small autoencoder and the compact word table: one row per known token and one for all others.
"""

import hashlib
import json
from pathlib import Path
from typing import ClassVar

import comfy.clip_vision
import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget

from ..models.autoencoder import TinyAutoencoder

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
CHECKSUMS = "SHA256SUMS"
PREDICTIONS = {"v": comfy.model_base.ModelType.V_PREDICTION, "eps": comfy.model_base.ModelType.EPS}
TOKENS = 49408  # rows of the SD1 tokenizer's table
# the smallest AutoencoderKL that comfy.sd.VAE can be built around before its network is exchanged
STAND_IN = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 8,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


class DemoModel(comfy.supported_models.SD15):
    """SD1.5's model class with the sizes, prediction and latent scale that the weight files state."""

    unet_extra_config: ClassVar[dict] = {}

    def __init__(self, unet_config: dict, prediction: str, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__(unet_config)
        self.prediction = PREDICTIONS[prediction]
        self.latent_format = latent_format

    def model_type(self, state_dict, prefix=""):
        return self.prediction


class FrameSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """SD's schedule with the sampler's noise made alike over the frames, as the model was trained (arXiv 2305.10474)."""

    def __init__(self, model_config, share: float):
        super().__init__(model_config)
        self.share = share  # correlation of the noise of two frames

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        """Mean over frames and deviation from it are stretched apart; the noise of each frame stays standard normal."""
        mean = noise.mean(0, keepdim=True)
        together = (1 + (len(noise) - 1) * self.share) ** 0.5
        noise = together * mean + (1 - self.share) ** 0.5 * (noise - mean)
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)


class FramesModel(comfy.model_base.BaseModel):
    """A diffusion model whose latent batch is one clip, as SVD's: temporal layers see all rows of it as frames."""

    def __init__(self, model_config, share: float, device=None):
        super().__init__(model_config, model_config.prediction, device)
        self.model_sampling = FrameSampling(model_config, share)

    def extra_conds(self, **kwargs):
        frames = comfy.conds.CONDConstant(kwargs["noise"].shape[0])
        return {**super().extra_conds(**kwargs), "num_video_frames": frames}


class DemoVideoModel(DemoModel):
    def __init__(self, unet_config: dict, scale: comfy.latent_formats.LatentFormat, share: float):
        super().__init__(unet_config, "v", scale)
        self.share = share

    def get_model(self, state_dict, prefix="", device=None):
        return FramesModel(self, self.share, device)


def read_weights(
    name: str, folder: Path = WEIGHTS, node_id: str = "StoryweftDemoLoader"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of weights/<name>.safetensors; RuntimeError if the file is not the one that was released."""
    path, listed = Path(folder) / f"{name}.safetensors", Path(folder) / CHECKSUMS
    remedy = f"Get the pack's weights/{path.name} again."
    missing = [str(file) for file in (path, listed) if not file.is_file()]
    if missing:
        raise RuntimeError(f"{node_id}: the weight file {missing[0]} is missing. {remedy}")
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise RuntimeError(f"{node_id}: {path} is only a Git LFS pointer of {len(data)} bytes. {remedy}")
    sums = dict(reversed(line.split()) for line in listed.read_text().splitlines())
    if hashlib.sha256(data).hexdigest() != sums.get(path.name):
        raise RuntimeError(
            f"{node_id}: {path} ({len(data)} bytes) is truncated or changed: "
            f"its checksum is not the one in {CHECKSUMS}. {remedy}"
        )
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}, metadata


def latent_format(metadata: dict[str, str]) -> comfy.latent_formats.LatentFormat:
    """SD1.5's format with the demo autoencoder's scale and colours for previews."""
    found = comfy.latent_formats.SD15(float(metadata["scale_factor"]))
    found.taesd_decoder_name = None
    if "latent_rgb" in metadata:
        *found.latent_rgb_factors, found.latent_rgb_factors_bias = json.loads(metadata["latent_rgb"])
    return found


def _patcher(disable_dynamic: bool):
    return comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher


def load_unet(folder: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The diffusion model; also what core calls to build it anew without dynamic memory."""
    with torch.inference_mode(False):
        tensors, metadata = read_weights("unet", Path(folder))
        scale = latent_format(read_weights("autoencoder", Path(folder))[1])
        config = DemoModel(json.loads(metadata["config"]), metadata["prediction"], scale)
        patcher = _patched(config, tensors, disable_dynamic)
        patcher.cached_patcher_init = (load_unet, (str(folder),))
        return patcher


def _patched(config: DemoModel, tensors: dict[str, torch.Tensor], disable_dynamic: bool):
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, device=comfy.model_management.unet_offload_device())
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = _patcher(disable_dynamic)(model, load_device=device, offload_device=offload)
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    return patcher


def load_video(folder: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The video model: the picture model's spatial layers and the temporal ones of weights/video.safetensors.

    Temporal tensors that the file's metadata lists as padded are zero beyond the part that the file holds.
    """
    with torch.inference_mode(False):
        tensors, metadata = read_weights("video", Path(folder), "StoryweftDemoVideoLoader")
        for name, shape in json.loads(metadata["padded"]).items():
            kept = tensors.get(name, torch.zeros([0] * len(shape)))
            tensors[name] = torch.zeros(shape)
            tensors[name][tuple(slice(size) for size in kept.shape)] = kept
        tensors |= read_weights("unet", Path(folder), "StoryweftDemoVideoLoader")[0]
        scale = latent_format(read_weights("autoencoder", Path(folder), "StoryweftDemoVideoLoader")[1])
        config = DemoVideoModel(json.loads(metadata["config"]), scale, float(metadata["noise_share"]))
        patcher = _patched(config, tensors, disable_dynamic)
        patcher.cached_patcher_init = (load_video, (str(folder),))
        return patcher


def load_clip(folder: str, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder behind the real SD1 tokenizer; words the world does not have share one embedding."""
    with torch.inference_mode(False):
        tensors, metadata = read_weights("clip", Path(folder))
        rows, ids = tensors["text.rows"], tensors["text.token_ids"].long()
        table = rows[0].expand(TOKENS, -1).clone()
        table[ids] = rows[1:]
        text = {key.removeprefix("text."): value for key, value in tensors.items() if key.startswith("text.text")}
        text["text_model.embeddings.token_embedding.weight"] = table
        clip = comfy.sd.CLIP(
            ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
            disable_dynamic=disable_dynamic,
            model_options={"clip_l_model_config": json.loads(metadata["text"]), "dtype": torch.float32},
        )
        clip.load_sd(text)
        clip.patcher.cached_patcher_init = (load_clip_patcher, (str(folder),))
        return clip


def load_clip_patcher(folder: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(folder, disable_dynamic).patcher


def load_vae(folder: str, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """The autoencoder inside core's VAE, which brings batching, tiling and offload."""
    with torch.inference_mode(False):
        tensors, metadata = read_weights("autoencoder", Path(folder))
        network = TinyAutoencoder(**json.loads(metadata["config"]), operations=comfy.ops.disable_weight_init)
        network.train(False).requires_grad_(False)
        stand_in = comfy.sd.AutoencoderKL(**STAND_IN).state_dict()
        vae = comfy.sd.VAE(sd=stand_in, config={"params": STAND_IN}, dtype=torch.float32)
        vae.first_stage_model, vae.size = network, None
        vae.patcher = _patcher(disable_dynamic)(
            network,
            load_device=vae.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        network.load_state_dict(tensors, assign=vae.patcher.is_dynamic())
        comfy.model_management.archive_model_dtypes(network)
        vae.patcher.cached_patcher_init = (load_vae_patcher, (str(folder),))
        return vae


def load_vae_patcher(folder: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_vae(folder, disable_dynamic).patcher


def load_clip_vision(folder: str) -> comfy.clip_vision.ClipVisionModel:
    """The image encoder that shares its embedding space with the text encoder."""
    with torch.inference_mode(False):
        tensors, metadata = read_weights("clip", Path(folder))
        vision = comfy.clip_vision.ClipVisionModel(json.loads(metadata["vision"]))
        vision.load_sd(
            {key.removeprefix("vision."): value for key, value in tensors.items() if key.startswith("vision.")}
        )
        return vision


def load_demo_video(folder: str | Path = WEIGHTS):
    """The video MODEL, and CLIP, VAE and CLIP_VISION, which are the picture model's; RuntimeError as load_demo."""
    return load_video(str(folder)), load_clip(str(folder)), load_vae(str(folder)), load_clip_vision(str(folder))


def load_demo(folder: str | Path = WEIGHTS):
    """MODEL, CLIP, VAE and CLIP_VISION of the demo models; RuntimeError naming the file that is missing or damaged."""
    return load_unet(str(folder)), load_clip(str(folder)), load_vae(str(folder)), load_clip_vision(str(folder))
