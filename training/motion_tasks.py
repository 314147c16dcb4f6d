"""What the motion trainer trains: the predictor on embeddings alone, or through a frozen video model (StoryDiffusion)."""

import torch
from PIL import Image
from torch import Tensor, nn

from . import loop
from .adapted import Adapted
from .clips import shared
from .picture_model import PictureModel

import comfy.model_base  # isort: skip
from storyweft.host.image_adapter import channels  # isort: skip
from storyweft.host.unet import UNetFamily  # isort: skip
from storyweft.models.ip_adapter import ImageAdapter  # isort: skip
from storyweft.models.motion_predictor import MotionPredictor, interpolate, metadata_of  # isort: skip

HELD_OUT = 0.1  # share of the clips that only measure
LEVELS = 0.7, 1.6  # mean and spread of log sigma; SVD's noise in training is log-normal (arXiv 2311.15127)
BUCKET = 127  # SVD's amount of motion, as its node has it


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


class VideoModel(PictureModel):
    """SVD: cross-attention over one embedding a frame, and the first picture's latents beside the noise.

    It predicts v at timestep log(sigma) / 4; alphas are those of the 1000 noise levels that ComfyUI gives it.
    """

    def __post_init__(self):
        base = self.model.model
        if type(base) is not comfy.model_base.SVD_img2vid:
            raise ValueError(
                f"{self.name} is a {type(base).__name__}; give an SVD checkpoint, ComfyUI's one video model that reads an embedding "
                "for each frame"
            )
        self.unet, self.v = base.diffusion_model.float().requires_grad_(False), True
        self.alphas = (1 / (1 + base.model_sampling.sigmas.double() ** 2)).float()
        self.width = channels(UNetFamily(self.unet))[1]

    def beside(self, clean: Tensor, frames: int) -> Tensor:
        """The first frames of clips clean [n, L, 4, h, w] for each of their frames, in the VAE's scale as core's node has it."""
        return self.model.model.process_latent_out(clean[:, 0]).repeat_interleave(frames, 0)

    def motion(self, fps: float) -> Tensor:
        """What SVD is told of frames a second and amount of motion, [1, 768]."""
        return self.model.model.encode_adm(fps=fps, motion_bucket_id=BUCKET, augmentation_level=0.0)


