"""A trained StoryImager module as a rule: frame branch with LoRA, gated story branch over extracted tokens, latent prior.

Context extractor and all keys of captions and story are computed once a run. The queries' and outputs' LoRA need the
attention's input and output, which the family's patches hand over.
"""

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path

import comfy.utils
import torch
from torch import Tensor

from ..attention.branches import Branch
from ..attention.core import merge_heads, split_heads
from ..attention.frame_story import frame_constraint
from ..models.story_board import Context, prior_board
from ..models.trained_board import BoardModule, build
from .board import MARK, BoardText
from .demo import read_weights
from .frame_story import FrameStoryRule, State
from .layout import Layer, Layout
from .unet import UNetFamily

NODE_ID = "StoryweftTrainedBoard"
APART = ("StoryweftFrameStoryCrossAttention", "StoryweftMaskedAttention")  # rules that change the same text branches


@dataclass(eq=False)
class LoadedBoard:
    """A module with the name and metadata of its file."""

    name: str
    network: BoardModule
    metadata: dict[str, str] = field(default_factory=dict)


def load(path: str, node_id: str) -> LoadedBoard:
    """The module of a .safetensors file, float32. Raises ValueError for files of another kind."""
    name = Path(path).name
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    tensors = {key: value.float() for key, value in tensors.items()}
    return LoadedBoard(name, build(tensors, metadata or {}, f"{node_id}: {name}"), dict(metadata or {}))


def load_demo() -> LoadedBoard:
    """The module of weights/ for the demo U-Net."""
    tensors, metadata = read_weights("board", node_id="StoryweftLoadTrainedBoard")
    return LoadedBoard("demo board", build(tensors, metadata, "demo board"), metadata)


def check(loaded: LoadedBoard, family, conditioning: list) -> None:
    """ValueError unless the module was made for such a U-Net and holds so many frames."""
    if not isinstance(family, UNetFamily) or not family.cross_layers:
        raise ValueError(
            f"{NODE_ID}: {family.model_class} is no U-Net with cross-attention; a trained board acts on SD1.5, SD2, SDXL and "
            "relatives."
        )
    projections = [family.modules[layer].to_k for layer in family.cross_layers]
    own, width = [layer.out_features for layer in projections], projections[0].in_features
    network = loaded.network
    if network.channels != own or network.width != width:
        raise ValueError(
            f"{NODE_ID}: {loaded.name} was trained for {len(network.channels)} cross-attention layers over text {network.width} "
            f"wide and the model has {len(own)} over text {width} wide; load the module of its family."
        )
    most = len(network.ctx.frame_pos)
    for _, extras in conditioning:
        if extras[MARK].board.shape.frames > most:
            raise ValueError(
                f"{NODE_ID}: the board has {extras[MARK].board.shape.frames} frames and {loaded.name} knows {most} at most."
            )
        if extras[MARK].has_summary:
            raise ValueError(
                f"{NODE_ID}: the conditioning has a summary; a trained board extracts the story by itself."
            )


