"""Consistent Self-Attention as a rule of the host seam: who shares with whom in one attention call, and what is kept.

Panels that only name one character and come first write; every panel naming it reads. A character with a bank is read
from there and no longer written. Rows of an unmarked conditioning all show one nameless character and all write.
"""

import functools
import logging
import math

import torch
from torch import Tensor

from ..attention.consistent import ConsistentOptions, draw_tokens, share_layers, window_attention
from ..attention.core import split_heads
from ..attention.joined import Piece
from . import bank
from .layout import Layer, Layout
from .rule import Rule

FEW_STEPS = 10  # below it the first, unshared step settles much of a picture
PATHS = {
    "output path": ("output",),
    "middle and output path": ("middle", "output"),
    "all": ("input", "middle", "output"),
}


class ConsistentRule(Rule):
    """See the module; `layers` is a key of PATHS, `sigma_range` (high, low) bounds the steps at which it acts."""

    node_id = "StoryweftConsistentSelfAttention"
    kinds = frozenset({"self"})

    def __init__(
        self,
        options: ConsistentOptions,
        layers: str,
        sigma_range=(math.inf, 0.0),
        characters=(),
        recorder=None,
        draws=None,
    ):
        self.options = options
        self.draws = draws or Draws(options)
        self.layers = layers
        self.sigma_range = sigma_range
        self.characters = {character.name: character for character in characters}
        self.recorder = recorder
        self.neutral = options.rate == 0 and not self.characters and recorder is None

    def changed(self, **changes) -> "ConsistentRule":
        """The same rule with other `characters` or another `recorder`."""
        kept = {"characters": self.characters.values(), "recorder": self.recorder} | changes
        return ConsistentRule(self.options, self.layers, self.sigma_range, draws=self.draws, **kept)

    def start(self, run) -> "State":
        return State(self, run)

    def begin(self, run) -> None:
        entries = run.listed
        panels = next((entry.panels for entry in entries if entry.panels is not None), None)
        if panels is not None and len(panels) != run.latent_shape[0]:
            raise ValueError(
                f"{self.node_id}: the latent holds {run.latent_shape[0]} pictures and the conditioning {len(panels)} "
                f"panels; set the latent's batch_size to {len(panels)}."
            )
        for character in self.characters.values():
            bank.check(character, run, self.node_id)
        steps = len(run.sigmas) - 1
        if self.options.first_step and steps < FEW_STEPS:
            logging.warning(
                "%s: %d steps are few for the published numbers, which let step %d pass unshared; set first_step 0 and "
                "share_early 1.",
                self.node_id,
                steps,
                self.options.first_step,
            )
        if self.options.window:
            self._check_window(run, entries)
            others = [rule.node_id for rule in run.rules if rule is not self and "self" in rule.kinds]
            if others:
                raise ValueError(
                    f"{self.node_id}: window is {self.options.window} and cannot be joined with {', '.join(others)}; set it to 0."
                )

    def _check_window(self, run, entries) -> None:
        if not run.family.picture_only:
            raise ValueError(f"{self.node_id}: window is {self.options.window} and works on U-Nets only; set it to 0.")
        for entry in entries:
            panels = entry.panels or range(run.latent_shape[0])
            alone = all(len(rows) == len(panels) for rows in self.cast(entry, list(panels)).values())
            if self.characters or not alone:
                raise ValueError(
                    f"{self.node_id}: window is {self.options.window}, which needs one character that every panel of the batch "
                    "defines; set it to 0, or id_panels to the number of panels and recall nobody."
                )

    def covers(self, layer: Layer) -> bool:
        return layer.path in PATHS[self.layers]

    def wants(self, layer: Layer, run) -> bool:
        high, low = self.sigma_range
        return layer.kind == "self" and self.covers(layer) and low <= run.sigma <= high

    def expected(self, run) -> bool:
        """Whether this run shows a character that it does not only write down."""
        if self.recorder is not None and self.recorder.pieces:
            return False
        return any(self.names(entry, panel) for entry in run.listed for panel in entry.panels or (0,))

    def idle_reason(self, run) -> str:
        if run.latent_shape[0] < 2 and not self.characters:
            return "the batch holds one picture, so there is nobody to share with."
        if self.characters:
            return f"no panel of it names a recalled character ({', '.join(self.characters)}), or no step lies in its range."
        if not any(writers for entry in run.listed for writers in self.cast(entry, list(entry.panels or (0, 1))).values()):
            return "none of its panels is an id panel of the characters they name; draw the id panels in the same batch."
        return "no step of this run lies in its range, or its rates are 0."

    def plan(self, run, call, layout: Layout, plan) -> bool:
        state = run.state[self]
        shares = state.shares(run.evaluation, layout.layer)
        seen = [[] for _ in plan.seen]
        for chunk in range(len(layout.entries)):
            if shares:
                self._share_live(state, run, call, layout, chunk, plan, seen)
            self._read_banks(run, layout, chunk, plan.q, seen)
        if not any(seen):
            return False
        if self.options.window and len(layout.items) > self.options.window:
            plan.compute = functools.partial(self._windows, state, run, layout)
            return True
        for row, pieces in enumerate(seen):
            whole = {piece.source for piece in plan.seen[row] if piece.index is None}  # each token counts once
            plan.seen[row] += [piece for piece in pieces if piece.source is None or piece.source not in whole]
        return True

    def _share_live(self, state, run, call, layout: Layout, chunk: int, plan, seen: list) -> None:
        entry, rows = layout.entries[chunk], layout.chunk_rows(chunk)
        panels = [layout.panel(chunk, row) for row in range(len(rows))]
        for name, writers in self.cast(entry, panels).items():
            if not writers:
                continue
            draws = [state.draw(run.evaluation, layout.grid, panels[row]) for row in writers]
            written = [rows[row] for row in writers]
            device, first = plan.k.device, layout.image.start
            pieces = [
                Piece(plan.k[row], plan.v[row], draw.nonzero().flatten().to(device) + first, row)
                for row, draw in zip(written, draws, strict=True)
            ]
            for row, panel in enumerate(panels):
                if name in self.names(entry, panel):
                    seen[rows[row]] += [piece for writer, piece in zip(writers, pieces, strict=True) if writer != row]
            if self.recorder is not None:
                key = bank.slot(run.evaluation, layout.layer, entry)
                for row, draw, piece in zip(written, draws, pieces, strict=True):
                    inputs = run.family.inputs(call)
                    kept = (
                        inputs[row, draw.to(device)]
                        if inputs is not None
                        else torch.stack([piece.tokens(x) for x in piece[:2]])
                    )
                    self.recorder.add(name, key, kept)

    def _read_banks(self, run, layout: Layout, chunk: int, q: Tensor, seen: list) -> None:
        entry = layout.entries[chunk]
        key = bank.slot(run.evaluation, layout.layer, entry)
        pieces = {}
        for name, character in self.characters.items():
            bank.check_entry(character, entry, self.node_id)
            tokens = character.tensors.get(key)
            if tokens is not None:
                pieces[name] = self._bank_piece(run, layout.layer, tokens.to(q.device, q.dtype), q.shape[1])
        for place, row in enumerate(layout.chunk_rows(chunk)):
            names = self.names(entry, layout.panel(chunk, place))
            seen[row] += [piece for name, piece in pieces.items() if name in names]

    @staticmethod
    def _bank_piece(run, layer: Layer, tokens: Tensor, heads: int):
        if tokens.ndim == 4:
            return Piece(tokens[0], tokens[1])
        k, v = run.family.project(layer, tokens[None])
        return Piece(split_heads(k, heads)[0], split_heads(v, heads)[0])

    def _windows(self, state, run, layout: Layout, q: Tensor, k: Tensor, v: Tensor, attend) -> Tensor:
        out = torch.empty_like(q)
        for chunk in range(len(layout.entries)):
            rows = layout.chunk_rows(chunk)
            part = slice(rows.start, rows.stop)
            draws = torch.stack(
                [state.draw(run.evaluation, layout.grid, layout.panel(chunk, row)) for row in range(len(rows))]
            )
            windows = draws.unfold(0, self.options.window, 1).transpose(1, 2)
            out[part] = window_attention(q[part], k[part], v[part], windows, attend)
        return out

    def names(self, entry, panel: int) -> tuple[str, ...]:
        """Characters that a panel shows; without a story every row shows every character there is."""
        if entry.story is None:
            return ("", *self.characters)
        return entry.story.panels[panel].characters

    def cast(self, entry, panels: list[int]) -> dict[str, list[int]]:
        """Character -> rows that write it in this call."""
        if entry.story is None:
            return {} if self.characters else {"": list(range(len(panels)))}
        return {
            name: [row for row, panel in enumerate(panels) if panel in ids]
            for name, ids in entry.story.id_panels.items()
            if name not in self.characters
        }


