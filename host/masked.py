"""Masked spatio-temporal attention from boxes (PEEKABOO, arXiv 2312.07509) as a rule of the host seam.

In the first steps tokens inside an object's box see only each other and the object's words, all others see only the rest.
One label per token serves spatial, temporal, joint and cross-attention; a query that would see nothing stays unmasked.
Where attention runs over a whole video at once (transformers), `spatial` covers both what the paper calls spatial and
temporal. The second, gated temporal attention of the authors' 3-D U-Net exists in no model the seam knows.
"""

import contextlib
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.labels import BoxRegions, MaskRegions, causal_groups
from ..attention.masked import ANY, Constraint
from . import animatediff
from .board import MARK
from .families import window_items
from .layout import Layer, Layout
from .rule import Rule
from .transformer import FORMS
from .words import KEY, Words

KNOWN = {*FORMS, "OpenAISignatureMMDITWrapper", "CameraWanModel"}  # other subclasses add tokens or reorder them
LAYERS = ("auto", "all", "middle and output path")


@dataclass(frozen=True)
class MaskedOptions:
    """`part` of the steps, at least one, or `steps` of them if above 0, are masked, in the layers and kinds chosen.

    layers: "auto" is all for pictures and transformers, and the middle and output path for video U-Nets. union: a token
    frame that holds several pixel frames is an object's where any of them is; otherwise by their average. reference:
    boxes are read as the authors do, by sampling a mask, which loses small ones.
    """

    part: float = 0.05
    steps: int = 0
    spatial: bool = True
    temporal: bool = True
    cross: bool = True
    layers: str = "auto"
    union: bool = False
    reference: bool = False

    def count(self, total: int) -> int:
        """Number of masked steps of a schedule of `total`."""
        return self.steps or (max(1, round(self.part * total)) if self.part else 0)


def boundary(sigmas: list[float], count: int) -> float:
    """Steps start above this sigma exactly if they are among the first `count`."""
    return math.inf if count == 0 else (sigmas[count - 1] + sigmas[count]) / 2


