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
from storyweft.host.frame_rows import AdapterRows, PromptRows
from storyweft.host.frame_story import FrameStoryRule, prepare
from storyweft.host.image_adapter import LoadedAdapter, channels
from storyweft.host.magdiff import HighFidelityRule, LoadedAlignment
from storyweft.host.masked import MaskedOptions, MaskedRule
from storyweft.host.style import StyleRule
from storyweft.host.trained_board import LoadedBoard, TrainedBoardRule
from storyweft.host.words import KEY, Words
from storyweft.models.ip_adapter import ImageAdapter, Standard
from storyweft.models.magdiff import Alignment
from storyweft.models.story_board import ContextExtractor
from storyweft.models.trained_board import BoardModule
from storyweft.story.board import BoardShape

SCALES = (1.5, 1.25, 1.0)  # of a subject's pyramid


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


def trained_module(patcher, seed=3, frames=6):
    """A board module of the model's layers with open gates."""
    family = families.find(patcher, "test")
    layers = [family.modules[layer].to_k for layer in family.cross_layers]
    ctx = ContextExtractor(layers[0].in_features, 2, 1, 1, 3, 5, frames, 12, (4, 4))
    made = BoardModule(ctx, [layer.out_features for layer in layers], layers[0].in_features, 2, 2.0)
    tiny.fill(made, seed)
    for site in made.sites:
        site.gate.data.fill_(0.7)
    return LoadedBoard("tiny", made.requires_grad_(False))


def trained_board(patcher, neutral=False):
    """Neutral on a board of one frame: without its strength it is the frame branch alone."""
    return TrainedBoardRule(families.find(patcher, "test"), trained_module(patcher), 0.0 if neutral else 1.0)


def alignment(seed=4, layers=6, trained=True):
    """A pyramid alignment for a first convolution of 4 to 32 channels."""
    made = Alignment(layers, 32)
    if trained:
        tiny.fill(made, seed)
    return LoadedAlignment("tiny", made.requires_grad_(False))


def pyramid(seed, rows=1, size=tiny.SIZE):
    """Latents of a subject at every scale of the alignment."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, *(round(side * scale) for side in size), generator=generator) for scale in SCALES]


def fidelity(patcher, neutral=False):
    return HighFidelityRule(alignment(), pyramid(1), pyramid(2), 0.0 if neutral else 1.0)


def _adapted(rule, patcher, rows, text, image, **more):
    """An image adapter's branch: `rows` tokens' rows, alphas of text and image."""
    sizes, width = channels(families.find(patcher, "test"))
    network = ImageAdapter(Standard(24, width, 4), sizes)
    tiny.fill(network, 0)
    adapter, paths = LoadedAdapter("tiny", network.requires_grad_(False)), ("input", "middle", "output")
    alphas = layer_alphas(patcher, adapter, dict.fromkeys(paths, text), dict.fromkeys(paths, image))
    *tokens, blank = torch.randn(rows + 1, 1, 4, width, generator=torch.Generator().manual_seed(rows))
    return rule(adapter, torch.cat(tokens), blank, alphas, **more)


def subject(patcher, neutral=False, **more):
    return _adapted(AdaptivePromptRule, patcher, 1, *((1.0, 0.0) if neutral else (0.8, 0.7)), **more)


def motion(patcher, neutral=False, frames=2):
    """Other tokens for each of the frames."""
    return _adapted(AdapterRows, patcher, frames, 1.0, 0.0 if neutral else 0.6)


def prompt_rows(patcher, frames=2):
    """The same as further rows of each frame's prompt; without its rows it would be no block, so it has no neutral form."""
    _, width = channels(families.find(patcher, "test"))
    tokens = torch.randn(frames + 1, 3, width, generator=torch.Generator().manual_seed(5))
    return PromptRows(tokens[:-1], tokens[-1:])


MAKE = {
    "style": style, "consistent": consistent, "board": board, "trained_board": trained_board, "masked": masked,
    "motion": motion, "prompt_rows": prompt_rows, "subject": subject, "fidelity": fidelity,
}  # fmt: skip


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
