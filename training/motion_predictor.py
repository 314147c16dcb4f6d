"""Trains a Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434): clips -> CLIP embeddings of their frames.

`python -m training.motion_predictor --videos DIR --encoder CLIP_VISION_FILE` on a folder of videos; without --videos on
the picture-book world with the demo encoder. Two stages, by --stage:
  embeddings  the predictor alone: mean squared error against the embeddings of the true frames. Needs no video model.
  video       the paper's: error of the frozen demo video model's prediction, whose cross-attention reads the predicted
              embeddings through an image adapter, which is trained along. `--start FILE` takes the predictor of stage one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models.ip_adapter import ImageAdapter
from models.ip_adapter import build as build_adapter
from models.motion_predictor import MotionPredictor, build, interpolate, metadata_of

from . import loop
from .adapter import Adapted
from .clip import MEAN, STD
from .clips import demo_clips, folder_clips
from .facts import load_autoencoder
from .unet import ALPHAS, Text
from .video import new_video, shared

import comfy.clip_vision  # isort: skip

DEMO = {"dim": 96, "hidden": 48, "heads": 3, "dim_head": 16, "layers": 2}
FULL = {"hidden": 1024, "heads": 12, "dim_head": 64, "layers": 8}  # the paper's sizes
HELD_OUT = 0.1  # share of the clips that only measure
BESIDE = ("image_proj.", "ip_adapter.")  # an adapter trained with it


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    return {key: value.float() for key, value in load_file(path).items()}, metadata


class Encoder:
    """A CLIP vision model as the pack's node uses it: pooled, projected, as it is."""

    def __init__(self, path: str | None, weights: Path):
        if path:
            model = comfy.clip_vision.load(path)
            self.size, self.name = model.image_size, self._name(model.config)
            self.encode = lambda frames: model.encode_image(frames.movedim(1, -1) / 255)["image_embeds"].float().cpu()
        else:
            vision = Text(f"{weights}/clip.safetensors").encoders.vision
            config = json.loads(read(weights / "clip.safetensors")[1]["vision"])
            self.size, self.name = config["image_size"], self._name(config)
            self.encode = lambda frames: vision(pixel_values=(frames / 255 - MEAN) / STD, intermediate_output=-2)[2]

    @staticmethod
    def _name(config: dict) -> str:
        return f"clip-{config['hidden_size']}x{config['num_hidden_layers']}-{config['projection_dim']}"

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Clips uint8 [n, L, 3, S, S] to embeddings [n, L, D]."""
        return torch.stack([self.encode(clip.float()) for clip in clips])


def middle_error(predictor: MotionPredictor | None, found: Tensor, pinned: bool) -> float:
    """Mean squared error on the frames between the ends of clips [n, L, D]; None: of the plain interpolation."""
    u = torch.linspace(0, 1, found.shape[1])
    keys = interpolate(found[:, 0], found[:, -1], u)
    with torch.no_grad():
        guess = keys if predictor is None else predictor(*(x.to(predictor.in_proj.weight) for x in (keys, u)), pinned)
    return (guess.to(found) - found)[:, 1:-1].square().mean().item()


class Embeddings(loop.Task):
    """Stage one. Examples are clips; each step looks at a random part of a clip, so that any length is learnt."""

    def __init__(self, predictor: MotionPredictor, found: Tensor, encoder: str, pinned: bool, name: str):
        self.name, self.model, self.predictor, self.pinned = name, predictor, predictor, pinned
        count = max(1, round(len(found) * HELD_OUT))
        self.found, self.held, self.examples = found[:-count], found[-count:], len(found) - count
        self.metadata = metadata_of(predictor, encoder, pinned)
        self.config = {key: self.metadata[key] for key in ("dim", "hidden", "heads", "dim_head", "layers")}

    def loss(self, network, index, generator):
        frames = self.found.shape[1]
        length = int(torch.randint(3, frames + 1, (1,), generator=generator))
        start = int(torch.randint(frames - length + 1, (1,), generator=generator))
        part = self.found[index, start : start + length]
        if torch.rand(1, generator=generator) < 0.5:
            part = part.flip(1)  # a film that runs backwards
        part = part.to(next(self.model.parameters()).device)
        u = torch.linspace(0, 1, length, device=part.device)
        return (network(interpolate(part[:, 0], part[:, -1], u), u, self.pinned) - part).square().mean()

    def check(self):
        plain = middle_error(None, self.held, self.pinned)
        return [
            f"{self.examples} clips of {self.found.shape[1]} frames, {len(self.held)} more held out, embeddings {self.found.shape[2]} wide",
            f"error of the plain interpolation on held-out middle frames {plain:.5f}, variance of embeddings {self.held.var():.5f}",
        ]

    def tensors(self):
        ratio = middle_error(self.predictor, self.held, self.pinned) / middle_error(None, self.held, self.pinned)
        self.metadata["middle_error_over_interpolation"] = f"{ratio:.4f}"
        print(f"held-out middle frames: error {ratio:.3f} of the interpolation's", flush=True)
        return super().tensors()


class Filmed(nn.Module):
    """The frozen video model reading predicted embeddings through an adapter; predictor and adapter are trained."""

    def __init__(self, predictor: MotionPredictor, adapter: ImageAdapter, unet, pinned: bool):
        super().__init__()
        self.predictor, self.adapter, self.unet, self.pinned = predictor, adapter, unet.requires_grad_(False), pinned
        self.adapted = Adapted(self.unet, self.adapter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, ends: Tensor, shown: Tensor) -> Tensor:
        """v of clips x [n * L, ...] between the embeddings ends [n, 2, D]; where shown [n] is false no picture is seen."""
        frames = len(x) // len(ends)
        u = torch.linspace(0, 1, frames, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            found = self.predictor(interpolate(ends[:, 0], ends[:, 1], u), u, self.pinned)
        tokens = self.adapter.image_proj((found * shown[:, None, None]).flatten(0, 1))
        return self.adapted(x, t, context, tokens, num_video_frames=frames)


class Film(Embeddings):
    """Stage two. latents [n, L, 4, h, w] of the clips, texts [n, 77, width] and that of no words."""

    def __init__(
        self, model: Filmed, found, latents: Tensor, contexts: Tensor, empty: Tensor, decode, encoder, pinned, name
    ):
        super().__init__(model.predictor, found, encoder, pinned, name)
        self.model, self.latents, self.contexts, self.empty, self.decode = model, latents, contexts, empty, decode
        held = slice(self.examples, None)
        self.held_latents = (latents[held], found[held], contexts[held])

    def loss(self, network, index, generator):
        device = next(self.model.parameters()).device
        clean, ends = self.latents[index].float(), self.found[index][:, [0, -1]]
        count, frames = clean.shape[:2]
        back = torch.rand(count, generator=generator) < 0.5
        clean[back], ends[back] = clean[back].flip(1), ends[back].flip(1)
        context, dropped = self.contexts[index].float(), torch.rand(count, generator=generator)
        context[dropped < 0.1] = self.empty  # text 5 %, pictures 5 %, both 5 %
        shown = ((dropped < 0.05) | (dropped >= 0.15)).float()
        t = 1000 * (torch.arange(count) + torch.rand(count, generator=generator)) / count
        t = t.long().repeat_interleave(frames)
        a = ALPHAS[t].view(-1, 1, 1, 1)
        clean = clean.flatten(0, 1)
        noise = shared(torch.randn(clean.shape, generator=generator), frames)
        x = a.sqrt() * clean + (1 - a).sqrt() * noise
        context = context.repeat_interleave(frames, 0)
        v = network(*(y.to(device) for y in (x, t, context, ends, shown))).float()
        return (v - (a.sqrt() * noise - (1 - a).sqrt() * clean).to(device)).square().mean()

    def tensors(self):
        super().tensors()  # measures the predictor
        return self.model.predictor.state_dict() | self.model.adapter.state_dict()

    def show(self, model) -> Image.Image:
        """Held-out clips as drawn by the generator, and under each what the model makes of its ends (DDIM, CFG 4)."""
        rows, count = [], min(3, len(self.held_latents))
        for clean, found, context in zip(*(part[:count] for part in self.held_latents), strict=True):
            x = draw(model, found[None], context[None], self.empty[None], len(clean))
            for latents in (clean.float(), x):
                pictures = ((self.decode(latents) + 1) * 127.5).clamp(0, 255).byte()
                rows.append(np.concatenate(list(pictures.permute(0, 2, 3, 1).numpy()), 1))
        return Image.fromarray(np.concatenate(rows))


@torch.no_grad()
def draw(
    model: Filmed, found: Tensor, context: Tensor, empty: Tensor, frames: int, seed=0, steps=12, cfg=4.0
) -> Tensor:
    """Latents [frames, 4, 16, 16] of one clip between the embeddings found [1, L, D]; the negative sees no picture."""
    device = found.device
    x = shared(torch.randn(frames, 4, 16, 16, generator=torch.Generator().manual_seed(seed)), frames).to(device)
    contexts = torch.cat([context, empty]).float().repeat_interleave(frames, 0)
    ends, shown = found[:, [0, -1]].repeat(2, 1, 1), torch.tensor([1.0, 0.0], device=device)
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, after in zip(times[:-1], times[1:], strict=True):
        a, b = ALPHAS[now], ALPHAS[after] if after > 0 else torch.tensor(1.0)
        cond, uncond = model(x.repeat(2, 1, 1, 1), now.repeat(2 * frames), contexts, ends, shown).float().chunk(2)
        v = uncond + cfg * (cond - uncond)
        clean, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        x = b.sqrt() * clean + (1 - b).sqrt() * noise
    return x


def video_model(weights: Path):
    """The demo video model with the layers that its file keeps."""
    unet = new_video(read(weights / "unet.safetensors")[0])
    temporal = read(weights / "video.safetensors")[0]
    left_out = unet.load_state_dict(temporal, strict=False)
    if left_out.unexpected_keys:
        raise ValueError(f"{weights}/video.safetensors does not fit: {left_out.unexpected_keys[:3]}")
    return unet


def load_predictor(path: str | None, dim: int, sizes: dict, seed: int) -> tuple[MotionPredictor, dict]:
    """A predictor of a file with the adapter tensors beside it, or a new one that starts at the interpolation."""
    if path is None:
        torch.manual_seed(seed)
        return MotionPredictor(**{"dim": dim} | sizes).reset(), {}
    tensors, metadata = read(path)
    beside = {key: value for key, value in tensors.items() if key.startswith(BESIDE)}
    own = {key: value for key, value in tensors.items() if key not in beside}
    return build(own, metadata, path).requires_grad_(True), beside


def data(args, encoder: Encoder) -> tuple[Tensor, Tensor | None, list[str]]:
    """Embeddings [n, L, D], scaled latents [n, L, 4, h, w] for the second stage, captions; kept in the folder."""
    name = f"{args.stage}_{encoder.name}_{args.seed}_{args.clips}_{args.frames}"
    path = Path(args.folder) / f"motion_data_{Path(args.videos).name if args.videos else 'demo'}_{name}.pt"
    if path.exists():
        found, latents, captions = torch.load(path, weights_only=True)
        return found, latents if len(latents) else None, captions
    network, factor = load_autoencoder(f"{args.weights}/autoencoder.safetensors")
    found, latents, captions = [], [], []
    if args.videos:
        clips, captions, left_out = folder_clips(Path(args.videos), args.frames, encoder.size, args.fps)
        print("\n".join(["left out:", *left_out]) if left_out else f"{len(clips)} clips", flush=True)
        parts = clips.split(50)
    else:
        parts = (demo_clips(args.seed, start, min(50, args.clips - start)) for start in range(0, args.clips, 50))
    for part in parts:
        if not args.videos:
            part, told = part
            captions += told
        found.append(encoder(part))
        if args.stage == "video":
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latents += [network.encode(clip.float() / 127.5 - 1).float() * factor for clip in part]
    found = torch.cat(found)
    latents = torch.stack(latents).bfloat16() if latents else torch.zeros(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((found, latents, captions), path)
    return found, latents if len(latents) else None, captions


def film_task(args, predictor, beside: dict, found, latents, captions, encoder: Encoder, pinned: bool) -> Film:
    """Stage two on the demo video model; the adapter begins as the demo adapter unless the file brings one."""
    adapter = build_adapter(beside or read(args.weights / "adapter.safetensors")[0], "adapter").requires_grad_(True)
    text = Text(f"{args.weights}/clip.safetensors")
    network, factor = load_autoencoder(f"{args.weights}/autoencoder.safetensors")
    known = sorted(set(captions))
    told = dict(zip(known, torch.cat([text(known[i : i + 100]) for i in range(0, len(known), 100)]), strict=True))
    contexts = torch.stack([told[caption] for caption in captions])
    model = Filmed(predictor, adapter, video_model(args.weights), pinned)

    def decode(x: Tensor) -> Tensor:
        return network.decode(x.cpu() / factor)

    task = Film(model, found, latents, contexts, text([""])[0], decode, encoder.name, pinned, args.name)
    task.metadata["video_model"] = loop.file_hash(args.weights / "video.safetensors")
    task.metadata["base_model"] = loop.file_hash(args.weights / "unet.safetensors")
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("embeddings", "video"), default="embeddings")
    parser.add_argument("--videos", help="folder of videos; film.txt beside film.mp4 is its caption")
    parser.add_argument(
        "--encoder", help="CLIP vision model file (ViT-H for SVD and most adapters); default: the demo encoder"
    )
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the demo models")
    parser.add_argument("--start", help="predictor file to begin from")
    parser.add_argument("--adapter-only", action="store_true", help="stage two leaves the predictor as it is")
    parser.add_argument(
        "--free", action="store_true", help="let the predictor change the given pictures' embeddings too"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip; the paper: 16")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second taken from videos")
    parser.add_argument("--clips", type=int, default=1000, help="clips of the picture-book world")
    parser.add_argument("--name", default="motion", help="stem of the files")
    loop.add_arguments(parser, batch=32, rate=1e-3, minutes=5, precision="no", clip=1.0, average=0.99)
    args = parser.parse_args()
    if args.stage == "video" and (args.videos or args.encoder):
        parser.error("--stage video trains through the demo video model: leave --videos and --encoder out")
    if args.frames < 3:
        parser.error(f"--frames is {args.frames}; a clip needs a frame between its ends")
    encoder = Encoder(args.encoder, args.weights)
    found, latents, captions = data(args, encoder)
    sizes = FULL if args.encoder else {key: value for key, value in DEMO.items() if key != "dim"}
    predictor, beside = load_predictor(args.start, found.shape[2], sizes, args.seed)
    predictor.requires_grad_(not (args.adapter_only and args.stage == "video"))
    pinned = not args.free
    if args.stage == "video":
        task = film_task(args, predictor, beside, found, latents, captions, encoder, pinned)
    else:
        task = Embeddings(predictor, found, encoder.name, pinned, args.name)
    loop.Loop(task, args).run()


if __name__ == "__main__":
    main()