class MaskedRule(Rule):
    """See the module. `frames_per_latent` is how many pixel frames a later latent frame of a video model holds."""

    node_id = "StoryweftMaskedAttention"

    def __init__(self, regions: BoxRegions | MaskRegions, options: MaskedOptions, frames_per_latent: int = 1):
        self.regions = regions
        self.options = options
        self.frames_per_latent = frames_per_latent
        self.whole_batch = regions.frames > 1
        self.kinds = frozenset(
            kind
            for kind, on in (
                ("self", options.spatial or options.cross),
                ("time", options.temporal),
                ("cross", options.cross),
            )
            if on
        )
        self.neutral = options.count(1) == 0 or not self.kinds

    def start(self, run) -> "State":
        return State(self, run)

    def begin(self, run) -> None:
        family = run.family.model_class
        if family not in KNOWN and not run.family.picture_only:
            raise ValueError(f"{self.node_id}: the order of tokens in {family} is not known to it; use the base model.")
        entries = run.listed
        for entry in entries:
            for key, what in (("area", "an area"), ("keyframe_idxs", "guide key frames")):
                if entry.cond.get(key) is not None:
                    raise ValueError(
                        f"{self.node_id}: {entry.role} conditioning {entry.index} has {what}, which boxes cannot be combined "
                        "with; remove it."
                    )
        if self.options.cross:
            self._check_words(run, entries)

    def _check_words(self, run, entries) -> None:
        marked = [entry for entry in entries if KEY in entry.cond]
        if not marked and any(MARK in entry.cond for entry in entries):
            raise ValueError(
                f"{self.node_id}: the prompt is a board's, for StoryweftFrameStoryCrossAttention, and the objects' words are not "
                "marked in its captions; connect it to board_conditioning of this node, or switch cross off."
            )
        if not marked:
            raise ValueError(
                f"{self.node_id}: no conditioning of this run knows the objects' words; connect the block's conditioning "
                "output to positive, or switch cross off (models without text, like SVD, need that)."
            )
        for entry in marked:
            words, text = entry.cond[KEY], _text_of(entry)
            if text is not None and text.shape[1] != len(words.labels):
                raise ValueError(
                    f"{self.node_id}: {entry.role} conditioning {entry.index} has {text.shape[1]} tokens where the block's "
                    f"prompt has {len(words.labels)}; do not concatenate or average it with other text."
                )
        run.state[self].words = {entry.key: entry.cond[KEY] for entry in marked}
        run.state[self].fallback = (marked[0].role, marked[0].cond[KEY])

    def covers(self, layer: Layer, run) -> bool:
        if self.options.layers == "all" or not run.family.picture_only:
            return True
        if self.options.layers == "auto" and not (run.family.time_layers or run.state[self].motion):
            return True
        return layer.path != "input"

    def wants(self, layer: Layer, run) -> bool:
        if layer.kind not in self.kinds or run.sigma <= run.state[self].until or not self.covers(layer, run):
            return False
        # in the joint attention of transformers words are keys too
        return layer.kind != "self" or self.options.spatial or not run.family.picture_only

    def prepare(self, run, call, options: dict) -> None:
        run.state[self].motion = animatediff.mask_motion_modules(self, run, call, options)

    @contextlib.contextmanager
    def around(self, run, call):
        """Before a run goes on, every layer that should be masked must have been recognised."""
        yield
        state = run.state[self]
        if state.checked or run.sigma <= state.until or not run.reached:
            return
        state.checked = True
        layers = [*run.family.layers, *run.family.cross_layers, *run.family.time_layers]
        found = {*run.reached, *run.bypassed, call.mark and call.mark.layer}
        lost = [layer for layer in layers if self.wants(layer, run) and layer not in found]
        if lost:
            raise RuntimeError(
                f"{self.node_id}: {len(lost)} attention layers of {run.family.model_class}, first {lost[0]}, came with an "
                "order of tokens that is not known; remove what adds tokens or regroups them."
            )

    def idle_reason(self, run) -> str:
        return "the boxes leave every token with the same label, or no step was masked."

    def plan(self, run, call, layout: Layout, plan) -> bool:
        state = run.state[self]
        labels = state.labels(call, layout)
        if layout.layer.kind == "cross":
            return self._plan_cross(state, call, layout, labels, plan)
        if layout.layer.kind == "time":
            moving = labels.T.repeat(len(layout.entries), 1)
            if not _differ(moving):
                return False
            plan.constraints.append(Constraint(moving, moving, state.name(call, layout, "time")))
            return True
        rows = labels if len(labels) == 1 else labels.repeat(len(layout.entries), 1)
        acted = False
        if self.options.spatial and _differ(rows):
            whole = _spread(rows, layout.image, plan.k.shape[2])
            name = (state.name(call, layout, "self"), plan.k.shape[2])  # a reference may be in one prompt alone
            plan.constraints.append(Constraint(whole, whole, name))
            acted = True
        if self.options.cross and layout.text is not None:
            acted |= self._plan_joint(state, call, layout, labels, plan)
        return acted

    def _plan_cross(self, state: "State", call, layout: Layout, labels: Tensor, plan) -> bool:
        acted = False
        for chunk, entry in enumerate(layout.entries):
            words = state.words_of(entry)
            if words is None:
                continue
            for branch in plan.text[chunk]:
                length, text = branch.k.shape[2], _text_of(entry)
                own = length if text is None else text.shape[1]
                keys = _repeated(words, own, length, self.node_id, entry)
                name = (state.name(call, layout, "cross"), own, length, words)
                branch.constraints.append(Constraint(_grouped(labels, words), keys[None], name))
            acted = True
        return acted

    def _plan_joint(self, state: "State", call, layout: Layout, labels: Tensor, plan) -> bool:
        """Pictures' queries see their own words; everything sees the picture, as far as this constraint goes."""
        found = [state.words_of(entry) for entry in layout.entries]
        if not any(found):
            return False
        tokens, items = plan.k.shape[2], len(layout.items)
        queries, keys = [], []
        for entry, words in zip(layout.entries, found, strict=True):
            query, key = torch.full((items, tokens), ANY), torch.full((items, tokens), ANY)
            if words is not None:
                query[:, layout.image] = _grouped(labels, words)
                length = layout.text.stop - layout.text.start
                key[:, layout.text] = _fitted(words, length, self.node_id, entry)
            queries.append(query)
            keys.append(key)
        name = (state.name(call, layout, "joint"), tokens, layout.text.start, tuple(found))
        plan.constraints.append(Constraint(torch.cat(queries), torch.cat(keys), name))
        return True


def _differ(labels: Tensor) -> bool:
    """Whether any row holds two labels."""
    return bool((labels != labels[:, :1]).any())


def _spread(labels: Tensor, image: slice, tokens: int) -> Tensor:
    """Labels of picture tokens within a sequence, ANY for whatever else it holds."""
    whole = torch.full((len(labels), tokens), ANY)
    whole[:, image] = labels
    return whole


def _grouped(labels: Tensor, words: Words) -> Tensor:
    return torch.tensor(words.groups)[labels]


def _text_of(entry) -> Tensor | None:
    """What the model reads of an entry: its prompt, or, on U-Nets, a board's captions in place of it."""
    board = entry.cond.get(MARK)
    return entry.cond.get("cross_attn") if board is None or board.captions is None else board.captions


