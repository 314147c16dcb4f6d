"""A picture model as the trainers of its extensions use it: frozen U-Net, text encoder and autoencoder of one checkpoint.

Everything is read by ComfyUI's own loader, so SD1.5, SD2 and SDXL checkpoints are trained on as they are sampled with.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import host_models, loop, package  # noqa: F401

import comfy.clip_vision  # isort: skip
import comfy.ldm.modules.diffusionmodules.openaimodel  # isort: skip
import comfy.model_base  # isort: skip
import comfy.sd  # isort: skip
from storyweft.host import demo  # isort: skip
from storyweft.host.image_adapter import blank_features, features  # isort: skip
from storyweft.host.motion import encoder_name  # isort: skip

PREDICTIONS = (comfy.model_base.ModelType.EPS, comfy.model_base.ModelType.V_PREDICTION)
TOKENS = 77  # of a prompt; what a caption has beyond them is left out


@dataclass
class PictureModel:
    """unet: float32, without gradients. alphas [1000]: cumulative product of 1 - beta. v: whether it predicts v, else noise."""

    name: str
    source: Path
    model: object
    clip: object
    vae: object

    def __post_init__(self):
        base = self.model.model
        kind, network = base.model_type, base.diffusion_model
        if kind not in PREDICTIONS or not isinstance(network, comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel):
            raise ValueError(
                f"{self.name} is a {type(base).__name__} ({kind.name}); give an SD1.5, SD2 or SDXL checkpoint"
            )
        if network.in_channels != base.latent_format.latent_channels:
            raise ValueError(
                f"{self.name} takes {network.in_channels} channels, pictures beside the noise; give a checkpoint for text alone"
            )
        self.unet = network.float().requires_grad_(False)
        self.v = kind == comfy.model_base.ModelType.V_PREDICTION
        self.alphas = (1 / (1 + base.model_sampling.sigmas.double() ** 2)).float()

    @functools.cached_property
    def hash(self) -> str:
        return loop.file_hash(self.source)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Contexts [n, 77, width] and pooled embeddings [n, P] of captions."""
        found = [self.clip.encode_from_tokens(self.clip.tokenize(caption), return_pooled=True) for caption in captions]
        contexts, pooled = zip(*found, strict=True)
        if long := sum(one.shape[1] > TOKENS for one in contexts):
            logging.warning(
                "%d captions are longer than a prompt of %d tokens; what is beyond is left out", long, TOKENS
            )
        return torch.cat([one[:, :TOKENS].float() for one in contexts]), torch.cat([one.float() for one in pooled])

    def told(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts and pooled embeddings, bfloat16, of no words and of each different caption; which is whose [n]."""
        known = {caption: row for row, caption in enumerate(["", *sorted(set(captions) - {""})])}
        contexts, pooled = self.text(list(known))
        return contexts.bfloat16(), pooled.bfloat16(), torch.tensor([known[caption] for caption in captions])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents, in the U-Net's scale, of pictures [n, 3, h, w] in 0..1."""
        return self.model.model.process_latent_in(self.vae.encode(pixels.movedim(1, -1))).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures uint8 [n, h, w, 3]."""
        pixels = self.vae.decode(self.model.model.process_latent_out(latents.float().cpu()))
        return (pixels * 255).clamp(0, 255).round().byte()

    def vector(self, pooled: Tensor, size: tuple[int, int]) -> Tensor | None:
        """What SDXL gets beside the text: pooled [n, P] and the picture's size in latent cells; None for all others."""
        if self.unet.num_classes is None:
            return None
        height, width = (8 * side for side in size)
        return self.model.model.encode_adm(pooled_output=pooled, height=height, width=width, device=pooled.device)

    def wanted(self, clean: Tensor, noise: Tensor, a: Tensor) -> Tensor:
        """What the U-Net is to predict."""
        return a.sqrt() * noise - (1 - a).sqrt() * clean if self.v else noise

    def weight(self, a: Tensor) -> Tensor:
        """Of the squared error at each time, so that an error of the clean picture counts min(SNR, 5) (arXiv 2303.09556)."""
        snr = a / (1 - a)
        return snr.clamp(max=5) / (snr + 1 if self.v else snr)

    def parts(self, x: Tensor, made: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Clean picture and noise by what the U-Net predicted for x."""
        if self.v:
            return a.sqrt() * x - (1 - a).sqrt() * made, a.sqrt() * made + (1 - a).sqrt() * x
        return (x - (1 - a).sqrt() * made) / a.sqrt(), made

    @torch.no_grad()
    def sampled(self, x: Tensor, steps: int, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Latents by DDIM from noise x; predict(x, t) is the guided prediction at timestep t (no dimensions)."""
        times = torch.linspace(999, 0, steps + 1).round().long()
        for now, after in zip(times[:-1], times[1:], strict=True):
            a, b = self.alphas[now], self.alphas[after] if after > 0 else torch.tensor(1.0)
            guess, noise = self.parts(x, predict(x, now), a)
            x = b.sqrt() * guess + (1 - b).sqrt() * noise
        return x

    def sheet(self, rows: list[Tensor]) -> Image.Image:
        """One row of pictures below the other, of latents [n, 4, h, w] each."""
        return Image.fromarray(np.concatenate([np.concatenate(list(self.decode(row).numpy()), 1) for row in rows]))


class PictureEncoder:
    """A CLIP vision model as the nodes use it; name: what predictor files call it, source: its file."""

    def __init__(self, model, source: Path):
        self.model, self.source, self.name, self.size = model, source, encoder_name(model), model.image_size

    @functools.cached_property
    def hash(self) -> str:
        return loop.file_hash(self.source)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, feature: str = "pooled") -> Tensor:
        """Pooled, projected embeddings [n, D] or hidden states [n, tokens, D] of pictures [n, 3, h, w] in 0..1."""
        return features(self.model, pictures.movedim(1, -1), feature).float().cpu()

    @torch.no_grad()
    def blank(self, seen: Tensor, feature: str = "pooled") -> Tensor:
        """What stands for no picture, [1, ...] like the features `seen`."""
        return blank_features(self.model, seen, feature, "IP-Adapter")


def add_arguments(parser) -> None:
    """The options that say which model is trained on."""
    parser.add_argument(
        "--weights", type=Path, default=Path("weights"), help="folder of the demo models and their SHA256SUMS"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="SD1.5, SD2 or SDXL checkpoint to train on in the demo models' place"
    )


def chosen(args, video: bool = False) -> PictureModel:
    """The checkpoint of --checkpoint, else the demo model, of clips if `video`. Raises ValueError for a file that is none."""
    if not args.checkpoint:
        name, load = ("video", demo.load_demo_video) if video else ("unet", demo.load_demo)
        return PictureModel("demo", args.weights / f"{name}.safetensors", *load(args.weights)[:3])
    if not args.checkpoint.is_file():
        raise ValueError(f"--checkpoint is {args.checkpoint} and there is no such file")
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(args.checkpoint))
    if clip is None or clip.cond_stage_model is None or vae is None:
        raise ValueError(f"{args.checkpoint} holds no text encoder or no VAE; give a whole checkpoint")
    return PictureModel(args.checkpoint.stem, args.checkpoint, model, clip, vae)


def chosen_encoder(path: Path | None, weights: Path) -> PictureEncoder:
    """The CLIP vision model of a file, else the demo's. Raises ValueError for a file that is none."""
    if path is None:
        return PictureEncoder(demo.load_clip_vision(weights), weights / "clip.safetensors")
    model = comfy.clip_vision.load(str(path)) if path.is_file() else None
    if model is None:
        raise ValueError(f"--encoder is {path} and there is no CLIP vision model")
    return PictureEncoder(model, path)
