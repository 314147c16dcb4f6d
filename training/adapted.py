"""The image branch of an adapter in a U-Net as trainers call it: what AdaptivePromptRule adds, differentiable."""

from pathlib import Path

from .picture_model import PictureModel  # brings ComfyUI

from storyweft.host import families  # isort: skip
from storyweft.host.image_adapter import LoadedAdapter, check_family, read  # isort: skip
from storyweft.host.unet import UNetFamily  # isort: skip
from storyweft.models.ip_adapter import ImageAdapter, build, in_file_order  # isort: skip


def read_adapter(path: Path, base: PictureModel, option: str = "--adapter-file") -> ImageAdapter:
    """The adapter of a file, float32 and frozen. Raises ValueError, naming the option, for one that is not for the model."""
    if not path.is_file():
        raise ValueError(f"{option} is {path} and there is no such file")
    adapter = build(read(str(path), option), f"{option} {path.name}").float()
    check_family(LoadedAdapter(path.name, adapter), families.find(base.model, option), option)
    return adapter


class Adapted:
    """The frozen U-Net with an image branch, weight `scale`, added to each cross-attention."""

    def __init__(self, unet, adapter: ImageAdapter):
        self.unet, self.adapter = unet, adapter
        family = UNetFamily(unet)
        self.layers = in_file_order(family.cross_layers)
        self.heads = [family.modules[layer].heads for layer in self.layers]

    def __call__(self, x, t, context, tokens, scale=1.0, alphas=None, **more):
        """alphas: a weight of the text's answer and one of the picture's for each layer, instead of 1 and scale."""

        def patch(index):
            text, image = (1.0, scale) if alphas is None else alphas[index]

            def attend(q, k, v, extra):
                def one(k, v):
                    a, b, c = (y.unflatten(-1, (self.heads[index], -1)).transpose(1, 2) for y in (q, k, v))
                    weights = (a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5).softmax(-1)
                    return (weights @ c).transpose(1, 2).flatten(2)

                return text * one(k, v) + image * one(*self.adapter.project(index, tokens.to(q)))

            return attend

        patches = {(layer.path, layer.block, layer.depth): patch(index) for index, layer in enumerate(self.layers)}
        return self.unet(x, t, context, transformer_options={"patches_replace": {"attn2": patches}}, **more)
