"""High-fidelity alignment (MagDiff, arXiv 2311.17338) as a rule: the subject's latents beside the noise.

The U-Net's first convolution gets the subject's pyramid as further input channels. A convolution is linear, so what the
new channels give is added to its output and the model's own weights stay as they are. The subject's latents carry no
noise and do not change, so this is computed once a run.
"""

import contextlib
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.ops
import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..models.ip_adapter import build as build_adapter
from ..models.magdiff import Alignment, build
from . import families
from .apa import WITH_PICTURE
from .demo import read_weights
from .image_adapter import LoadedAdapter
from .rule import Rule
from .unet import UNetFamily

NODE_ID = "StoryweftHighFidelityAlignment"
GUIDANCE = ("MagDiff", "amplified")


@dataclass(eq=False)
class LoadedAlignment:
    """An alignment with the name and metadata of its file, and the image adapter that was trained along, if one was."""

    name: str
    network: Alignment
    metadata: dict[str, str] = field(default_factory=dict)
    adapter: LoadedAdapter | None = None


def load(path: str, node_id: str) -> LoadedAlignment:
    """The alignment of a .safetensors file, float32. Raises ValueError for files of another kind."""
    name = Path(path).name
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return loaded(tensors, dict(metadata or {}), name, f"{node_id}: {name}")


def loaded(tensors: dict[str, Tensor], metadata: dict[str, str], name: str, source: str) -> LoadedAlignment:
    """The same of tensors that were read."""
    beside = {key: value for key, value in tensors.items() if key.startswith(("image_proj.", "ip_adapter."))}
    own = {key: value.float() for key, value in tensors.items() if key not in beside}
    adapter = LoadedAdapter(name, build_adapter(beside, source, comfy.ops.manual_cast)) if beside else None
    return LoadedAlignment(name, build(own, metadata, source), metadata, adapter)


def load_demo() -> LoadedAlignment:
    """The alignment of weights/ for the demo U-Net."""
    tensors, metadata = read_weights("magdiff", node_id="StoryweftLoadMagDiff")
    return loaded(tensors, metadata, "demo alignment", "demo alignment")


def with_alphas(adapter: LoadedAdapter | None, alignment: LoadedAlignment, node_id: str) -> LoadedAdapter:
    """The adapter, or the one trained along, with the alphas that were learned for it.

    Raises ValueError when there is none or it has another number of layers.
    """
    adapter = adapter or alignment.adapter
    if adapter is None:
        raise ValueError(
            f"{node_id}: {alignment.name} holds no image adapter; connect the image_adapter it was trained with."
        )
    alphas = [getattr(alignment.network, name).tolist() for name in ("alpha_text", "alpha_image")]
    layers = len(adapter.network.channels)
    if len(alphas[0]) != layers:
        raise ValueError(
            f"{node_id}: {alignment.name} has alphas of {len(alphas[0])} layers and {adapter.name} has {layers}; load the "
            "adapter it was trained with."
        )
    return replace(adapter, alphas=tuple(zip(*alphas, strict=True)))


def encode_scales(alignment: LoadedAlignment, vae, pictures: Tensor) -> list[Tensor]:
    """Latents of pictures [n, h, w, 3] at every scale of the pyramid, one picture at a time."""
    found = []
    for scale in alignment.network.scales:
        size = [max(8, round(side * scale / 8) * 8) for side in pictures.shape[1:3]]
        scaled = interpolate(pictures[..., :3].movedim(-1, 1), size=size, mode="bilinear", align_corners=False)
        found.append(torch.cat([vae.encode(one[None]) for one in scaled.movedim(1, -1)]))
    return found


