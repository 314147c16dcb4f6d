"""A StoryGen story, panel after panel: each reads the newest pictures before it, and is stored as soon as it is done.

Pictures that become references are decoded and encoded anew, in the pixel range the weights were trained with, as the
authors do; only the newest few are held, so memory does not grow with the story.
"""

from collections import deque
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..sampling.story_gen import ALONE, AUTO, MULTI
from . import override
from .digest import Digest, feed_model, fingerprint
from .panel_store import PanelStore
from .reference_pass import Noise
from .story_gen import ReferenceRule, make_guider, sizing
from .story_gen_references import Picture, encode, grey
from .story_gen_weights import StoryGenWeights
from .story_sampling import previewer

FORMAT = "storyweft-storygen-1"


@dataclass(frozen=True)
class Settings:
    """Of every panel. window: how many previous pictures a panel reads."""

    seed: int
    steps: int
    text_scale: float
    image_scale: float
    strength: float
    sampler: str
    scheduler: str
    window: int
    pixel_range: tuple[float, float]


class StoryGenStory:
    """prompts: conditioning entries [tokens, extras] with their texts; portraits are read by every panel, as the oldest."""

    def __init__(
        self,
        node_id: str,
        model,
        vae,
        weights: StoryGenWeights,
        prompts: list[tuple[str, list]],
        negative: list,
        portraits: tuple[Picture, ...],
        latent: Tensor,
        settings: Settings,
        store: PanelStore | None,
    ):
        self.node_id, self.model, self.vae, self.weights = node_id, model, vae, weights
        self.prompts, self.negative, self.settings, self.store = prompts, negative, settings, store
        self.latent = latent
        self.portraits = portraits
        self.previous: deque[Picture] = deque(maxlen=settings.window)
        self.encoded: dict[Picture, object] = {}
        self.blank = None
        self.digest = self._common()

    def _common(self) -> str:
        """What decides every panel but its own prompt, noise and references."""
        digest, network = Digest(), self.model.model.diffusion_model
        digest.feed([FORMAT, fingerprint(self.model), vars(self.settings), self.latent, self.negative])
        digest.feed([self.weights.sites.modules(network), self.weights.sites.twice])
        feed_model(digest, self.model)
        for name, weight in sorted(self.vae.first_stage_model.state_dict().items()):
            digest.feed(name)
            digest.feed_weight(weight)
        if self.store is not None:
            self.store.key(digest)  # notes what cannot be told apart
        return digest.text

    def draw(self) -> tuple[Tensor, str]:
        """Latents [panels, C, h, w] and a report."""
        total = len(self.prompts) * self.settings.steps
        progress, done, lines = comfy.utils.ProgressBar(total), [], []
        for panel in range(len(self.prompts)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            shown = (*self.portraits, *self.previous)
            key = self._key(panel, shown)
            if self.store is not None and self.store.has(key):
                latent = self.store.get(key)
                lines.append(f"panel {panel + 1}: kept from an earlier run")
            else:
                latent, line = self._panel(panel, shown, progress)
                lines.append(f"panel {panel + 1}: {line}")
                if key is not None:
                    self.store.put(key, latent)
            done.append(latent)
            if self.settings.window and panel + 1 < len(self.prompts):
                self._remember(panel, latent)
            progress.update_absolute((panel + 1) * self.settings.steps, total)
        if self.store is not None and self.store.unknown:
            lines.append(f"not kept for later runs: {', '.join(sorted(self.store.unknown))} cannot be told apart")
        return torch.cat(done), "\n".join(lines)

    def _key(self, panel: int, shown: tuple[Picture, ...]) -> str | None:
        if self.store is None:
            return None
        digest = Digest()
        digest.feed([self.digest, panel, self.prompts[panel][1]])
        digest.feed([(picture.pixels, picture.caption) for picture in shown])
        return self.store.key(digest)

    def _remember(self, panel: int, latent: Tensor) -> None:
        pixels = self.vae.decode(latent).clamp(0, 1)
        text, caption = self.prompts[panel]
        self.previous.append(Picture(pixels, text, caption, self.vae))

    def _references(self, shown: tuple[Picture, ...]) -> tuple:
        """Encoded pictures; those no panel will read any more are dropped."""
        new = [picture for picture in shown if picture not in self.encoded]
        known = self.encoded | dict(zip(new, encode(new, self.settings.pixel_range), strict=True))
        self.encoded = {picture: known[picture] for picture in shown}
        return tuple(self.encoded.values())

    def _panel(self, panel: int, shown: tuple[Picture, ...], progress) -> tuple[Tensor, str]:
        s, model, rule = self.settings, self.model, None
        stage = ALONE if not shown else AUTO if self.previous else MULTI
        line = "no reference"
        if shown:
            if self.blank is None:
                self.blank = grey(shown[-1], self.negative[0])
            references = self._references(shown)
            rule = ReferenceRule(self.weights.sites, references, self.blank, stage, Noise(s.seed), s.strength, self.node_id)
            model = override.register(model, rule)
            line = f"references: {len(references)}, {stage}; {sizing(self.model, rule)}"
        positive = [self.prompts[panel][1]]
        guider = make_guider(model, rule, positive, self.negative, s.text_scale, s.image_scale)
        preview = previewer(model)

        def callback(step, x0, x, steps):
            progress.update_absolute(panel * s.steps + step, progress.total, preview(x0))

        noise = comfy.sample.prepare_noise(self.latent, s.seed, [panel])
        schedule = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), s.scheduler, s.steps)
        out = guider.sample(
            noise,
            self.latent,
            comfy.samplers.sampler_object(s.sampler),
            schedule,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=s.seed,
        )
        return out.cpu(), line
