"""Reference attention: StoryGen's passes over noised references, answered by the model's own self-attention weights.

Training-free and not StoryGen: attn3 and norm4 are attn1 and norm1, features are normalised like the tokens attn1 knows, and
the residual counts once: h + a2 + strength a3. Only rows of the prompt look, so that guidance amplifies it.
"""

from typing import Any, NamedTuple

from .reference_pass import Reference
from .story_gen import ImageSites, ReferenceRule


class OwnAttention(NamedTuple):
    """A transformer block's self-attention where an image attention is expected."""

    attn3: Any
    norm4: Any


class ReferenceAttentionRule(ReferenceRule):
    """blocks: (path, block, depth) -> transformer block of the U-Net."""

    node_id = "StoryweftReferenceAttention"

    def __init__(self, blocks: dict, references: tuple[Reference, ...], stage: str, noise, strength: float):
        own = {site: block for site, block in blocks.items() if not block.disable_self_attn}
        modules = {site: OwnAttention(block.attn1, block.norm1) for site, block in own.items()}

        def of_any(diffusion_model) -> dict:
            return modules

        heads = {site: block.attn1.dim_head for site, block in own.items()}
        super().__init__(ImageSites(of_any, heads, False, True), references, None, stage, noise, strength)
