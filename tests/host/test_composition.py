"""Storyweft blocks together on one MODEL: the laws of the house for every pair, and what the formulas say of some."""

import itertools

import comfy.model_management
import comfy.model_patcher
import pytest
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

ROWS, STEPS = 2, 2
BLOCKS = {
    "sd15": ("style", "consistent", "board", "masked", "subject"),
    "sdxl": ("style", "consistent", "board", "masked", "subject"),
    "svd": ("style", "consistent", "masked", "subject"),
    "flux": ("style", "consistent", "board", "masked"),
    "qwen_image": ("style", "consistent", "board", "masked"),
    "sd3": ("consistent", "board", "masked"),
    "wan": ("consistent", "board", "masked"),
}
PAIRS = [(name, pair) for name, blocks in BLOCKS.items() for pair in itertools.combinations(blocks, 2)]
BOXES = BoxRegions(torch.tensor([[(0.1, 0.2, 0.5, 0.9), (0.3, 0.2, 0.7, 0.9)]]).double())


def consistent(patcher, neutral=False):
    rate = 0.0 if neutral else 0.5
    return ConsistentRule(ConsistentOptions(rate=rate, share_early=1.0, share_late=1.0, first_step=0), "all")


def style(patcher, neutral=False, **options):
    return StyleRule(StyleOptions(only_self_level=1.0, share_group_norm=False) if neutral else StyleOptions(**options))


def masked(patcher, neutral=False, **options):
    settings = {"part": 0.0 if neutral else 1.0, "cross": not families.find(patcher, "test").time_layers} | options
    return MaskedRule(BOXES, MaskedOptions(**settings), 4)


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
    """The second and third token of every caption name the object."""
    return Words((NOBODY, 1, 1, *[0] * (length - 3)) * captions, (0, 1), captions == 1)


def inputs(patcher, name, frames=0):
    """frames: of the board whose captions are the prompt; 0 gives each row a prompt of its own."""
    length = tiny.FAMILIES[name].text[0]
    negative, start = tiny.conditioning(name, 1, 2), tiny.latent(name, ROWS)
    if not frames:
        marks = {} if name == "svd" else {KEY: words(length)}
        return tiny.conditioning(name, ROWS, 1, marks=marks), negative, start
    shape = BoardShape(1, frames)
    of = Board(shape, (tiny.SIZE[0], tiny.SIZE[1] // frames), ("",) * frames, (True,) * frames)
    (text, extras), = tiny.conditioning(name, frames, 1)
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


def drawn(patcher, given, *rules, **more):
    return tiny.sample(with_rules(patcher, *rules), *given, steps=STEPS, **more)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def models():
    made = {}

    def model(name):
        if name not in made:
            made[name] = tiny.build(name)
        return made[name]

    return model


@pytest.fixture(scope="module")
def sd15(models):
    return models("sd15")


@pytest.fixture
def split(monkeypatch):
    """Called, it makes core run cond and uncond in calls of their own, as it does when memory is short."""
    return lambda: monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)


def stopped(step, x0, x, total):
    raise comfy.model_management.InterruptProcessingException


def check_laws(patcher, given, names, split):
    made = {name: MAKE[name](patcher) for name in names}
    model = with_rules(patcher, *made.values())
    both = tiny.sample(model, *given, steps=STEPS)
    assert both.isfinite().all()
    assert torch.equal(drawn(patcher, given, *reversed(made.values())), both)
    for name in names:
        assert apart(drawn(patcher, given, *(made[other] for other in names if other != name)), both) > 1e-5, name
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(model, *given, steps=STEPS, callback=stopped)
    torch.manual_seed(99)
    assert torch.equal(tiny.sample(model, *given, steps=STEPS), both)
    split()
    assert apart(tiny.sample(model, *given, steps=STEPS), both) < 2e-5


@pytest.mark.parametrize(("name", "pair"), PAIRS)
def test_of_two_blocks_both_act_in_any_order_in_split_calls_and_after_an_interrupted_run(models, name, pair, split):
    check_laws(models(name), inputs(models(name), name, 2 * ("board" in pair)), pair, split)


@pytest.mark.parametrize("frames", [0, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_all_blocks_of_a_family_together_keep_the_same_laws(models, name, frames, split):
    if not frames or "board" in BLOCKS[name]:
        names = [block for block in BLOCKS[name] if frames or block != "board"]
        check_laws(models(name), inputs(models(name), name, frames), names, split)


@pytest.mark.parametrize(("name", "pair"), PAIRS)
def test_a_neutral_block_beside_an_acting_one_changes_nothing(models, name, pair):
    patcher = models(name)
    for acting, idle in (pair, pair[::-1]):
        frames = 1 if idle == "board" else 2 * (acting == "board")  # a board of one frame is an ordinary prompt
        given, rule = inputs(patcher, name, frames), MAKE[acting](patcher)
        alone = drawn(patcher, given, rule)
        assert torch.equal(drawn(patcher, given, rule, MAKE[idle](patcher, neutral=True)), alone), idle
