"""CLIP's RN50: the image tower with attention pooling and the text transformer, in OpenAI's names (arXiv 2103.00020)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from ..attention.core import attend, merge_heads, split_heads
from .fused_attention import FusedAttention, causal


class Bottleneck(nn.Module):
    """Strides are average pools, after the 3x3 convolution and before the short way's."""

    def __init__(self, inside: int, planes: int, stride: int, operations):
        super().__init__()
        self.stride = stride
        self.conv1 = operations.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = operations.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = operations.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or inside != 4 * planes:
            self.downsample = nn.Sequential(
                operations.Conv2d(inside, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        if self.stride > 1:
            out, x = avg_pool2d(out, self.stride), avg_pool2d(x, self.stride)
        out = self.bn3(self.conv3(out))
        return relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """The mean of all places asks them and itself."""

    def __init__(self, side: int, width: int, heads: int, out: int, operations):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(side * side + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (operations.Linear(width, width) for _ in range(3))
        self.c_proj = operations.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x)
        q, k, v = (
            split_heads(p(y), self.heads) for p, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(merge_heads(attend(q, k, v)))[:, 0]


class ResNetTower(nn.Module):
    """Normalised pictures [n, 3, 224, 224] -> embeddings [n, out]."""

    def __init__(self, layers=(3, 4, 6, 3), width: int = 64, side: int = 224, heads: int = 32, out: int = 1024, operations=nn):
        super().__init__()
        sizes = (3, width // 2, width // 2, width)
        for number in (1, 2, 3):
            conv = operations.Conv2d(
                sizes[number - 1], sizes[number], 3, stride=2 if number == 1 else 1, padding=1, bias=False
            )
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(sizes[number]))
        inside = width
        for number, count in enumerate(layers, 1):
            planes, blocks = width * 2 ** (number - 1), []
            for index in range(count):
                blocks.append(Bottleneck(inside, planes, 2 if number > 1 and index == 0 else 1, operations))
                inside = 4 * planes
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(side // 32, inside, heads, out, operations)

    def forward(self, x: Tensor) -> Tensor:
        for number in (1, 2, 3):
            x = relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        x = avg_pool2d(x, 2)
        for number in (1, 2, 3, 4):
            x = getattr(self, f"layer{number}")(x)
        return self.attnpool(x)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int, operations):
        super().__init__()
        self.attn = FusedAttention(width, heads, operations)
        self.ln_1, self.ln_2 = operations.LayerNorm(width), operations.LayerNorm(width)
        names = (("c_fc", operations.Linear(width, 4 * width)), ("gelu", QuickGELU()))
        self.mlp = nn.Sequential(OrderedDict([*names, ("c_proj", operations.Linear(4 * width, width))]))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, *self.attn.project(seen), bias)
        return x + self.mlp(self.ln_2(x))


class TextBlocks(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, operations):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads, operations) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        bias = causal(x)
        for block in self.resblocks:
            x = block(x, bias)
        return x