def _repeated(words: Words, own: int, length: int, node_id: str, entry) -> Tensor:
    """Labels of keys. Core repeats a prompt to the length of its partner; a negative may have more or fewer chunks."""
    labels = torch.tensor(words.labels)
    labels = labels.repeat(-(-own // len(labels)))[:own]
    if length % own:
        raise RuntimeError(f"{node_id}: {entry.role} prompt {entry.index} of {own} tokens arrives with {length}.")
    return labels.repeat(length // own)


def _fitted(words: Words, length: int, node_id: str, entry) -> Tensor:
    """The same in joint attention, where a prompt may be cut after its last word or padded behind it."""
    labels = torch.tensor(words.labels)
    if len(labels) < length:
        return torch.nn.functional.pad(labels, (0, length - len(labels)))
    if (labels[length:] > 0).any():
        raise RuntimeError(f"{node_id}: {entry.role} prompt {entry.index} is cut to {length} tokens and loses object words.")
    return labels[:length]


class State:
    """Labels at every grid of one run, the sigma below which nothing is masked, and the prompts' words."""

    def __init__(self, rule: MaskedRule, run):
        self.rule = rule
        self.words: dict[str, Words] = {}
        self.fallback: tuple[str, Words] | None = None
        self.motion = False  # whether AnimateDiff-Evolved's motion modules are in the model
        self.checked = False
        options, total = rule.options, len(run.sigmas) - 1
        count = options.count(total)
        if count > total:
            raise ValueError(f"{rule.node_id}: masked_steps is {count} and the sampler takes {total} steps; give at most that.")
        self.until = boundary(run.sigmas, count)
        shape = run.latent_shape
        self.video = shape[2] if len(shape) == 5 and shape[2] > 1 else 0
        self.regions = rule.regions.sampled(*shape[-2:]) if options.reference else rule.regions
        self.frames = self._frames(rule, shape)
        self._labels: dict = {}

    def _frames(self, rule: MaskedRule, shape) -> list[list[int]]:
        """Box frames of each picture of a batch, or of each latent frame of a video."""
        given, pictures = rule.regions.frames, shape[0]
        if not self.video:
            if given not in (1, pictures):
                raise ValueError(
                    f"{rule.node_id}: boxes has {given} frames and the latent batch {pictures} pictures; make them equal, or "
                    "give boxes 1 frame."
                )
            return [[min(row, given - 1)] for row in range(pictures)]
        pixels = 1 + (self.video - 1) * rule.frames_per_latent
        if given not in (1, self.video, pixels):
            raise ValueError(
                f"{rule.node_id}: boxes has {given} frames and the video {pixels} (in {self.video} latent frames); give boxes "
                f"{pixels}, {self.video} or 1."
            )
        return causal_groups(given, self.video)

    def words_of(self, entry) -> Words | None:
        """Words that label the prompt of an entry; a negative of CLIP is masked at the places of the positive's words."""
        found = self.words.get(entry.key)
        if found is not None or self.fallback is None:
            return found
        role, words = self.fallback
        return words if words.both and entry.role != role and "negative" in entry.role else None

    def groups(self, call, layout: Layout) -> list[tuple[int, ...]]:
        """Box frames of every token frame of a call, for a video; else of every picture."""
        if not self.video:
            return [tuple(self.frames[item]) for item in layout.items]
        latents = self.frames
        if call.window is not None and call.window.dim == 2:
            latents = [self.frames[index] for index in window_items(call.window, call.shape[2], 2)]
        step = -(-len(latents) // layout.grid[0])
        runs = [latents[start : start + step] for start in range(0, len(latents), step)]
        return [tuple(dict.fromkeys(frame for group in run for frame in group)) for run in runs]

    def labels(self, call, layout: Layout) -> Tensor:
        """[pictures of a chunk, or 1 if all are alike, tokens]; for time layers [frames, places]."""
        groups = tuple(self.groups(call, layout))
        labels = self.at(groups, *layout.grid[-2:])
        if self.video:
            return labels.flatten()[None]
        return labels if layout.layer.kind == "time" or len(set(groups)) > 1 else labels[:1]

    def at(self, groups: tuple[tuple[int, ...], ...], height: int, width: int) -> Tensor:
        """Labels [groups, height·width] of groups of box frames."""
        key = (groups, height, width)
        if key not in self._labels:
            self._labels[key] = self.regions.labels(groups, height, width, self.rule.options.union)
            self._warn(self._labels[key], groups, height, width)
        return self._labels[key]

    def frame_labels(self, items, height: int, width: int) -> Tensor:
        """Labels [pictures, height·width] of the pictures `items`."""
        return self.at(tuple(tuple(self.frames[item]) for item in items), height, width)

    def _warn(self, labels: Tensor, groups, height: int, width: int) -> None:
        frames = sorted({frame for group in groups for frame in group})
        for number, there in enumerate(self.regions.present[:, frames].any(1).tolist(), 1):
            if there and not (labels == number).any():
                logging.warning(
                    "%s: object %s covers no token of a %s x %s layer and is not placed there.",
                    self.rule.node_id,
                    number,
                    width,
                    height,
                )

    def name(self, call, layout: Layout, kind: str):
        """Content key of a constraint: everything its labels depend on."""
        return ("masked", kind, layout.grid, tuple(self.groups(call, layout)), layout.image.start, len(layout.entries))
