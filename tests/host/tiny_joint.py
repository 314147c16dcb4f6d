"""A tiny joint audio-video model with random weights behind the pack's own loader."""

import torch
from storyweft.host.joint_av import from_config
from storyweft.models.joint_unet import JointUNet

NETWORK = {
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "cross_attention_resolutions": [2],
    "windows": [2],
    "video_attention_resolutions": [2],
    "head_channels": 16,
}
CONFIG = {**NETWORK, "frames": 4, "height": 8, "width": 8, "samples": 80, "sample_rate": 200, "fps": 10.0}


def tiny_weights(**changed) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    network = JointUNet(**(NETWORK | changed))
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def tiny_joint(config=None, **changed):
    """ModelPatcher of 32 channels, 4 frames of 8 x 8 pixels and 80 samples."""
    with torch.inference_mode(False):
        return from_config(tiny_weights(**changed), {**CONFIG, **changed, **(config or {})})
