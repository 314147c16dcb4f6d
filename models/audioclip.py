"""AudioCLIP (arXiv 2106.13043, MIT): sounds, pictures and texts in one space of 1024 numbers, in its published layout.

The audio tower is a ResNeXt-50 with attention gates over a learned time-frequency bank. Always run it in evaluation mode: in
training mode its batch norms make an embedding depend on its neighbours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, max_pool2d, normalize, relu

from .clip_resnet import ResNetTower, TextBlocks
from .fbsp import BSplineBank, blackman_harris, decibels, frames, scaled

RATE = 44100  # Hz
WIDTH = 1024
GATES = ((3, 1), (1, 5), (3, 1), (1, 5), (3, 5))  # kernels (frequency, time) of the gates of layers 1-4 and of the pooling


class Gate(nn.Module):
    """How much of each channel of `size` places passes, [n, out, *size] in (0, 1), from what went into the layer."""

    def __init__(self, inside: int, out: int, kernel: tuple[int, int], operations):
        super().__init__()
        padding = tuple(side // 2 for side in kernel)
        self.conv_depth = operations.Conv2d(inside, inside, kernel, padding=padding, groups=inside)
        self.conv_point = operations.Conv2d(inside, out, 1)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor, size) -> Tensor:
        return self.bn(self.conv_point(self.conv_depth(adaptive_max_pool2d(x, tuple(size))))).sigmoid()


class Bottleneck(nn.Module):
    """ResNeXt block of 32 groups, 4 wide at 64 planes."""

    def __init__(self, inside: int, planes: int, stride: int, operations):
        super().__init__()
        self.conv1 = operations.Conv2d(inside, 2 * planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * planes)
        self.conv2 = operations.Conv2d(2 * planes, 2 * planes, 3, stride, 1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * planes)
        self.conv3 = operations.Conv2d(2 * planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or inside != 4 * planes:
            conv = operations.Conv2d(inside, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return relu(out + (x if self.downsample is None else self.downsample(x)))


class AudioTower(nn.Module):
    """Sounds [n, samples] in [-1, 1] at 44.1 kHz -> embeddings [n, 1024], not normalised."""

    def __init__(self, layers=(3, 4, 6, 3), n_fft: int = 2048, hop: int = 561, win: int = 1654, operations=nn):
        super().__init__()
        self.hop = hop
        self.register_buffer("window", blackman_harris(win))
        self.fbsp = BSplineBank(n_fft)
        self.conv1 = operations.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inside = 64
        for number, count in enumerate(layers, 1):
            planes, blocks = 64 * 2 ** (number - 1), []
            before = inside
            for index in range(count):
                blocks.append(Bottleneck(inside, planes, 2 if number > 1 and index == 0 else 1, operations))
                inside = 4 * planes
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.add_module(f"att{number}", Gate(before, inside, GATES[number - 1], operations))
        self.att5 = Gate(inside, inside, GATES[-1], operations)
        self.fc = operations.Linear(inside, WIDTH)

    def spectrum(self, wave: Tensor, authors_scale: bool = False) -> Tensor:
        """[n, 3, bins // 3, frames] in dB."""
        return decibels(self.fbsp(frames(scaled(wave, authors_scale), self.window, self.hop)))

    def forward(self, wave: Tensor, authors_scale: bool = False) -> Tensor:
        x = max_pool2d(relu(self.bn1(self.conv1(self.spectrum(wave, authors_scale)))), 3, 2, 1)
        for number in (1, 2, 3, 4):
            out = getattr(self, f"layer{number}")(x)
            x = out * getattr(self, f"att{number}")(x, out.shape[-2:])
        out = adaptive_avg_pool2d(x, 1)
        return self.fc((out * self.att5(x, (1, 1))).flatten(1))


class AudioClip(nn.Module):
    """All three towers with OpenAI's names for picture and text."""

    def __init__(self, operations=nn, audio=None, visual=None, text=(512, 12, 8, 49408, 77)):
        super().__init__()
        width, depth, heads, vocabulary, length = text
        self.audio = audio or AudioTower(operations=operations)
        self.visual = visual or ResNetTower(operations=operations)
        self.transformer = TextBlocks(width, depth, heads, operations)
        self.token_embedding = operations.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.ln_final = operations.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, WIDTH))
        self.logit_scale, self.logit_scale_ai, self.logit_scale_at = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def encode_audio(self, wave: Tensor, authors_scale: bool = False) -> Tensor:
        """Unit embeddings [n, 1024] of mono sounds [n, samples] in [-1, 1] at 44.1 kHz."""
        return normalize(self.audio(wave, authors_scale), dim=-1)

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Embeddings of pictures [n, 3, 224, 224] normalised with CLIP's mean and deviation."""
        return self.visual(pictures)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings of token ids [n, 77]; the end token has the greatest id."""
        x = self.token_embedding(tokens)
        x = self.ln_final(self.transformer(x + self.positional_embedding.to(x)))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection.to(x)

    @property
    def audio_image_scale(self) -> Tensor:
        return self.logit_scale_ai


def build(state: Mapping[str, Tensor], source: str, operations=nn) -> AudioClip:
    """AudioCLIP of a published file, loaded strictly. Raises ValueError naming the file for anything else."""
    for key in ("audio.fbsp.m", "audio.conv1.weight", "visual.attnpool.positional_embedding", "logit_scale_ai"):
        if key not in state:
            raise ValueError(f"{source} is no AudioCLIP model: it lacks {key} (first: {', '.join(list(state)[:3])}).")
    with torch.device("meta"):
        network = AudioClip(operations)
    own = network.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
    network.load_state_dict(state, assign=True)
    return network.train(False).requires_grad_(False)
