"""StoryGen's own weights: attn3 and norm4 of every transformer block of a U-Net (arXiv 2306.00973, published layout).

Published files are whole U-Nets: SD1.5's tensors and, for each site P (`down_blocks.0.attentions.0.transformer_blocks.0.`),
P attn3.to_q/to_k/to_v.weight [C, C], P attn3.to_out.0.weight and .bias, P norm4.weight and .bias.
"""

from collections.abc import Mapping

from torch import Tensor, nn

OWN = ("attn3.", "norm4.")
ENDINGS = (
    "attn3.to_q.weight",
    "attn3.to_k.weight",
    "attn3.to_v.weight",
    "attn3.to_out.0.weight",
    "attn3.to_out.0.bias",
    "norm4.weight",
    "norm4.bias",
)
FEW = 3  # names a message gives


class Attention(nn.Module):
    """Projections of an attention from C channels to `inner` and back; no bias but at the end."""

    def __init__(self, channels: int, inner: int, operations=nn, dtype=None, device=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.to_q, self.to_k, self.to_v = (operations.Linear(channels, inner, bias=False, **made) for _ in range(3))
        self.to_out = nn.Sequential(operations.Linear(inner, channels, **made))


class ImageAttention(nn.Module):
    """attn3 and norm4 of one site."""

    def __init__(self, channels: int, inner: int, operations=nn, dtype=None, device=None):
        super().__init__()
        self.attn3 = Attention(channels, inner, operations, dtype, device)
        self.norm4 = operations.LayerNorm(channels, eps=1e-5, dtype=dtype, device=device)


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The U-Net's tensors and StoryGen's own ones, the latter as site prefix -> ending -> tensor."""
    base, own = {}, {}
    for key, tensor in state.items():
        place = next((at for name in OWN if (at := key.find(f".{name}") + 1)), 0)
        if place:
            own.setdefault(key[:place], {})[key[place:]] = tensor
        else:
            base[key] = tensor
    return base, own


def sites(own: Mapping[str, Mapping[str, Tensor]], widths: Mapping[str, tuple[int, int]], source: str) -> dict:
    """Own tensors checked against a U-Net: site -> (ending -> tensor), for exactly the sites of `widths`.

    widths: site prefix -> (channels, width of one head). `source` names file and node in messages. Raises ValueError for
    missing and unknown tensors and for shapes that do not fit.
    """
    missing = [site + ending for site in widths for ending in ENDINGS if ending not in own.get(site, {})]
    total = len(widths) * len(ENDINGS)
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of StoryGen's {total} tensors are missing ({_some(missing)}); "
            f"{'it is no StoryGen file' if len(missing) == total else 'the file is not whole'}."
        )
    unknown = [site + ending for site in own for ending in own[site] if site not in widths or ending not in ENDINGS]
    if unknown:
        raise ValueError(f"{source}: {len(unknown)} tensors belong to no attention of this U-Net ({_some(unknown)}).")
    for site, (channels, head) in widths.items():
        inner = len(own[site]["attn3.to_q.weight"])
        expected = dict.fromkeys(ENDINGS[:3], (inner, channels)) | dict.fromkeys(ENDINGS[4:], (channels,))
        expected["attn3.to_out.0.weight"] = (channels, inner)
        for ending, shape in expected.items():
            found = tuple(own[site][ending].shape)
            if found != shape or inner % head:
                shape = (channels, channels) if inner % head else shape
                raise ValueError(f"{source}: {site}{ending} is {found} and the U-Net needs {shape}.")
    return {site: dict(own[site]) for site in widths}


def _some(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")
