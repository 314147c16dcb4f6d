"""Predicted frame embeddings as rules: rows of an image adapter, of the prompt, or of Wan's latent frames.

Which guidance row sees them follows the guider's own lists; the negative gets the rows of a zero embedding.
"""

import torch
from torch import Tensor

from ..attention.core import split_heads
from ..attention.masked import ANY
from ..attention.motion import append_rows, frame_branch
from . import families
from .apa import WITH_PICTURE, AdaptivePromptRule
from .image_adapter import LoadedAdapter
from .layout import Layout
from .rule import Rule

NODE_ID = "StoryweftSemanticMotionPredictor"
WAN_STRIDE = 4  # pictures in every latent frame but the first


def check_roles(run) -> None:
    """ValueError for a guider's list of conditionings of which it is unknown whether it shows the pictures."""
    for entry in run.listed:
        if entry.role not in WITH_PICTURE:
            raise ValueError(
                f"{NODE_ID}: the guider has a list of conditionings named '{entry.role}', of which it is unknown whether it "
                "shows the pictures; use another guider."
            )


class FrameRows(Rule):
    """Checks that the latent holds the predicted frames; changes nothing."""

    node_id = NODE_ID

    def __init__(self, frames: int):
        self.frames = frames

    def begin(self, run) -> None:
        if run.latent_shape[0] != self.frames:
            raise ValueError(
                f"{self.node_id}: the film has {self.frames} frames and the latent {run.latent_shape[0]}; make them equal "
                "(frames is an output of the node)."
            )
        for entry in run.listed:
            rows = len(entry.cond["cross_attn"]) if "cross_attn" in entry.cond else 1
            if rows not in (1, self.frames):
                raise ValueError(
                    f"{self.node_id}: the {entry.role} conditioning has {rows} rows and the film {self.frames} frames; give 1 or "
                    f"{self.frames}."
                )

    def expected(self, run) -> bool:
        return False


class AdapterRows(AdaptivePromptRule):
    """Tokens of an image adapter, others in each frame, as a branch beside the prompt with keys and values of its own."""

    node_id = NODE_ID
    several = False

    def begin(self, run) -> None:
        FrameRows(len(self.tokens)).begin(run)
        super().begin(run)


class PromptRows(FrameRows):
    """tokens [frames, n, width of the prompt] as further rows of each frame's prompt, blank [1, n, width] in the negative's."""

    kinds = frozenset({"cross"})
    whole_batch = True

    def __init__(self, tokens: Tensor, blank: Tensor):
        super().__init__(len(tokens))
        self.tokens, self.blank = tokens, blank

    def start(self, run) -> dict:
        """Keys and values by layer."""
        return {}

    def begin(self, run) -> None:
        super().begin(run)
        check_roles(run)

    def expected(self, run) -> bool:
        return True

    def plan(self, run, call, layout: Layout, plan) -> bool:
        for chunk, branches in enumerate(plan.text):
            shown = WITH_PICTURE[layout.entries[chunk].role]
            pair = self._project(run, layout.layer, shown, plan.q)
            for branch in branches:
                rows = range(*branch.rows.indices(len(plan.q)))
                items = [layout.items[row % len(layout.items)] if shown else 0 for row in rows]
                append_rows(branch, *(x[items] for x in pair))
        return True

    def _project(self, run, layer, shown: bool, q: Tensor) -> tuple[Tensor, Tensor]:
        kept, key = run.state[self], (layer, shown, q.device, q.dtype)
        if key not in kept:
            found = run.family.project(layer, (self.tokens if shown else self.blank).to(q))
            kept[key] = tuple(split_heads(x, q.shape[1]) for x in found)
        return kept[key]


class LatentRows(Rule):
    """tokens [latent frames, n, D] of an adapter with keys and values for each block of a Wan model; see frame_branch."""

    node_id = NODE_ID
    kinds = frozenset({"cross"})

    def __init__(self, adapter: LoadedAdapter, tokens: Tensor, blank: Tensor, strength: float, family):
        self.adapter, self.tokens, self.blank, self.strength = adapter, tokens, blank, strength
        self.index = {layer: index for index, layer in enumerate(family.cross_layers)}

    def start(self, run) -> dict:
        """Keys and values by layer."""
        return {}

    def begin(self, run) -> None:
        if run.latent_shape[2] != len(self.tokens):
            pictures = WAN_STRIDE * (len(self.tokens) - 1) + 1
            raise ValueError(
                f"{self.node_id}: the film has {len(self.tokens)} latent frames ({pictures} pictures) and the latent "
                f"{run.latent_shape[2]}; make them equal."
            )
        check_roles(run)

    def plan(self, run, call, layout: Layout, plan) -> bool:
        grid = layout.grid
        items = families.window_items(call.window, grid[0], 2)
        query = torch.full((plan.q.shape[2],), ANY)
        query[layout.image] = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
        frames = torch.arange(grid[0]).repeat_interleave(self.tokens.shape[1])
        name = ("motion", grid, layout.image.start, len(query), len(frames))
        pairs = [self._project(run, layout.layer, WITH_PICTURE[entry.role], plan.q) for entry in layout.entries]
        rows = [
            [(x[list(items)] if len(x) > 1 else x.expand(grid[0], -1, -1)).flatten(0, 1) for x in pair]
            for pair in pairs
        ]
        k, v = (
            split_heads(torch.stack(part).repeat_interleave(layout.chunk_size, 0), plan.q.shape[1])
            for part in zip(*rows, strict=True)
        )
        plan.extra.append(frame_branch(k, v, frames, query, self.strength, name))
        return True

    def _project(self, run, layer, shown: bool, q: Tensor) -> tuple[Tensor, Tensor]:
        kept, key = run.state[self], (layer, shown, q.device, q.dtype)
        if key not in kept:
            tokens = (self.tokens if shown else self.blank).to(q)
            kept[key] = self.adapter.network.project(self.index[layer], tokens)
        return kept[key]
