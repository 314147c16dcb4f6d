"""Adaptive prompts alignment as a rule of the host seam: an image branch beside the text branch of every cross-attention.

Which guidance row gets which tokens follows the guider's own lists, not places in the batch: with IP-Adapter's guidance
the negative's rows get the tokens of no picture, with MagDiff's all rows get those of the picture, which guidance then does
not amplify.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.apa import image_branch, scale_text
from ..attention.core import split_heads
from ..models.ip_adapter import in_file_order
from . import families
from .image_adapter import LoadedAdapter, check_family
from .layout import Layer, Layout
from .rule import Rule
from .unet import UNetFamily

NODE_ID = "StoryweftAdaptivePromptAlignment"
WITH_PICTURE = {"positive": True, "middle": True, "negative": False, "empty_negative_prompt": False}


def layer_alphas(
    model, adapter: LoadedAdapter, text: dict[str, float], image: dict[str, float], node_id: str = NODE_ID
):
    """(alpha_text, alpha_image) of every cross-attention layer: a number for each path, times learned ones if there are.

    Raises ValueError for models without cross-attention of a U-Net and adapters of another family.
    """
    family = families.find(model, node_id)
    if not isinstance(family, UNetFamily):
        raise ValueError(
            f"{node_id}: {family.model_class} is no U-Net: there are no image adapters for its attention. Use SD1.5, SDXL or "
            "a relative, or the model's own picture input."
        )
    if not family.cross_layers:
        raise ValueError(f"{node_id}: {family.model_class} has no cross-attention that it could act on.")
    check_family(adapter, family, node_id)
    layers = in_file_order(family.cross_layers)
    learned = adapter.alphas or ((1.0, 1.0),) * len(layers)
    return {
        layer: (text[layer.path] * own[0], image[layer.path] * own[1])
        for layer, own in zip(layers, learned, strict=True)
    }


class AdaptivePromptRule(Rule):
    """tokens [1 or frames, n, D], blank [1, n, D] and the layers' alphas of one subject; see the module.

    at_end: factors that both alphas reach, linearly, at the last step. mask [1 or frames, h, w] bounds the subject's region.
    """

    node_id = NODE_ID
    kinds = frozenset({"cross"})
    several = True

    def __init__(
        self,
        adapter: LoadedAdapter,
        tokens: Tensor,
        blank: Tensor,
        alphas: dict[Layer, tuple[float, float]],
        at_end: tuple[float, float] = (1.0, 1.0),
        sigma_range: tuple[float, float] = (math.inf, 0.0),
        guidance: str = "IP-Adapter",
        mask: Tensor | None = None,
    ):
        self.adapter, self.tokens, self.blank = adapter, tokens, blank
        self.alphas, self.at_end = alphas, at_end
        self.sigma_range, self.guidance, self.mask = sigma_range, guidance, mask
        self.whole_batch = max(len(tokens), 0 if mask is None else len(mask)) > 1
        self.index = {layer: index for index, layer in enumerate(alphas)}
        self.neutral = all(self._faded(layer, progress) == (1.0, 0.0) for layer in alphas for progress in (0.0, 1.0))

    def _faded(self, layer: Layer, progress: float) -> tuple[float, float]:
        return tuple(
            alpha * (1 + (end - 1) * progress) for alpha, end in zip(self.alphas[layer], self.at_end, strict=True)
        )

    def alphas_at(self, layer: Layer, run) -> tuple[float, float]:
        """alpha_text and alpha_image of a layer at the run's present step."""
        return self._faded(layer, run.step / max(len(run.sigmas) - 2, 1))

    def start(self, run) -> dict:
        """Keys and values by layer and rows, and masks by grid."""
        return {}

    def begin(self, run) -> None:
        frames = run.latent_shape[0]
        given = {"image": (len(self.tokens), "pictures")}
        if self.mask is not None:
            given["region"] = (len(self.mask), "masks")
            self._check_region(run.latent_shape[-2:])
        for name, (count, what) in given.items():
            if count not in (1, frames):
                raise ValueError(
                    f"{self.node_id}: {name} holds {count} {what} and the latent {frames} rows; give one or {frames}."
                )
        for entry in (entry for twins in run.entries.values() for entry in twins):
            self._with_picture(entry)

    def _check_region(self, latent: tuple[int, int]) -> None:
        height, width = self.mask.shape[-2:]
        if abs(height / width - latent[0] / latent[1]) > 1.01 * height / width / min(latent):
            raise ValueError(
                f"{self.node_id}: region is {width} x {height} and the picture {8 * latent[1]} x {8 * latent[0]}: another "
                "shape; draw the mask on a picture of that size."
            )

    def _with_picture(self, entry) -> bool:
        if self.guidance == "MagDiff":
            return True
        if entry.role not in WITH_PICTURE:
            raise ValueError(
                f"{self.node_id}: the guider has a list of conditionings named '{entry.role}', of which guidance "
                f"{self.guidance} cannot know whether it shows the picture; set guidance to MagDiff or use another guider."
            )
        return WITH_PICTURE[entry.role]

    def wants(self, layer: Layer, run) -> bool:
        high, low = self.sigma_range
        return layer.kind == "cross" and low <= run.sigma <= high and self.alphas_at(layer, run) != (1.0, 0.0)

    def plan(self, run, call, layout: Layout, plan) -> bool:
        text, image = self.alphas_at(layout.layer, run)
        for branches in plan.text:
            scale_text(branches, text)
        if image:
            k, v = self._keys(run, layout, plan.q)
            plan.extra.append(image_branch(slice(0, len(plan.q)), k, v, image, self._region(run, call, layout, plan.q)))
        return True

    def _keys(self, run, layout: Layout, q: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, n, dim] of this call, projected once a run."""
        pictures = tuple(self._with_picture(entry) for entry in layout.entries)
        kept, key = run.state[self], (layout.layer, pictures, layout.items, q.device, q.dtype)
        if key not in kept:
            found = {shown: self._project(kept, layout.layer, shown, q) for shown in set(pictures)}
            rows = []
            for shown in pictures:
                pair = found[shown]
                items = list(layout.items) if len(pair[0]) > 1 else [0] * len(layout.items)
                rows.append([x[items] for x in pair])
            kept[key] = tuple(torch.cat(part) for part in zip(*rows, strict=True))
        return kept[key]

    def _project(self, kept: dict, layer: Layer, shown: bool, q: Tensor) -> tuple[Tensor, Tensor]:
        key = (layer, shown, q.device, q.dtype)
        if key not in kept:
            tokens = (self.tokens if shown else self.blank).to(q)
            kept[key] = tuple(
                split_heads(x, q.shape[1]) for x in self.adapter.network.project(self.index[layer], tokens)
            )
        return kept[key]

    def _region(self, run, call, layout: Layout, q: Tensor) -> Tensor | None:
        """The mask on this layer's grid, [rows, tokens]; of entries with an area, the part that lies in it."""
        if self.mask is None:
            return None
        areas = tuple(self._area(run, call, entry) for entry in layout.entries)
        kept, key = run.state[self], (layout.grid, areas, layout.items, q.device, q.dtype)
        if key not in kept:
            items = list(layout.items) if len(self.mask) > 1 else [0] * len(layout.items)
            parts = [self._resized(run.latent_shape[-2:], area, layout.grid[1:])[items] for area in areas]
            kept[key] = torch.cat(parts).to(q)
        return kept[key]

    def _area(self, run, call, entry) -> tuple | None:
        """(height, width, top, left) of the part of the latent that this chunk shows, None for the whole."""
        size = tuple(call.shape[-2:])
        if size == tuple(run.latent_shape[-2:]):
            return None
        twins = run.entries.get(entry.cond.get("uuid"), [entry])
        areas = {tuple(twin.cond["area"]) for twin in twins if "area" in twin.cond}
        fitting = [area for area in areas if area[:2] == size]
        if len(fitting) != 1:
            raise ValueError(
                f"{self.node_id}: region cannot be placed on a part of {size} of the latent: {len(fitting)} areas of that size "
                "belong to its conditioning; give the areas different sizes or remove the region."
            )
        return fitting[0]

    def _resized(self, latent: tuple[int, int], area, grid: tuple[int, int]) -> Tensor:
        mask = self.mask
        if area is not None:
            height, width, top, left = area
            down, right = (side / whole for side, whole in zip(mask.shape[-2:], latent, strict=True))
            mask = mask[
                :, round(top * down) : round((top + height) * down), round(left * right) : round((left + width) * right)
            ]
        return interpolate(mask[:, None].float(), size=grid, mode="area").flatten(1)