def check_family(alignment: LoadedAlignment, model) -> None:
    """ValueError unless the first convolution of the model is the one the alignment was trained beside."""
    family = families.find(model, NODE_ID)
    if not isinstance(family, UNetFamily):
        raise ValueError(
            f"{NODE_ID}: {family.model_class} is no U-Net; use reference pictures of its own (ReferenceLatent, first frame)."
        )
    own, needed = tuple(first_convolution(model.model).weight.shape[:2]), tuple(alignment.network.conv_in.shape[:2])
    if own != needed:
        raise ValueError(
            f"{NODE_ID}: {alignment.name} was trained for a first convolution of {needed[1]} to {needed[0]} channels and the "
            f"model's has {own[1]} to {own[0]}; load the alignment of its family."
        )


def first_convolution(base):
    return base.diffusion_model.input_blocks[0][0]


class HighFidelityRule(Rule):
    """subject and blank: the subject's and black pictures' latents in the model's scale, [n or 1, channels, h_i, w_i] each.

    Of one subject the first frame of a clip gets the subject and all others the blank, unless every_frame. Guidance
    "MagDiff" shows the subject to all rows, "amplified" the blank to the negative's.
    """

    node_id = NODE_ID

    def __init__(
        self,
        alignment: LoadedAlignment,
        subject: list[Tensor],
        blank: list[Tensor],
        strength: float = 1.0,
        guidance: str = "MagDiff",
        every_frame: bool = False,
    ):
        self.alignment, self.subject, self.blank = alignment, subject, blank
        self.strength, self.guidance, self.every_frame = strength, guidance, every_frame
        self.neutral = strength == 0
        self.whole_batch = not every_frame

    def start(self, run) -> dict:
        """What is added, by whether the subject is shown."""
        return {}

    def begin(self, run) -> None:
        rows, size = run.latent_shape[0], tuple(run.latent_shape[-2:])
        target = self.alignment.network.scales.index(1.0)
        given = tuple(self.subject[target].shape[-2:])
        if given != size:
            raise ValueError(
                f"{self.node_id}: image is {given[1] * 8} x {given[0] * 8} and the latent {size[1] * 8} x {size[0] * 8} pixels; make "
                "them equal (vae_size of Subject)."
            )
        if len(self.subject[0]) not in (1, rows):
            raise ValueError(
                f"{self.node_id}: image holds {len(self.subject[0])} pictures and the latent {rows} rows; give one or {rows}."
            )
        for entry in run.listed:
            if entry.cond.get("area") is not None:
                raise ValueError(
                    f"{self.node_id}: a conditioning has an area, of which the subject's place is unknown."
                )
            if self.guidance == "amplified" and entry.role not in WITH_PICTURE:
                raise ValueError(
                    f"{self.node_id}: the guider has a list of conditionings named '{entry.role}', of which it is unknown whether "
                    "it shows the subject; set guidance to MagDiff."
                )

    def idle_reason(self, run) -> str:
        return "the first convolution was not called."

    @contextlib.contextmanager
    def around(self, run, call):
        hook = functools.partial(self._beside, run, call)
        handle = first_convolution(run.base).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _beside(self, run, call, convolution, arguments: tuple, out: Tensor) -> Tensor:
        run.acted[self] += 1
        added = []
        for entry in call.entries:
            shown = self.guidance == "MagDiff" or WITH_PICTURE[entry.role]
            made = self._made(run, shown, out)
            added.append(made[list(call.items)] if len(made) > 1 else made.expand(len(call.items), -1, -1, -1))
        return out + self.strength * torch.cat(added)

    def _made(self, run, shown: bool, like: Tensor) -> Tensor:
        """[rows or 1, width, h, w] for the rows of a chunk."""
        kept, key = run.state[self], (shown, like.device, like.dtype)
        if key not in kept:
            blank, rows = self.alignment.network(self.blank), run.latent_shape[0]
            if not shown:
                made = blank
            else:
                made = self.alignment.network(self.subject)
                if len(made) == 1 and rows > 1 and not self.every_frame:
                    made = torch.cat([made, blank.expand(rows - 1, -1, -1, -1)])
            kept[key] = made.to(like)
        return kept[key]
