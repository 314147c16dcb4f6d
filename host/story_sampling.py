"""Draws the panels of a story in passes: id panels of each character first, then every other panel against them.

Three ways to remember a character, equal in result: "bank" keeps its sampled tokens in RAM, "recompute" draws its id
panels along with each later pass, "together" draws the whole story as one batch. A finished panel is stored at once
and taken from there when the same panel is asked for again; then its character's bank is made only if something reads it.
"""

import logging
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from . import bank, override
from .consistent import ConsistentRule
from .digest import Digest, feed_model, fingerprint
from .panel_store import FORMAT, PanelStore

MODES = ("auto", "bank", "recompute", "together")


@dataclass(frozen=True)
class Settings:
    """What a KSampler is told, and how panels are grouped. `panel_seeds` maps a panel to a noise seed of its own."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float
    memory: str = "auto"
    panels_at_once: int = 1
    panel_seeds: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Pass:
    """One sampling run over `panels`, of which only `kept` are results; `writes` names the character it defines."""

    panels: tuple[int, ...]
    kept: tuple[int, ...]
    writes: str | None = None


def rows_of(conditioning: list, rows: list[int], count: int) -> list:
    """A CONDITIONING with only some of its `count` panel rows; whatever has no row per panel stays as it is."""
    out = []
    for tensor, marks in conditioning:
        part = {
            key: value[rows] if torch.is_tensor(value) and len(value) == count else value
            for key, value in marks.items()
        }
        if "storyweft_panels" in marks:
            part["storyweft_panels"] = tuple(marks["storyweft_panels"][row] for row in rows)
        if "control" in marks:
            part["control"] = _control_rows(marks["control"], rows, count)
        out.append([tensor[rows] if len(tensor) == count else tensor, part])
    return out


def _control_rows(control, rows: list[int], count: int):
    control = control.copy()
    if control.cond_hint_original is not None and len(control.cond_hint_original) == count:
        control.cond_hint_original = control.cond_hint_original[rows]
    if control.previous_controlnet is not None:
        control.previous_controlnet = _control_rows(control.previous_controlnet, rows, count)
    return control


def plan(story, panels: tuple[int, ...], known: set[str], memory: str, at_once: int) -> list[Pass]:
    """Passes that draw `panels`; characters in `known` have a bank already. A character without one is written first."""
    if memory == "together":
        return [Pass(panels, panels)]
    ids = {
        name: tuple(i for i in story.id_panels.get(name, ()) if i in panels)
        for name in _names(story)
        if name not in known
    }
    passes = [Pass(own, own, name) for name, own in ids.items() if own]
    written = {panel for part in passes for panel in part.panels}
    rest = [panel for panel in panels if panel not in written]
    for start in range(0, len(rest), at_once):
        group = tuple(rest[start : start + at_once])
        shown = {name for panel in group for name in story.panels[panel].characters}
        along = tuple(sorted(i for name in shown for i in ids.get(name, ()))) if memory == "recompute" else ()
        passes.append(Pass((*along, *group), group))
    return passes


def _names(story) -> tuple[str, ...]:
    return tuple(character.name for character in story.characters)


def rule_of(model, node_id: str) -> ConsistentRule:
    """The Consistent Self-Attention rule of a MODEL. Raises ValueError when there is none."""
    for rule in override.rules_of(model):
        if isinstance(rule, ConsistentRule):
            return rule
    raise ValueError(
        f"{node_id}: model carries no StoryweftConsistentSelfAttention; connect the model through that node first."
    )


class StorySampler:
    """Draws a story with one MODEL; `positive` is one conditioning with a row per panel, marked by its panel numbers.

    `wanted`: somebody reads the characters, so that their banks are made even when every panel is stored.
    """

    def __init__(
        self,
        node_id: str,
        model,
        positive,
        negative,
        latent: dict,
        settings: Settings,
        store: PanelStore | None,
        wanted: bool = False,
    ):
        marks = positive[0][1] if positive else {}
        if "storyweft_panels" not in marks:
            raise ValueError(
                f"{node_id}: positive is not from StoryweftPanelConditioning, so its panels are unknown; use that node."
            )
        self.node_id, self.model, self.settings, self.store, self.wanted = node_id, model, settings, store, wanted
        self.rule = rule_of(model, node_id)
        self.whole = next((rule.node_id for rule in override.rules_of(model) if rule.whole_batch), None)
        self.story, self.panels = marks["storyweft_story"], marks["storyweft_panels"]
        self.positive, self.negative = positive, negative
        self.latent = self._latent(latent)
        mask = latent.get("noise_mask")
        self.mask = mask if mask is None or mask.ndim > 2 else mask[None]
        self._check_rows()
        self.characters = dict(self.rule.characters)
        self.fingerprint = fingerprint(model)
        self._keys: dict[int, str | None] = {}
        self._check_cast()
        unknown = [panel for panel in dict(settings.panel_seeds) if panel not in self.panels]
        if unknown:
            raise ValueError(
                f"{node_id}: panel_seeds names panel {unknown[0] + 1}, and the conditioning has no such panel."
            )

    def _check_rows(self) -> None:
        """Core would repeat or cut what has another number of rows, without a word."""
        rows = {f"{name} holds {len(tensor)} prompts": len(tensor) for name in ("positive", "negative") for tensor, _ in vars(self)[name]}
        if self.mask is not None:
            rows[f"latent_image holds {len(self.mask)} masks"] = len(self.mask)
        for what, count in rows.items():
            if count not in (1, len(self.panels)):
                raise ValueError(
                    f"{self.node_id}: {what} and the story part {len(self.panels)} panels; give one, or one for each panel."
                )

    def _check_cast(self) -> None:
        named = {name for panel in self.panels for name in self.story.panels[panel].characters}
        spare = sorted(set(self.rule.characters) - named)
        if spare:
            raise ValueError(
                f"{self.node_id}: the recalled character '{spare[0]}' is named by no panel; the panels name "
                f"{', '.join(sorted(named)) or 'nobody'}."
            )
        unknown = sorted(name for name in named - set(self.rule.characters) if not self.story.id_panels.get(name))
        if unknown:
            raise ValueError(
                f"{self.node_id}: character '{unknown[0]}' has no id panels and was not recalled, so nothing holds its "
                "looks; set id_panels in StoryweftScript or add StoryweftRecallCharacter."
            )

    def _latent(self, latent: dict) -> Tensor:
        samples = comfy.sample.fix_empty_latent_channels(
            self.model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        )
        if len(samples) not in (1, len(self.panels)):
            raise ValueError(
                f"{self.node_id}: latent_image holds {len(samples)} latents and the conditioning {len(self.panels)} panels; "
                "give one latent, or one for each panel."
            )
        return samples.expand(len(self.panels), *samples.shape[1:])

    def bank_bytes(self) -> int:
        """Expected size of the banks of all characters that this story defines."""
        panels = sum(len(ids) for name, ids in self.story.id_panels.items() if name not in self.characters)
        parts = 1 if self.settings.cfg == 1 else 2
        return panels * parts * bank.bytes_per_panel(self.rule, self.model, self.latent.shape, self.settings.steps)

    def memory(self) -> tuple[str, str]:
        """The mode to use and a sentence that says why, with the estimate."""
        needed = self.bank_bytes()
        free = comfy.model_management.get_free_memory(torch.device("cpu"))
        mode = self.settings.memory
        if self.wanted and mode in ("recompute", "together"):
            raise ValueError(
                f"{self.node_id}: memory is '{mode}', which keeps no character, and the output character is connected; set "
                "memory to bank, or disconnect the output."
            )
        if self.whole is not None and mode not in ("auto", "together"):
            raise ValueError(
                f"{self.node_id}: memory is {mode}, which draws a story in parts, and {self.whole} needs all panels in one batch; "
                "set memory to together."
            )
        if self.whole is not None and self.wanted:
            raise ValueError(
                f"{self.node_id}: the output character is connected and {self.whole} needs all panels in one batch, which "
                "keeps no character; disconnect the output or remove that block."
            )
        if self.whole is not None:
            return "together", f"{self.whole} needs all panels in one batch: memory together"
        if mode == "auto":
            mode = "bank" if self.wanted or needed < free / 2 else "recompute"
        if mode == "bank" and needed > free:
            instead = "disconnect the output character" if self.wanted else "set memory to recompute"
            raise ValueError(
                f"{self.node_id}: the bank would need about {needed / 2**20:.0f} MiB of RAM and {free / 2**20:.0f} MiB are free; "
                f"{instead}, or lower sampling_ratio, id_panels or the picture size."
            )
        return mode, f"bank estimate {needed / 2**20:.1f} MiB, {free / 2**20:.0f} MiB of RAM free: memory {mode}"

    def draw(self) -> tuple[Tensor, dict, str]:
        """Latents [panels, ...] in the conditioning's order, characters by name, and a report."""
        mode, report = self.memory()
        done: dict[int, Tensor] = {}
        passes = plan(self.story, self.panels, set(self.characters), mode, self.settings.panels_at_once)
        total = len(passes) * self.settings.steps
        progress = comfy.utils.ProgressBar(total)
        lines = [report]
        for number, part in enumerate(passes):
            if self._has(part) and not (mode == "bank" and self._bank_needed(part, passes)):
                done |= {panel: self.store.get(self._key(panel)) for panel in part.kept}
                lines.append(f"kept {_numbers(part.kept)} from an earlier run")
            else:
                done |= self._drawn(part, mode, progress, number * self.settings.steps, done)
                lines.append(f"drew {_numbers(part.panels)}")
            progress.update_absolute((number + 1) * self.settings.steps, total)
        lines += [f"not kept for later runs: {self._unknown()}"] if self._unknown() else []
        return torch.stack([done[panel] for panel in self.panels]), self.characters, "\n".join(lines)

    def _drawn(self, part: Pass, mode: str, progress, begun: int, done: dict) -> dict[int, Tensor]:
        """Run a pass; an error after finished panels says what became of those."""
        try:
            return self._run(part, mode, progress, begun)
        except (ValueError, RuntimeError) as error:
            if done and not isinstance(error, comfy.model_management.OOM_EXCEPTION):
                raise RuntimeError(self._failure(part, done, error)) from error
            raise

    def _failure(self, part: Pass, done: dict, error: Exception) -> str:
        kept = f"{_numbers(tuple(sorted(done)))} kept and will not be drawn again"
        if self.store is None:
            kept = "keep_panels is off"
        elif self._unknown():
            kept = f"no panel kept: {self._unknown()}"
        return f"{self.node_id}: drawing {_numbers(part.panels)} failed: {error} ({kept})"

    def _unknown(self) -> str:
        """Why panels cannot be kept, or nothing."""
        found = sorted(self.store.unknown) if self.store is not None else []
        return f"the content of {', '.join(found)} on the model or the conditioning cannot be told apart" if found else ""

    def _bank_needed(self, part: Pass, passes: list[Pass]) -> bool:
        """Whether a pass defines a character that the output or a later pass, not stored yet, reads."""
        if part.writes is None:
            return False
        later = (panel for one in passes if one.writes is None and not self._has(one) for panel in one.kept)
        return self.wanted or any(part.writes in self.story.panels[panel].characters for panel in later)

    def _has(self, part: Pass) -> bool:
        return self.store is not None and all(self.store.has(self._key(panel)) for panel in part.kept)

    def _key(self, panel: int) -> str | None:
        if panel not in self._keys:
            self._keys[panel] = self.store.key(self._digest(panel))
        return self._keys[panel]

    def _digest(self, panel: int) -> Digest:
        """What decides a panel: model, rules, settings, its own conditioning and noise, and those of the panels it reads."""
        shown = self.story.panels[panel].characters
        read = sorted({i for name in shown for i in self.story.id_panels.get(name, ()) if i in self.panels} | {panel})
        if self.whole is not None:  # the batch's first picture, for one, is read by all
            read = list(self.panels)
        rows = [self.panels.index(i) for i in read]
        s = self.settings
        digest = Digest()
        digest.feed([FORMAT, self.fingerprint])
        digest.feed([s.seed, s.steps, s.cfg, s.sampler, s.scheduler, s.denoise, [(i, self._seed(i)) for i in read], panel])
        digest.feed([(name, character.digest) for name, character in self.rule.characters.items() if name in shown])
        feed_model(digest, override.replace(self.model, self.rule, self.rule.changed(characters=())))
        digest.feed([rows_of(self.positive, rows, len(self.panels)), self.negative, self.latent[rows], self.mask])
        return digest

    def _seed(self, panel: int) -> int:
        return dict(self.settings.panel_seeds).get(panel, self.settings.seed)

    def _run(self, part: Pass, mode: str, progress, begun: int) -> dict[int, Tensor]:
        rows = [self.panels.index(panel) for panel in part.panels]
        recorder = bank.Recorder() if mode == "bank" and part.writes is not None else None
        characters = self.characters.values() if mode == "bank" else self.rule.characters.values()
        rule = self.rule.changed(characters=tuple(characters), recorder=recorder)
        model = override.replace(self.model, self.rule, rule)
        latent = self.latent[rows]
        noise = torch.cat(
            [
                comfy.sample.prepare_noise(latent[i : i + 1], self._seed(panel), [panel])
                for i, panel in enumerate(part.panels)
            ]
        )
        preview = previewer(model)

        def callback(step, x0, x, steps):
            progress.update_absolute(begun + step, progress.total, preview(x0))

        s = self.settings
        samples = comfy.sample.sample(
            model,
            noise,
            s.steps,
            s.cfg,
            s.sampler,
            s.scheduler,
            rows_of(self.positive, rows, len(self.panels)),
            rows_of(self.negative, rows, len(self.panels)),
            latent,
            denoise=s.denoise,
            noise_mask=self._mask_rows(rows),
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=s.seed,
        )
        if recorder is not None:
            self._remember(part.writes, recorder, len(part.panels), samples.shape)
        drawn = {panel: samples[i] for i, panel in enumerate(part.panels) if panel in part.kept}
        for panel, latent in drawn.items():
            if self.store is not None and self._key(panel) is not None:
                self.store.put(self._key(panel), latent)
        return drawn

    def _mask_rows(self, rows: list[int]):
        if self.mask is None or len(self.mask) != len(self.panels):
            return self.mask
        return self.mask[rows]

    def _remember(self, name: str, recorder: bank.Recorder, panels: int, shape) -> None:
        sigmas = comfy.samplers.KSampler(
            self.model,
            self.settings.steps,
            self.model.load_device,
            self.settings.sampler,
            self.settings.scheduler,
            self.settings.denoise,
            self.model.model_options,
        ).sigmas
        about = next(c.description for c in self.story.characters if c.name == name)
        self.characters[name] = bank.Character(
            name,
            about,
            self.rule.options,
            self.rule.layers,
            tuple(sigmas.tolist()),
            tuple(shape[2:]),
            type(self.model.model.diffusion_model).__name__,
            self.fingerprint,
            panels,
            recorder.tensors(name),
        )
        logging.info("Storyweft: character '%s' holds %.1f MiB", name, self.characters[name].bytes / 2**20)


def previewer(model):
    """Preview picture of a latent for ComfyUI's progress bar, or None where the user has previews off."""
    found = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    return lambda latent: found.decode_latent_to_preview_image("JPEG", latent) if found else None


def _numbers(panels: tuple[int, ...]) -> str:
    return f"panel{'s' * (len(panels) > 1)} {', '.join(str(panel + 1) for panel in panels)}"