class Draws:
    """Decisions and draws as functions of the options' seed; anything with these two methods can be fed instead."""

    def __init__(self, options: ConsistentOptions):
        self.options = options

    def share(self, evaluation: tuple[int, int], layers: int) -> list[bool]:
        return share_layers(self.options, evaluation, layers)

    def tokens(self, evaluation: tuple[int, int], grid: tuple[int, ...], panel: int) -> Tensor:
        return draw_tokens(self.options, evaluation, grid, panel)


class State:
    """Decisions and draws of the evaluation at hand, kept because many layers ask for them."""

    def __init__(self, rule: ConsistentRule, run):
        self.draws = rule.draws
        chosen = [layer for layer in run.family.layers if rule.covers(layer)]
        self.place = {layer: index for index, layer in enumerate(chosen)}
        self._evaluation = None
        self._shares: list[bool] = []
        self._tokens: dict = {}

    def _at(self, evaluation) -> None:
        if evaluation != self._evaluation:
            self._evaluation = evaluation
            self._shares = self.draws.share(evaluation, len(self.place))
            self._tokens = {}

    def shares(self, evaluation, layer: Layer) -> bool:
        self._at(evaluation)
        return self._shares[self.place[layer]]

    def draw(self, evaluation, grid, panel: int) -> Tensor:
        self._at(evaluation)
        if (grid, panel) not in self._tokens:
            self._tokens[grid, panel] = self.draws.tokens(evaluation, grid, panel)
        return self._tokens[grid, panel]