class TrainedBoardRule(FrameStoryRule):
    """strength scales what was trained: LoRA, gates and prior; 0 is the frame branch alone."""

    node_id = NODE_ID

    def __init__(self, family, loaded: LoadedBoard, strength: float = 1.0, clean: bool = True):
        super().__init__(family, 0.0, clean=clean)
        self.network, self.strength = loaded.network, strength
        self.sites = dict(zip(family.cross_layers, loaded.network.sites, strict=True))

    def start(self, run) -> "TrainedState":
        return TrainedState()

    def begin(self, run) -> None:
        others = [rule.node_id for rule in run.rules if rule.node_id in APART]
        if others:
            raise ValueError(f"{self.node_id}: it cannot act beside {others[0]} on one model; remove one of them.")
        super().begin(run)

    def expected(self, run) -> bool:
        return self.strength != 0 or super().expected(run)

    @contextlib.contextmanager
    def around(self, run, call):
        """Adds the latent prior to what the network is given, after the host has scaled it."""
        hook = functools.partial(self._with_prior, run, call)
        handle = run.base.diffusion_model.register_forward_pre_hook(hook) if self.strength else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def _with_prior(self, run, call, network, arguments: tuple) -> tuple:
        x, *rest = arguments
        rows, prior = len(x) // len(call.entries), torch.zeros_like(x)
        for chunk, entry in enumerate(call.entries):
            text = entry.cond.get(MARK)
            if text is not None:
                made = run.state[self].context(self.network, text).prior
                placed = prior_board(made, text.board.grid, text.board.cell).to(x)
                prior[chunk * rows : (chunk + 1) * rows] = placed.expand(rows, -1, -1, -1)
        return x + self.strength * prior, *rest

    def plan(self, run, call, layout: Layout, plan) -> bool:
        if not self.strength:
            return super().plan(run, call, layout, plan)
        texts = [entry.cond.get(MARK) for entry in layout.entries]
        if not any(texts):
            return False
        state, site = run.state[self], self.sites[layout.layer]
        state.acted = True
        call.after = torch.zeros_like(call.queries)
        for chunk, text in enumerate(texts):
            if text is None:
                continue
            (asked,) = plan.text[chunk]
            frame = self._branch(run, call, layout, plan, asked.rows, text, site.lora_frame)
            frame.constraints = [
                frame_constraint(state.cells(text, layout.grid), text.labels, (self.node_id, text, layout.grid))
            ]
            plan.text[chunk] = [frame]
            gate = self.strength * float(site.gate)
            if gate:
                story = self._branch(run, call, layout, plan, asked.rows, text, site.lora_story)
                story.weight = gate
                call.after[asked.rows] += gate * run.family.modules[layout.layer].to_out[0].bias.to(call.after)
                plan.text[chunk].append(story)
        return True

    def _branch(self, run, call, layout: Layout, plan, rows: slice, text: BoardText, lora) -> Branch:
        """Captions' or story's keys and values, with the LoRA on queries and, once it has answered, on its output."""
        heads, site = plan.q.shape[1], self.sites[layout.layer]
        told = "frame" if lora is site.lora_frame else "story"
        hooked = layout.entries[rows.start // layout.chunk_size].cond.get("hooks") is not None
        k, v = run.state[self].keys(self, run, layout.layer, text, told, lora, plan.q, hooked)
        items = [item % len(k) for item in layout.items]
        q = plan.q[rows] + self.strength * split_heads(lora["to_q"](call.queries[rows]), heads)
        branch = Branch(rows, k[items], v[items], q=q)
        branch.told = functools.partial(self._output, call, branch, lora)
        return branch

    def _output(self, call, branch: Branch, lora, found: Tensor) -> None:
        call.after[branch.rows] += self.strength * branch.weight * lora["to_out"](merge_heads(found))


class TrainedState(State):
    """What stays the same over a run; contexts by board text, keys by layer, text and branch."""

    def __init__(self):
        super().__init__()
        self._contexts: dict[BoardText, Context] = {}
        self._keys: dict = {}

    def context(self, network: BoardModule, text: BoardText) -> Context:
        """What the extractor makes of a board's captions and targets."""
        if text not in self._contexts:
            frames = text.board.shape.frames
            words = text.captions.float().cpu().unflatten(1, (frames, -1))
            targets = torch.tensor(text.board.targets).expand(len(words), -1)
            with torch.inference_mode():
                self._contexts[text] = network.ctx(words, targets)
        return self._contexts[text]

    def keys(self, rule, run, layer: Layer, text: BoardText, told: str, lora, q: Tensor, hooked: bool) -> tuple:
        """Keys and values [boards or 1, heads, tokens, dim] of all captions ("frame") or the story's tokens."""
        key = (layer, text, told, q.device, q.dtype)
        if hooked or key not in self._keys:  # hooked weights may change from step to step
            rows = (text.captions if told == "frame" else self.context(rule.network, text).story).to(q)
            made = zip(run.family.project(layer, rows), ("to_k", "to_v"), strict=True)
            pair = [x + rule.strength * lora[name](rows) for x, name in made]
            self._keys[key] = tuple(split_heads(x, q.shape[1]) for x in pair)
        return self._keys[key]


def negative_board(negative: list, positive: list) -> list:
    """A negative prompt as the board's: every frame reads it, and the extractor sees it with the same targets."""
    board = positive[0][1][MARK].board
    frames, out = board.shape.frames, []
    for text, extras in negative:
        labels = torch.arange(frames).repeat_interleave(text.shape[1])
        out.append([text, {**extras, MARK: BoardText(board, text, labels, text.repeat(1, frames, 1))}])
    return out
