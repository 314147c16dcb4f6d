"""State of one sampling run: made when the guider starts, handed down in transformer_options, dropped at its end."""

import logging
from collections import Counter
from typing import Any

from .layout import Entry, Layer
from .plan import Divisions


def enclosing_step(sigmas: list[float], sigma: float) -> int:
    """Index of the schedule step that a model evaluation at `sigma` belongs to."""
    steps = sigmas[:-1]
    for step, start in enumerate(steps):
        if abs(start - sigma) <= 1e-4 * max(abs(start), 1e-9):
            return step
    return max(sum(start > sigma for start in steps) - 1, 0)


class Run:
    """One call of the guider. Rules keep what they need for its length in `state[rule]`.

    base is the host's model, start the latents that the sampler was given, in the model's latent scale as decoded, mask its
    denoise mask [rows, channels, ...] or None.
    """

    base: Any = None
    start: Any = None
    mask: Any = None

    def __init__(self, rules: tuple, family, latent_shape: tuple[int, ...], sigmas: list[float]):
        self.rules = rules
        self.family = family
        self.latent_shape = latent_shape
        self.sigmas = sigmas
        self.sigma = sigmas[0]
        self.step = 0
        self.visit = 0  # evaluations this step has had before this one
        self.entries: dict[Any, list[Entry]] = {}  # conditioning uuid -> entries; core gives an area's twin the same
        self.acted: Counter = Counter()
        self.reached: set[Layer] = set()  # layers whose attention came past the override
        self.bypassed: dict[Layer, str] = {}  # layers answered by somebody else's replace patch
        self.divisions = Divisions()
        self._visits: Counter = Counter()
        self.state = {rule: rule.start(self) for rule in rules}

    @property
    def evaluation(self) -> tuple[int, int]:
        return self.step, self.visit

    @property
    def listed(self) -> list[Entry]:
        """All conditioning entries of the present evaluation."""
        return [entry for twins in self.entries.values() for entry in twins]

    @property
    def first_evaluation(self) -> bool:
        return sum(self._visits.values()) == 1

    def begin_evaluation(self, sigma: float, conds: dict[str, list[dict]]) -> None:
        self.sigma = sigma
        self.step = enclosing_step(self.sigmas, sigma)
        self.visit = self._visits[self.step]
        self._visits[self.step] += 1
        self.entries = {}
        listed = [(role, index, cond) for role, entries in conds.items() for index, cond in enumerate(entries or ())]
        marked = next((cond for _, _, cond in listed if "storyweft_panels" in cond), {})
        for role, index, cond in listed:
            marks = cond if "storyweft_panels" in cond else marked  # a negative shows the panels of the positive
            entry = Entry(role, index, marks.get("storyweft_panels"), marks.get("storyweft_story"), cond)
            self.entries.setdefault(cond["uuid"], []).append(entry)
        if self.first_evaluation:
            for rule in self.rules:
                rule.begin(self)

    def chunk_entries(self, uuids: list, numbers: list[int]) -> tuple[Entry, ...]:
        """The entry of every guidance chunk of one model call, from its uuid; twins are told apart by list number."""
        found = [
            self.entries.get(uuid, [Entry(f"list {number}", 0)]) for uuid, number in zip(uuids, numbers, strict=True)
        ]
        roles = {number: entries[0].role for number, entries in zip(numbers, found, strict=True) if len(entries) == 1}
        chosen = []
        for number, entries in zip(numbers, found, strict=True):
            role = roles.get(number, ("positive", "negative")[number] if number < 2 else None)
            chosen.append(next((entry for entry in entries if entry.role == role), entries[0]))
        return tuple(chosen)

    def end_evaluation(self) -> None:
        if not self.reached and not self.bypassed and any(rule.kinds for rule in self.rules):
            raise RuntimeError(
                f"Storyweft: no attention of {self.family.model_class} came past the attention override, so "
                f"{self.names} cannot act; another pack replaced the override or the model runs its own attention."
            )
        for rule in self.rules:
            for layer, owner in self.bypassed.items():
                if layer not in self.reached and rule.wants(layer, self):
                    raise RuntimeError(
                        f"{rule.node_id}: {layer} is answered by the replace patch {owner}, which leaves the "
                        "attention override out; remove that node or choose layers it does not cover."
                    )

    def finish(self) -> None:
        """Say of every rule that never acted why, unless it had nobody to act on."""
        for rule in self.rules:
            if not self.acted[rule] and rule.expected(self):
                logging.warning(
                    "%s never acted on this run of %s: %s",
                    rule.node_id,
                    self.family.model_class,
                    rule.idle_reason(self),
                )

    @property
    def names(self) -> str:
        return ", ".join(rule.node_id for rule in self.rules)
