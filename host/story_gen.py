"""StoryGen (Intelligent Grimm, arXiv 2306.00973) as a rule of the host seam, and its guider over three branches.

Branch u reads a grey picture with the negative prompt, v the references with the negative prompt, a the references with the
prompt. The rule adds the image attention to what the text attention gives, after all other blocks and patches.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..attention.story_gen import image_attention, join
from ..sampling.story_gen import AUTO, LAST, PART, branches, reference_timesteps, without_repetition
from . import families
from .reference_pass import Reference, ReferencePasses, check_memory, memory_line, place
from .rule import Rule
from .unet import UNetFamily

NODE_ID = "StoryweftStoryGenGuider"
SHOWS = {"positive": "references", "middle": "references", "negative": "blank"}
TRAINED = 3  # references at once


@dataclass(frozen=True, eq=False)
class ImageSites:
    """What answers the image attention: site (path, block, depth) -> module with attn3 and norm4, heads of each.

    twice: whether the residual counts twice, as in the released weights (see attention/story_gen.py). normed: whether the
    features go through norm4 too, as keys and values made for normalised tokens need.
    """

    modules: Callable[[Any], dict[tuple, Any]]  # of the host's diffusion model
    head: dict[tuple, int]
    twice: bool = True
    normed: bool = False


class ImagePatches:
    """Patches of one main pass: remembers h in each block, then adds the image attention to the text attention's output.

    groups: (rows of the call, site -> features [n, K, C]); rows of no group stay as they are.
    """

    def __init__(self, modules: dict, sites: ImageSites, groups: list[tuple[slice | list[int], Callable]], strength: float):
        self.modules, self.sites, self.groups, self.strength = modules, sites, groups, strength
        self.h = None

    def add_to(self, options: dict) -> None:
        """Put them behind all patches that `options`, the transformer_options of one call, has."""
        patches = options.get("patches", {})
        own = {"middle_patch": self.remember, "attn2_output_patch": self.apply}
        options["patches"] = {**patches, **{name: [*patches.get(name, ()), patch] for name, patch in own.items()}}

    def remember(self, x: Tensor, extra: dict) -> Tensor:
        self.h = x
        return x

    def apply(self, n: Tensor, extra: dict) -> Tensor:
        site, h = place(extra), self.h
        module = self.modules[site]

        def attend(q, k, v, bias):
            return optimized_attention(
                q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=extra
            )

        out = n.clone()
        for rows, features in self.groups:
            heads = module.attn3.to_q.weight.shape[0] // self.sites.head[site]
            image = module.norm4(features(site)) if self.sites.normed else features(site)
            found = image_attention(module.attn3, module.norm4, h[rows], image, heads, attend)
            out[rows] = join(h[rows], n[rows], found, self.strength, self.sites.twice)
        return out


class ReferenceRule(Rule):
    """references oldest first, `blank` what a row without them reads; see sampling/story_gen.py for `stage`.

    noise: shape -> the one noise of all references. strength scales the image branch as one unit; 0 is the bare model.
    speaker: id of the node that messages name, if not the rule's own.
    """

    node_id = NODE_ID

    def __init__(
        self,
        sites: ImageSites,
        references: tuple[Reference, ...],
        blank: Reference | None,
        stage: str,
        noise,
        strength: float = 1.0,
        speaker: str = "",
    ):
        self.speaker = speaker or self.node_id
        self.sites, self.references, self.blank = sites, references, blank
        self.stage, self.noise, self.strength = stage, noise, strength
        self.neutral = strength == 0 or not references

    def start(self, run) -> ReferencePasses:
        return ReferencePasses(run, self.noise)

    def pairs(self, t: int) -> dict[str, list[tuple[Reference, int]]]:
        """References and their timesteps that each kind of row reads when the picture is at timestep t."""
        steps = reference_timesteps(t, len(self.references), self.stage)
        shown = {"references": without_repetition(list(zip(self.references, steps, strict=True)))}
        if self.blank is not None:
            shown["blank"] = without_repetition([(self.blank, step) for step in steps])
        return shown

    def passes(self, t: int = 999) -> list[tuple[Reference, int]]:
        """All different passes of one step."""
        return list(dict.fromkeys(pair for pairs in self.pairs(t).values() for pair in pairs))

    def begin(self, run) -> None:
        for entry in run.listed:
            if "area" in entry.cond:
                raise ValueError(
                    f"{self.speaker}: a conditioning of role {entry.role} has an area; references belong to the whole "
                    "picture, so leave areas out."
                )
            if entry.cond.get("hooks") is not None:
                raise ValueError(
                    f"{self.speaker}: a conditioning of role {entry.role} has hooks; passes over references could not follow "
                    "weights that change with the prompt, so put LoRAs on the model."
                )
            if entry.role not in SHOWS:
                raise ValueError(
                    f"{self.speaker}: the guider has a list of conditionings named '{entry.role}', of which it is unknown "
                    "whether it sees the references; use StoryweftStoryGenGuider or a sampler with positive and negative."
                )
        t = run.state[self].timestep()
        if self.stage == AUTO and t // PART * len(self.references) > LAST:
            logging.warning(
                "%s: %d references in stage %s reach beyond timestep %d at the first steps; the oldest are held there.",
                self.speaker,
                len(self.references),
                AUTO,
                LAST,
            )
        passes = self.passes(t)
        check_memory(run, self.size_of(run.base, run.family, passes, run.latent_shape[0]), len(passes), self.speaker)

    @staticmethod
    def size_of(base, family, passes: list, latents: int) -> int:
        """Size of the features that the passes of one step keep for a number of latents."""
        item = torch.finfo(base.get_dtype_inference()).bits // 8
        return latents * item * sum(
            sum(family.sizes(reference.latent.shape).values()) for reference, _ in passes
        )

    def prepare(self, run, call, options: dict) -> None:
        state, device = run.state[self], call.text.device
        pairs = self.pairs(state.timestep())
        state.only(pair for shown in pairs.values() for pair in shown)
        chunks: dict[str, list[int]] = {}
        for chunk, entry in enumerate(call.entries):
            if SHOWS[entry.role] in pairs:
                chunks.setdefault(SHOWS[entry.role], []).append(chunk)
        if not chunks:
            return
        state.ready([pair for name in chunks for pair in pairs[name]], device)
        groups = [
            (_rows(numbers, len(call.items)), _joined(state, pairs[name], call.items)) for name, numbers in chunks.items()
        ]
        modules = self.sites.modules(run.base.diffusion_model)
        ImagePatches(modules, self.sites, groups, self.strength).add_to(options)
        run.acted[self] += 1


def _rows(chunks: list[int], size: int) -> slice | list[int]:
    if chunks == list(range(chunks[0], chunks[0] + len(chunks))):
        return slice(chunks[0] * size, (chunks[0] + len(chunks)) * size)
    return [chunk * size + row for chunk in chunks for row in range(size)]


def _joined(state: ReferencePasses, pairs: list, items: tuple[int, ...]) -> Callable[[tuple], Tensor]:
    def features(site: tuple) -> Tensor:
        parts = [state.feature(pair, site) for pair in pairs]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return joined if len(items) == len(joined) else joined[list(items)]

    return features


class StoryGenGuider(comfy.samplers.CFGGuider):
    """eps = eps_u + image_scale (eps_v - eps_u) + text_scale (eps_a - eps_v); branches of weight 0 are not computed.

    Without references (`alone`) u and v are one branch and it is ordinary guidance with text_scale.
    """

    def set_scales(self, text_scale: float, image_scale: float, alone: bool) -> None:
        self.text_scale, self.image_scale, self.alone = text_scale, image_scale, alone

    def set_conds(self, positive, negative) -> None:
        middle = [[text, {**extras, "prompt_type": "negative"}] for text, extras in negative]
        roles = {"positive": positive, "negative": negative}
        self.inner_set_conds(roles if self.alone else {**roles, "middle": middle})

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (core's own signature)
        text, image, model = self.text_scale, self.image_scale, self.inner_model
        conds = {name: self.conds.get(role) for name, role in (("u", "negative"), ("v", "middle"), ("a", "positive"))}
        needed = branches(text, text if self.alone else image)
        if len(needed) < 3:  # then it is guidance of one branch against another
            against, scale = (conds[needed[0]], text) if len(needed) == 2 else (None, 1.0)
            return comfy.samplers.sampling_function(
                model, x, timestep, against, conds["a"], scale, model_options=model_options, seed=seed
            )
        u, v, a = comfy.samplers.calc_cond_batch(model, list(conds.values()), x, timestep, model_options)
        guided = comfy.samplers.cfg_function(
            model, a, v, text, x, timestep, model_options=model_options, cond=conds["a"], uncond=conds["v"]
        )
        return guided + (image - 1) * (v - u)


def make_guider(model, rule: ReferenceRule | None, positive, negative, text_scale: float, image_scale: float):
    """The guider of a MODEL on which `rule`, if any, is registered. Warns of an image scale without effect."""
    guider = StoryGenGuider(model)
    guider.set_scales(text_scale, image_scale, rule is None or rule.neutral)
    guider.set_conds(positive, negative)
    if rule is not None and text_scale <= 1 and image_scale != text_scale:
        logging.warning(
            "%s: text_scale is %g, which turns guidance off, so image_scale %g has no effect.",
            rule.speaker,
            text_scale,
            image_scale,
        )
    return guider


def check_family(family, node_id: str) -> None:
    """ValueError unless the family is a U-Net of pictures."""
    if not isinstance(family, UNetFamily) or family.time_layers:
        raise ValueError(
            f"{node_id}: {family.model_class} is not a U-Net of single pictures, whose transformer blocks it needs; use SD1.5 or "
            "a relative."
        )


def sizing(model, rule: ReferenceRule) -> str:
    """What a rule's references take in each step for one picture, as the end of a sentence."""
    family, passes = families.find(model, rule.node_id), rule.passes()
    return memory_line(len(passes), 1, rule.size_of(model.model, family, passes, 1))
