"""Text encoders of several families with the real tokenizers and tiny random weights."""
from unittest import mock

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.lt
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.wan
import comfy.text_encoders.z_image
import torch
from comfy.supported_models_base import ClipTarget

CLIP_L = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
CLIP_G = {**CLIP_L, "projection_dim": 64}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}
QWEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _fill(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            value = torch.full_like(parameter, float("norm" in name and name.endswith("weight")))
        else:
            value = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data.copy_(value)


def _clip(encoder, tokenizer, options: dict) -> comfy.sd.CLIP:
    with torch.inference_mode(False):
        clip = comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options={**options, "dtype": torch.float32})
        _fill(clip.cond_stage_model, 1)
    return clip


def sd1(hidden_size: int = 64) -> comfy.sd.CLIP:
    options = {"clip_l_model_config": {**CLIP_L, "hidden_size": hidden_size}}
    return _clip(comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, options)


def sdxl() -> comfy.sd.CLIP:
    options = {"clip_l_model_config": CLIP_L, "clip_g_model_config": CLIP_G}
    return _clip(comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, options)


def ltxv() -> comfy.sd.CLIP:
    return _clip(comfy.text_encoders.lt.ltxv_te(), comfy.text_encoders.lt.LTXVT5Tokenizer, {"t5xxl_model_config": T5})


def flux() -> comfy.sd.CLIP:
    options = {"clip_l_model_config": CLIP_L, "t5xxl_model_config": T5}
    return _clip(comfy.text_encoders.flux.flux_clip(), comfy.text_encoders.flux.FluxTokenizer, options)


def qwen_image() -> comfy.sd.CLIP:
    """Without its picture tower, which has no small form."""
    module = comfy.text_encoders.qwen_image
    with mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", torch.nn.Identity):
        return _clip(module.te(), module.QwenImageTokenizer, {"qwen25_7b_model_config": QWEN})


def z_image() -> comfy.sd.CLIP:
    module = comfy.text_encoders.z_image
    return _clip(module.te(), module.ZImageTokenizer, {"qwen3_4b_model_config": QWEN})
