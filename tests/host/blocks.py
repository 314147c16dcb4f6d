"""Every Storyweft block as a rule for tiny models, and what their sampling is given, for tests of combinations."""

import tiny
import torch
from storyweft.attention.consistent import ConsistentOptions
from storyweft.attention.labels import BoxRegions
from storyweft.attention.masked import NOBODY
from storyweft.attention.style import StyleOptions
from storyweft.host import families, override
from storyweft.host.apa import AdaptivePromptRule, layer_alphas
from storyweft.host.board import MARK, Board, BoardText
from storyweft.host.consistent import ConsistentRule
from storyweft.host.frame_story import FrameStoryRule, prepare
from storyweft.host.image_adapter import LoadedAdapter, channels
from storyweft.host.masked import MaskedOptions, MaskedRule
from storyweft.host.style import StyleRule
from storyweft.host.words import KEY, Words
from storyweft.models.ip_adapter import ImageAdapter, Standard
from storyweft.story.board import BoardShape


def boxes(frames):
    """One object that goes to the right."""
    way = [0.1 + 0.4 * frame / frames for frame in range(frames)]
    return BoxRegions(torch.tensor([[(x, 0.2, x + 0.4, 0.9) for x in way]]).double())


def consistent(patcher, neutral=False, layers="all"):
    rate = 0.0 if neutral else 0.5
    return ConsistentRule(ConsistentOptions(rate=rate, share_early=1.0, share_late=1.0, first_step=0), layers)


def style(patcher, neutral=False, **options):
    return StyleRule(StyleOptions(only_self_level=1.0, share_group_norm=False) if neutral else StyleOptions(**options))


def masked(patcher, neutral=False, frames=2, **options):
    settings = {"part": 0.0 if neutral else 1.0, "cross": not families.find(patcher, "test").time_layers} | options
    return MaskedRule(boxes(frames), MaskedOptions(**settings), 4)


def board(patcher, neutral=False, blend=None):
    family = families.find(patcher, "test")
    return FrameStoryRule(family, (0.25 if "cross" in family.kinds else 0.0) if blend is None else blend)


def subject(patcher, neutral=False, **more):
    sizes, width = channels(families.find(patcher, "test"))
    network = ImageAdapter(Standard(24, width, 4), sizes)
    tiny.fill(network, 0)
    adapter, paths = LoadedAdapter("tiny", network.requires_grad_(False)), ("input", "middle", "output")
    alphas = layer_alphas(
        patcher, adapter, dict.fromkeys(paths, 1.0 if neutral else 0.8), dict.fromkeys(paths, 0.0 if neutral else 0.7)
    )
    tokens, blank = torch.randn(2, 1, 4, width, generator=torch.Generator().manual_seed(1))
    return AdaptivePromptRule(adapter, tokens, blank, alphas, **more)


MAKE = {"style": style, "consistent": consistent, "board": board, "masked": masked, "subject": subject}


def words(length, captions=1):
    """Two neighbouring tokens of every caption name the object, one place later in each."""
    labels = [(NOBODY, *[0] * n, 1, 1, *[0] * (length - 3 - n)) for n in range(captions)]
    return Words(sum(labels, ()), (0, 1), captions == 1)


def inputs(patcher, name, rows, frames=0, size=tiny.SIZE, seed=1):
    """frames: of the board whose captions are the prompt; 0 gives each row a prompt of its own."""
    length = tiny.FAMILIES[name].text[0]
    negative, start = tiny.conditioning(name, 1, 2), tiny.latent(name, rows, size)
    if not frames:
        marks = {} if name == "svd" else {KEY: words(length)}
        return tiny.conditioning(name, rows, seed, marks=marks), negative, start
    shape = BoardShape(1, frames)
    of = Board(shape, (size[0], size[1] // frames), ("",) * frames, (True,) * frames)
    (text, extras), = tiny.conditioning(name, frames, seed)
    if "pooled_output" in extras:
        extras["pooled_output"] = extras["pooled_output"][:1]
    text = text.reshape(1, frames * length, -1)
    mark = BoardText(of, text, torch.arange(frames).repeat_interleave(length))
    conditioning = [[text, {**extras, MARK: mark, KEY: words(length, frames)}]]
    return prepare(families.find(patcher, "test"), conditioning, None, "test"), negative, start


def with_rules(patcher, *rules):
    for rule in rules:
        patcher = override.register(patcher, rule)
    return patcher


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()
