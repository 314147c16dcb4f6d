"""Frame-story cross attention (StoryImager, arXiv 2404.05979, without its trained parts) as a rule of the host seam.

U-Nets: each cross-attention call of a chunk whose entry carries captions is answered by a frame branch and a story branch
over keys and values of all captions, projected once per run. Models that read the prompt by cross attention themselves
(Wan, LTXV) get the same branches over their own keys; in joint sequences the frame branch is a constraint on who sees
which caption.
"""

import logging
import math

import torch
from torch import Tensor

from ..attention.core import split_heads
from ..attention.frame_story import frame_index, frame_story_branches, joint_constraint
from ..attention.masked import ANY
from .board import MARK, BoardText, with_summary
from .consistent import PATHS
from .layout import Layer, Layout
from .rule import Rule
from .unet import UNetFamily

KNOWN = ("renoise", "clean")
OLD, LIMIT = ("SD15", "SD20", "SD21UnclipL", "SD21UnclipH"), 1024  # model configs, pixels


class FrameStoryRule(Rule):
    """blend: weight of the story branch (0 to 1); layers: a key of PATHS; sigma_range (high, low) bounds the steps.

    Outside its layers and steps every cell sees the whole story. `clean` gives the model known cells without noise.
    """

    node_id = "StoryweftFrameStoryCrossAttention"

    def __init__(self, family, blend: float, layers: str = "all", sigma_range=(math.inf, 0.0), clean: bool = False):
        self.kinds = frozenset({"cross" if "cross" in family.kinds else "self"})
        self.blend, self.layers, self.sigma_range, self.clean = blend, layers, sigma_range, clean

    def start(self, run) -> "State":
        return State()

    def finished(self, run) -> bool:
        nothing = run.mask is not None and not run.mask.any()
        if nothing:
            logging.warning("%s: every frame of the board is known, so nothing was drawn.", self.node_id)
        return nothing

    def begin(self, run) -> None:
        state = run.state[self]
        entries = run.listed
        state.texts = [entry.cond[MARK] for entry in entries if MARK in entry.cond]
        if not state.texts:
            raise ValueError(
                f"{self.node_id}: no conditioning of this run carries a board; connect this node's conditioning output to "
                "the sampler."
            )
        for entry in entries:
            if MARK in entry.cond:
                self._check(run, entry.cond)
        state.board = state.texts[0].board
        if state.board.known and run.mask is None:
            raise ValueError(
                f"{self.node_id}: the board has known frames and the latent no mask; connect the latent of StoryweftBoard."
            )

    def _check(self, run, cond: dict) -> None:
        text, size = cond[MARK], tuple(run.latent_shape[-2:])
        shape, (height, width) = text.board.shape, text.board.size
        if size != (height, width):
            raise ValueError(
                f"{self.node_id}: the latent is {size[0]} x {size[1]} cells (height x width) and the board of {shape.rows} x "
                f"{shape.columns} frames {height} x {width}; connect the latent of StoryweftBoard."
            )
        if len(text.text) not in (1, run.latent_shape[0]):
            raise ValueError(
                f"{self.node_id}: the latent holds {run.latent_shape[0]} boards and there are captions for {len(text.text)}; "
                "give captions for one board or for all."
            )
        if cond.get("area") is not None:
            raise ValueError(f"{self.node_id}: the conditioning has an area; cells are areas already, so leave it out.")
        given = cond.get("cross_attn")
        if given is not None and not torch.equal(given.to(text.text), text.text):
            raise ValueError(
                f"{self.node_id}: the prompt was changed after this node, so its captions are no longer known; connect the "
                "conditioning without nodes that average or join prompts."
            )

    def latents(self, run, x: Tensor) -> Tensor:
        board = run.state[self].board
        if not self.clean or not board.known:
            return x
        known = run.base.process_latent_in(run.start.to(x))
        sigma = torch.full((len(x),), run.sigma, device=x.device, dtype=x.dtype)
        return board.repaired(x, known / run.base.model_sampling.calculate_input(sigma, torch.ones_like(x)))

    def result(self, run, latents: Tensor) -> Tensor:
        board = run.state[self].board
        if "cross" in self.kinds and self.expected(run) and not run.state[self].acted:
            logging.warning("%s: every frame read the whole story: %s", self.node_id, self.idle_reason(run))
        return board.repaired(latents, run.start) if board.known else latents

    def wants(self, layer: Layer, run) -> bool:
        return layer.kind in self.kinds and (layer.kind == "cross" or self._acts(layer, run))

    def _acts(self, layer: Layer, run) -> bool:
        high, low = self.sigma_range
        return layer.path in PATHS[self.layers] and low <= run.sigma <= high

    def expected(self, run) -> bool:
        return not all(text.plain for text in run.state[self].texts)

    def plan(self, run, call, layout: Layout, plan) -> bool:
        texts = [entry.cond.get(MARK) for entry in layout.entries]
        texts = [None if text is None or text.plain else text for text in texts]
        if not any(texts):
            return False
        if layout.layer.kind == "self":
            if layout.text is None:  # SD3.5's second attention holds the picture alone
                return False
            plan.constraints.append(self._joint(run, call, layout, texts, plan.q.shape[2]))
            return True
        acts = self._acts(layout.layer, run)
        run.state[self].acted |= acts
        blend = self.blend if acts else 1.0
        for chunk, text in enumerate(texts):
            if text is not None:
                (asked,) = plan.text[chunk]
                k, v, bias = self._keys(run, layout, chunk, text, asked)
                cells = run.state[self].cells(text, layout.grid)
                name = (self.node_id, text, layout.grid)
                plan.text[chunk] = frame_story_branches(
                    asked.rows, k, v, cells, text.labels, blend, text.story, bias, name
                )
        return True

    def _keys(self, run, layout: Layout, chunk: int, text: BoardText, asked) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of all captions, and what is added to their logits."""
        if text.captions is None:
            self._check_length(asked.k.shape[2], text)
            return asked.k, asked.v, asked.bias
        hooked = layout.entries[chunk].cond.get("hooks") is not None  # weights may then change from step to step
        k, v = run.state[self].projected(run, layout.layer, text, asked.k, hooked)
        rows = [item % len(k) for item in layout.items]
        return (k[rows], v[rows], None) if len(k) > 1 else (*(x.expand(len(rows), -1, -1, -1) for x in (k, v)), None)

    def _check_length(self, tokens: int, text: BoardText) -> None:
        if tokens != len(text.labels):
            raise RuntimeError(
                f"{self.node_id}: the model reads {tokens} tokens of text and the board's captions have {len(text.labels)}; "
                "nodes that add tokens to the prompt cannot be combined with it."
            )

    def _joint(self, run, call, layout: Layout, texts: list, length: int):
        """One constraint for all rows of a joint call; chunks in one call have equally many tokens of text."""
        state = run.state[self]
        name = (self.node_id, tuple(texts), layout.grid, length)
        if name not in state.joint:
            cells, captions = [], []
            for text in texts:
                if text is not None:
                    self._check_length(call.text.shape[1], text)
                free = (torch.full((1, size), ANY) for size in (math.prod(layout.grid), call.text.shape[1]))
                of_chunk = free if text is None else (state.cells(text, layout.grid), text.labels[None])
                for kept, labels in zip((cells, captions), of_chunk, strict=True):
                    kept.append(labels.expand(len(layout.items), -1))
            state.joint[name] = joint_constraint(
                torch.cat(cells), torch.cat(captions), layout.image, layout.text, length, name
            )
        return state.joint[name]


class State:
    """What stays the same over a run: the board, cells of each grid, keys and values of the captions in each layer."""

    def __init__(self):
        self.texts: list[BoardText] = []
        self.board = None
        self.acted = False  # whether frames read their own captions; outside of layers and steps all read the story
        self.joint: dict = {}
        self._cells: dict = {}
        self._projected: dict = {}

    def cells(self, text: BoardText, grid: tuple[int, ...]) -> Tensor:
        """Frame of every token of a grid (frames, height, width), [1, tokens]."""
        key = text.board.shape, grid
        if key not in self._cells:
            rows, columns = text.board.grid.shape
            index = frame_index(text.board.grid, grid[1] // rows, grid[2] // columns)
            self._cells[key] = index.flatten().repeat(grid[0])[None]
        return self._cells[key]

    def projected(self, run, layer: Layer, text: BoardText, like: Tensor, anew: bool) -> tuple[Tensor, Tensor]:
        """Keys and values [boards or 1, heads, tokens, dim] of all captions in a layer."""
        if not anew and (layer, text) in self._projected:
            return self._projected[layer, text]
        made = run.family.project(layer, text.captions.to(like.device, like.dtype))
        made = tuple(split_heads(x, like.shape[1]) for x in made)
        if not anew:  # another entry with the same captions may have no hooks
            self._projected[layer, text] = made
        return made


def prepare(family, conditioning: list, summary: list | None, node_id: str) -> list[list]:
    """The conditioning that a model of `family` is to get for a board's.

    U-Nets get one prompt's length of tokens, the mean of the captions or the summary, since the captions themselves come in
    by the branches; all others get all tokens. Raises ValueError naming `node_id`.
    """
    out = []
    for text, extras in conditioning:
        if MARK not in extras:
            raise ValueError(
                f"{node_id}: conditioning is not from StoryweftBoard, so its captions are unknown; use that node."
            )
        mark = extras[MARK]
        frames, length = mark.board.shape.frames, text.shape[1]
        if not torch.equal(text, mark.text):
            raise ValueError(
                f"{node_id}: conditioning was changed after StoryweftBoard, so its captions are no longer known; connect it "
                "without nodes that average or join prompts."
            )
        if summary is not None:
            text, extras = with_summary(text, extras, summary)
        labels = torch.cat([mark.labels, torch.full((text.shape[1] - length,), frames)])
        if isinstance(family, UNetFamily):
            mean = text[:, :length].unflatten(1, (frames, -1)).mean(1)
            carrier = mean if summary is None else text[:, length:]
            made = BoardText(mark.board, carrier, labels, text, summary is not None)
        else:
            carrier = text
            made = BoardText(mark.board, text, labels, None, summary is not None)
        out.append([carrier, {**extras, MARK: made}])
    return out


def check_family(family, model, conditioning: list, blend: float, node_id: str) -> None:
    """Raises ValueError, naming `node_id`, for what a model cannot do; warns of boards larger than it draws well."""
    joint = "cross" not in family.kinds
    if family.time_layers:
        raise ValueError(
            f"{node_id}: {family.model_class} with temporal layers takes no captions, its frames are a time axis already; use "
            "an image model."
        )
    if joint and blend:
        raise ValueError(
            f"{node_id}: blend is {blend} and {family.model_class} reads text and picture in one sequence, so there is no "
            "story branch; set it to 0."
        )
    if joint and any(extras[MARK].has_summary for _, extras in conditioning):
        raise ValueError(
            f"{node_id}: summary is connected and {family.model_class} has no story branch that could read it; disconnect it."
        )
    unit, pixels = family.cell_unit(), model.get_model_object("latent_format").spacial_downscale_ratio
    board = conditioning[0][1][MARK].board
    if any(side % unit for side in board.cell):
        wanted = [sorted({side // unit * unit or unit, -(-side // unit) * unit}) for side in board.cell]
        near = " or ".join(f"{w * pixels} x {h * pixels}" for h in wanted[0] for w in wanted[1])
        raise ValueError(
            f"{node_id}: frames of {board.cell[1] * pixels} x {board.cell[0] * pixels} pixels are not a multiple of "
            f"{unit * pixels}, so their borders would fall inside tokens of {family.model_class}; use {near}."
        )
    if type(model.model.model_config).__name__ in OLD and max(board.size) * pixels > LIMIT:
        logging.warning(
            "%s: the board is %d x %d pixels; models of the age of SD1.5 and SD2 lose the layout beyond about %d.",
            node_id,
            board.size[1] * pixels,
            board.size[0] * pixels,
            LIMIT,
        )
