"""What a Storyweft block registers on a MODEL: a rule, asked at fixed places of every sampling run.

Rules act in the order of ORDER, whatever the order of their nodes in the graph: alignment of queries and keys, then
shared tokens, then who may see whom, then the sum over text and picture branches.
"""

import contextlib

import torch
from torch import Tensor

ORDER = (
    "StoryweftAudioCaptionEmbedding",  # weights of words, there before anybody moves them
    "StoryweftStyleAligned",
    "StoryweftConsistentSelfAttention",
    "StoryweftBoard",
    "StoryweftFrameStoryCrossAttention",
    "StoryweftTrainedBoard",
    "StoryweftMaskedAttention",
    "StoryweftSemanticMotionPredictor",  # its rows join the prompt's, which alpha_text then weighs with them
    "StoryweftAdaptivePromptAlignment",
    "StoryweftReferenceAttention",  # this and the next add to what the text attention gives, all others' part in it included
    "StoryweftStoryGenGuider",
    "StoryweftHighFidelityAlignment",  # plans nothing: it adds to the first convolution
    "StoryweftStyleReference",  # plans nothing; its picture goes into the first row after all others had the latents
)


class Rule:
    """Base of all rules; a mechanism overrides what it needs.

    node_id names the block in every message. kinds are the kinds of layer (see Layer) it plans. `several` allows more
    than one rule of the node on a model. A `neutral` rule can never change anything and costs nothing.
    """

    node_id: str
    kinds: frozenset[str] = frozenset()
    several = False
    neutral = False
    whole_batch = False  # whether it needs all panels of a story in one batch, whose rows it counts

    def start(self, run):
        """State of one run, kept in run.state[self]."""
        return

    def finished(self, run) -> bool:
        """Whether the latents that the sampler was given need no sampling; they are then returned as they came."""
        return False

    def begin(self, run) -> None:
        """Check the run, once its conditionings are known and before the model is called. Raises ValueError."""

    def latents(self, run, x: Tensor) -> Tensor:
        """Latents that one evaluation starts from, [rows, channels, ...] in the sampler's scale."""
        return x

    def prepare(self, run, call, options: dict) -> None:
        """Add to `options`, the transformer_options of one model call (a copy of its own)."""

    def control(self, run, call, control: dict) -> dict:
        """Residuals of a ControlNet for one model call, lists of tensors [rows, ...]; returned, never written into."""
        return control

    def align(self, run, layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange q, k, v [rows, heads, tokens, dim] before positions are turned into them, where a family does that."""
        return q, k, v

    def around(self, run, call) -> contextlib.AbstractContextManager:
        """Context in which one model call runs."""
        return contextlib.nullcontext()

    def wants(self, layer, run) -> bool:
        """Whether the rule plans this layer at the run's present step."""
        return layer.kind in self.kinds

    def plan(self, run, call, layout, plan) -> bool:
        """Change the plan of one attention call (SelfPlan or CrossPlan); True if it was changed."""
        return False

    def result(self, run, latents: Tensor) -> Tensor:
        """What the sampler returned, in latent scale of the model."""
        return latents

    def expected(self, run) -> bool:
        """Whether the run gave the rule anything to act on."""
        return True

    def idle_reason(self, run) -> str:
        """Why it never acted, as the end of a sentence."""
        return "no step of this run lies in its range."


def fraction(node_id: str, name: str, value: float) -> float:
    """`value` if it is a number from 0 to 1 (NaN passes the host's own check); ValueError otherwise."""
    if not 0 <= value <= 1:
        raise ValueError(f"{node_id}: {name} is {value}; give a number from 0 to 1.")
    return value


def check_span(node_id: str, start_percent: float, end_percent: float) -> None:
    """ValueError naming the part that is no number from 0 to 1, or both when they are the wrong way round."""
    fraction(node_id, "start_percent", start_percent)
    fraction(node_id, "end_percent", end_percent)
    if start_percent > end_percent:
        raise ValueError(f"{node_id}: start_percent {start_percent} lies after end_percent {end_percent}; swap them.")


def step_range(model, node_id: str, start_percent: float, end_percent: float) -> tuple[float, float]:
    """(highest, lowest) sigma at which a block acts, from parts of the noise schedule (0 start, 1 end); see check_span."""
    check_span(node_id, start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    high = torch.inf if start_percent == 0 else float(sampling.percent_to_sigma(start_percent))
    return high, 0.0 if end_percent == 1 else float(sampling.percent_to_sigma(end_percent))