class Filmed(nn.Module):
    """The frozen video model reading predicted embeddings, through an adapter if there is one, else as its own context."""

    def __init__(self, predictor: MotionPredictor, adapter: ImageAdapter | None, unet, pinned: bool):
        super().__init__()
        self.predictor, self.adapter, self.unet, self.pinned = predictor, adapter, unet.requires_grad_(False), pinned
        self.adapted = adapter and Adapted(self.unet, self.adapter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None, ends: Tensor, shown: Tensor, **more) -> Tensor:
        """What is predicted for clips x [n * L, ...] between the embeddings ends [n, 2, D]; where shown [n] is false no
        picture is seen. context: of the text, for a model with an adapter."""
        frames = len(x) // len(ends)
        u = torch.linspace(0, 1, frames, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            found = self.predictor(interpolate(ends[:, 0], ends[:, 1], u), u, self.pinned)
        found = (found * shown[:, None, None]).flatten(0, 1)
        if self.adapter is None:
            return self.unet(x, t, found[:, None], num_video_frames=frames, **more)
        return self.adapted(x, t, context, self.adapter.image_proj(found), num_video_frames=frames, **more)


class Film(Embeddings):
    """Stage two on the demo video model. latents [n, L, 4, h, w] of the clips; texts of which the first is that of no words,
    and rows [n] that say which is whose."""

    def __init__(self, model: Filmed, base: PictureModel, found, latents: Tensor, encoder: str, pinned: bool, name: str):
        super().__init__(model.predictor, found, encoder, pinned, name)
        self.model, self.base, self.latents, self.given = model, base, latents, found
        self.share = getattr(base.model.model.model_sampling, "share", 0.0)  # of the noise of two frames

    def told(self, captions: list[str]) -> "Film":
        self.texts, _, self.rows = self.base.told(captions)
        return self

    def condition(self, index: Tensor, clean: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, dict]:
        """Rows of the texts [n], whether pictures are seen [n], and what else the network gets. None: nothing is left out."""
        rows = self.rows[index]
        dropped = torch.ones(len(index)) if generator is None else torch.rand(len(index), generator=generator)
        rows[dropped < 0.1] = 0  # text 5 %, pictures 5 %, both 5 %
        return rows, ((dropped < 0.05) | (dropped >= 0.15)).float(), {}

    def levels(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps and alphas [count]."""
        t = (1000 * (torch.arange(count) + torch.rand(count, generator=generator)) / count).long()
        return t, self.base.alphas[t]

    def timestep(self, level: Tensor) -> Tensor:
        """What the network is told of one of the schedule's 1000 noise levels."""
        return level

    def noise(self, shape, frames: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return shared(noise, frames, self.share) if self.share else noise

    def predicted(self, network, x, t, rows, ends, shown, more: dict) -> Tensor:
        """On the CPU, for frames x at times t [n] of their clips."""
        device, frames = next(self.model.parameters()).device, len(x) // len(ends)
        context = None if rows is None else self.texts[rows].float().repeat_interleave(frames, 0).to(device)
        more = {name: value.to(device) for name, value in more.items()}
        x, t, ends, shown = (one.to(device) for one in (x, t.repeat_interleave(frames), ends, shown))
        return network(x, t, context, ends, shown, **more).float().cpu()

    def loss(self, network, index, generator):
        clean, ends = self.latents[index].float(), self.given[index][:, [0, -1]]
        count, frames = clean.shape[:2]
        back = torch.rand(count, generator=generator) < 0.5
        clean[back], ends[back] = clean[back].flip(1), ends[back].flip(1)
        rows, shown, more = self.condition(index, clean, generator)
        t, a = self.levels(count, generator)
        a = a.repeat_interleave(frames).view(-1, 1, 1, 1)
        clean = clean.flatten(0, 1)
        noise = self.noise(clean.shape, frames, generator)
        made = self.predicted(network, a.sqrt() * clean + (1 - a).sqrt() * noise, t, rows, ends, shown, more)
        return (made - self.base.wanted(clean, noise, a)).square().mean()

    def tensors(self):
        super().tensors()  # measures the predictor
        adapter = self.model.adapter
        return self.model.predictor.state_dict() | ({} if adapter is None else adapter.state_dict())

    def show(self, model) -> Image.Image:
        """Held-out clips as they are, and under each what the model makes of its ends."""
        rows = []
        for clip in range(self.examples, min(self.examples + 3, len(self.latents))):
            rows += [self.latents[clip].float(), self.drawn(model, torch.tensor([clip]))]
        return self.base.sheet(rows)

    def drawn(self, model, index: Tensor, seed=0, steps=12, cfg=4.0) -> Tensor:
        """DDIM samples [L, 4, h, w] of one clip; the negative has no words and sees no picture."""
        clean, ends = self.latents[index].float(), self.given[index][:, [0, -1]].repeat(2, 1, 1)
        rows, _, more = self.condition(index, clean, None)
        rows = None if rows is None else torch.cat([rows, torch.zeros_like(rows)])
        more = {name: torch.cat([value, self.hidden(name, value)]) for name, value in more.items()}
        shown = torch.tensor([1.0, 0.0])

        def predict(x: Tensor, now: Tensor) -> Tensor:
            t = self.timestep(now).repeat(2)
            cond, uncond = self.predicted(model, x.repeat(2, 1, 1, 1), t, rows, ends, shown, more).chunk(2)
            return uncond + cfg * (cond - uncond)

        start = self.noise(clean[0].shape, clean.shape[1], torch.Generator().manual_seed(seed))
        return self.base.sampled(start, steps, predict)

    @staticmethod
    def hidden(name: str, value: Tensor) -> Tensor:
        """The same argument in the negative."""
        return value


class ImageToFilm(Film):
    """Stage two on SVD: the predictor alone is trained, for there is no adapter; the negative is zeros, so nothing is dropped."""

    def __init__(self, *args, fps: float):
        super().__init__(*args)
        self.motion = self.base.motion(fps)

    def condition(self, index, clean, generator):
        frames = clean.shape[1]
        more = {"beside": self.base.beside(clean, frames), "y": self.motion.expand(len(index) * frames, -1)}
        return None, torch.ones(len(index)), more

    def levels(self, count, generator):
        sigma = (LEVELS[0] + LEVELS[1] * torch.randn(count, generator=generator)).exp()
        return sigma.log() / 4, 1 / (1 + sigma.square())

    def timestep(self, level):
        return self.base.model.model.model_sampling.sigmas[level].log() / 4

    def predicted(self, network, x, t, rows, ends, shown, more):
        more = dict(more)
        return super().predicted(network, torch.cat([x, more.pop("beside")], 1), t, rows, ends, shown, more)

    @staticmethod
    def hidden(name, value):
        return torch.zeros_like(value) if name == "beside" else value
