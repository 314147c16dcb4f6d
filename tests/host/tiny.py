"""Tiny random models in ComfyUI's own classes, one per family: small enough for a few sampler steps in a second."""

import math
from typing import NamedTuple

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models as families
import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "num_heads": 4,
    "num_head_channels": -1,
}
ADM = {
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 16,
}
VIDEO = {
    "in_channels": 8,
    "model_channels": 64,
    "adm_in_channels": 768,
    "num_classes": "sequential",
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
}


class Family(NamedTuple):
    """How to build one family: class, config, text [tokens, width], pooled width, latent channels, frames (0 = pictures)."""

    config: type
    settings: dict
    text: tuple[int, int]
    pooled: int = 0
    channels: int = 4
    frames: int = 0
    extra: dict = {}


FAMILIES = {
    "sd15": Family(families.SD15, UNET, (7, 16)),
    "sd2": Family(
        families.SD20, UNET | {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16}, (7, 16)
    ),
    "sdxl": Family(families.SDXL, UNET | ADM, (7, 16), 1280),
    "svd": Family(families.SVD_img2vid, UNET | VIDEO, (1, 16)),
    "wan": Family(
        families.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 96,
            "num_heads": 4,
            "num_layers": 4,
            "ffn_dim": 192,
            "freq_dim": 64,
            "text_dim": 64,
            "in_dim": 16,
            "out_dim": 16,
            "patch_size": (1, 2, 2),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "window_size": (-1, -1),
        },
        (9, 64),
        0,
        16,
        2,
    ),
    "flux": Family(
        families.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "vec_in_dim": 64,
            "context_in_dim": 64,
            "hidden_size": 96,
            "mlp_ratio": 4.0,
            "num_heads": 4,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 10, 10],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
            "out_channels": 16,
        },
        (9, 64),
        64,
        16,
    ),
    "sd3": Family(
        families.SD3,
        {
            "in_channels": 16,
            "depth": 2,
            "adm_in_channels": 2048,
            "pos_embed_max_size": 64,
            "num_patches": 4096,
            "patch_size": 2,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 64, "out_features": 128},
            },
            "qk_norm": "rms",
            "input_size": None,
        },
        (9, 64),
        2048,
        16,
    ),
    "qwen_image": Family(
        families.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "axes_dims_rope": (8, 12, 12),
            "patch_size": 2,
        },
        (9, 64),
        0,
        16,
        1,
    ),
    "zimage": Family(
        families.ZImage,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "multiple_of": 64,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 64,
            "axes_dims": [16, 24, 24],
            "axes_lens": [512, 512, 512],
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
            "ffn_dim_multiplier": 1.0,
        },
        (9, 64),
        0,
        16,
    ),
    "ltxv": Family(
        families.LTXV,
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "out_channels": 128,
            "cross_attention_dim": 96,
            "attention_head_dim": 24,
            "num_attention_heads": 4,
            "caption_channels": 64,
            "num_layers": 4,
        },
        (9, 64),
        0,
        128,
        2,
    ),
    "hunyuan_video": Family(
        families.HunyuanVideo,
        {
            "image_model": "hunyuan_video",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 64,
            "context_in_dim": 64,
            "hidden_size": 96,
            "mlp_ratio": 4.0,
            "num_heads": 4,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [8, 8, 8],
            "theta": 256,
            "patch_size": [1, 2, 2],
            "qkv_bias": True,
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        (9, 64),
        64,
        16,
        2,
    ),
    "cogvideox": Family(
        families.CogVideoX_T2V,
        {
            "image_model": "cogvideox",
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 16,
            "out_channels": 16,
            "time_embed_dim": 64,
            "text_embed_dim": 64,
            "num_layers": 4,
            "use_rotary_positional_embeddings": True,
        },
        (9, 64),
        0,
        16,
        2,
    ),
    "mochi": Family(
        families.GenmoMochi,
        {
            "image_model": "mochi_preview",
            "patch_size": 2,
            "in_channels": 12,
            "hidden_size_x": 96,
            "hidden_size_y": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio_x": 128.0,
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 64,
            "t5_token_length": 9,
            "rope_theta": 10000.0,
        },
        (9, 64),
        0,
        12,
        2,
    ),
}
UNETS = ("sd15", "sd2", "sdxl")
EXPERIMENTAL = ("wan", "flux", "sd3", "qwen_image", "zimage", "ltxv", "hunyuan_video", "cogvideox", "mochi")
SIZE = (8, 12)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Seeded values for every parameter and buffer, scaled so that activations stay tame."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            continue
        if "norm" in name and name.endswith("weight") or name.endswith(("query_norm.scale", "key_norm.scale")):
            tensor.data.fill_(1.0)
        elif tensor.ndim < 2:
            tensor.data.copy_(noise * 0.02)
        else:
            tensor.data.copy_(noise * (0.6 / math.sqrt(tensor[0].numel())))


def build(name: str, seed: int = 0):
    """A ModelPatcher of one family, float32 on the CPU."""
    family = FAMILIES[name]
    config = family.config(dict(family.settings))
    config.unet_config |= family.settings
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = config.get_model({}, device=torch.device("cpu"))
        fill(model.diffusion_model, seed)
    model.diffusion_model.train(False)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, device)


def conditioning(name: str, rows: int, seed: int, tokens: int | None = None, marks: dict | None = None) -> list:
    """[[text [rows, tokens, width], extras]] as a text encoder node of the family would give it."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, tokens or family.text[0], family.text[1], generator=generator)
    extras = dict(marks or {})
    if family.pooled:
        extras["pooled_output"] = torch.randn(rows, family.pooled, generator=generator)
    if name in ("ltxv", "mochi"):
        extras["attention_mask"] = torch.ones(rows, text.shape[1], dtype=torch.long)
    if name == "svd":
        extras["concat_latent_image"] = torch.randn(1, 4, *SIZE, generator=generator)
    return [[text, extras]]


def latent(name: str, rows: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    family = FAMILIES[name]
    return torch.zeros(rows, family.channels, *([family.frames] if family.frames else []), *size)


def sample(
    patcher,
    positive,
    negative,
    start,
    steps=3,
    cfg=3.0,
    sampler="euler",
    scheduler="normal",
    seed=0,
    denoise=1.0,
    **more,
):
    """KSampler's own path; the noise of row i does not depend on how many rows there are."""
    noise = comfy.sample.prepare_noise(start, seed, list(range(len(start))))
    return comfy.sample.sample(
        patcher,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        start,
        denoise=denoise,
        disable_pbar=True,
        seed=seed,
        **more,
    )
