"""AnimateDiff-Evolved: its motion modules call attention by themselves, past the override.

The pack runs each module through a handler in `forward_timestep_embed_patch`, the first whose class fits. Ours stands
before it and passes the module the additive mask that its forward takes and hands on to its temporal attentions.
"""

import torch
from torch import Tensor

MODULE = "VanillaTemporalModule"
SLOT = "forward_timestep_embed_patch"


def mask_motion_modules(rule, run, call, options: dict) -> bool:
    """Put the masking handler of `rule` first in `options`, a copy; False when the model has no such modules."""
    patches = options.get("patches", {})
    handlers = patches.get(SLOT, [])
    theirs = next((pair for pair in handlers if pair[0].__name__ == MODULE), None)
    if theirs is None:
        return False
    if rule.options.temporal:
        options["patches"] = {**patches, SLOT: [(theirs[0], MotionMask(rule, run, call, theirs[1])), *handlers]}
    return True


class MotionMask:
    """Handler of one model call; `theirs` is AnimateDiff-Evolved's own."""

    def __init__(self, rule, run, call, theirs):
        self.rule, self.run, self.call, self.theirs = rule, run, call, theirs

    def __call__(self, layer, x: Tensor, emb, context, transformer_options: dict, *args, **kwargs) -> Tensor:
        state = self.run.state[self.rule]
        if self.run.sigma <= state.until or (self.rule.options.layers != "all" and layer.block_type == "down"):
            return self.theirs(layer, x, emb, context, transformer_options, *args, **kwargs)
        views = layer.view_options
        if views is not None and views.context_length <= layer.video_length:
            raise ValueError(
                f"{self.rule.node_id}: AnimateDiff-Evolved's view options ({views.context_length} frames) split the frames of "
                "its motion modules; remove them, context options are fine."
            )
        mask = self.mask(state, x)
        if mask is None:
            return self.theirs(layer, x, emb, context, transformer_options, *args, **kwargs)
        self.run.acted[self.rule] += 1
        return layer(x, context, attention_mask=mask, transformer_options=transformer_options)

    def mask(self, state, x: Tensor) -> Tensor | None:
        """Logit offsets [rows·height·width, frames, frames], None when no place changes its label."""
        height, width = x.shape[-2:]
        labels = state.frame_labels(self.call.items, height, width).T  # [places, frames]
        if not (labels != labels[:, :1]).any():
            return None
        apart = (labels[:, :, None] != labels[:, None]).to(x.device)
        mask = torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill_(apart, torch.finfo(x.dtype).min)
        return mask.repeat(len(x) // len(self.call.items), 1, 1)
