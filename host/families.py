"""Which model families the seam knows, and how each finds its self-attention."""

import weakref

from .transformer import FORMS, TransformerFamily
from .unet import UNetFamily

UNETS = ("UNetModel", "VideoUNet")

_known = weakref.WeakKeyDictionary()  # diffusion model -> family, so that layers are listed once


def find(model, node_id: str):
    """The family of a MODEL. Raises ValueError naming the class when it is not supported."""
    diffusion_model = model.model.diffusion_model
    if diffusion_model not in _known:
        _known[diffusion_model] = _make(diffusion_model, node_id)
    return _known[diffusion_model]


def _make(diffusion_model, node_id: str):
    names = [base.__name__ for base in type(diffusion_model).__mro__]
    if set(names) & set(UNETS):
        family = UNetFamily(diffusion_model)
        if not family.layers:
            raise ValueError(f"{node_id}: this {family.model_class} has no self-attention, so there is nothing to act on.")
        return family
    form = next((FORMS[name] for name in names if name in FORMS), None)
    if form is not None:
        return TransformerFamily(diffusion_model, form)
    raise ValueError(
        f"{node_id}: {type(diffusion_model).__name__} models are not supported; it works on the U-Nets of SD1.5, SD2, SDXL "
        f"and SVD and, as an experiment, on {', '.join(FORMS)}."
    )


def window_items(window, rows: int, dim: int = 0) -> tuple[int, ...]:
    """Index, along the windowed dimension `dim` of the latents, of each of the `rows` that a model call got.

    A window along another dimension leaves them as they are.
    """
    if window is None:
        return tuple(range(rows))
    index = list(window.index_list)
    anchor = [window.causal_anchor_index] if rows == len(index) + 1 else []
    return tuple(anchor + index) if window.dim == dim else tuple(range(rows))
