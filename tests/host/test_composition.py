"""Storyweft blocks together on one MODEL: the laws of the house for every pair, and what the formulas say of some."""

import itertools

import comfy.model_management
import comfy.model_patcher
import pytest
import tiny
import torch
from blocks import MAKE, apart, inputs, masked, subject, with_rules, words
from storyweft.host import families, override
from storyweft.host.board import MARK
from storyweft.host.words import KEY

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
IDS = [f"{name}-{'+'.join(pair)}" for name, pair in PAIRS]


def draw(model, given, **more):
    """From half of the noise: SVD's first sigma is 700, where one rounding of the latents is 1e-4 of the picture."""
    return tiny.sample(model, *given, steps=STEPS, denoise=0.5, **more)


def drawn(patcher, given, *rules):
    return draw(with_rules(patcher, *rules), given)


def without_board(given, name):
    """What is given to the model when nobody brings in the captions: words for the prompt that stands for them."""
    (text, extras), = given[0]
    if MARK not in extras:
        return given
    captions = text.shape[1] // tiny.FAMILIES[name].text[0]
    return [[text, {**extras, KEY: words(tiny.FAMILIES[name].text[0], captions)}]], *given[1:]


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


def check_laws(patcher, name, names, split):
    given = inputs(patcher, name, ROWS, 2 * ("board" in names))
    made = {name: MAKE[name](patcher) for name in names}
    model = with_rules(patcher, *made.values())
    both = draw(model, given)
    assert both.isfinite().all()
    assert torch.equal(drawn(patcher, given, *reversed(made.values())), both)
    for block in names:
        others = [made[other] for other in names if other != block]
        rest = without_board(given, name) if block == "board" else given
        assert apart(drawn(patcher, rest, *others), both) > 1e-5, block
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, given, callback=stopped)
    torch.manual_seed(99)
    assert torch.equal(draw(model, given), both)
    split()
    assert apart(draw(model, given), both) < 2e-5


@pytest.mark.parametrize(("name", "pair"), PAIRS, ids=IDS)
def test_of_two_blocks_both_act_in_any_order_in_split_calls_and_after_an_interrupted_run(models, name, pair, split):
    check_laws(models(name), name, pair, split)


@pytest.mark.parametrize("name", BLOCKS)
def test_all_blocks_of_a_family_together_keep_the_same_laws(models, name, split):
    check_laws(models(name), name, BLOCKS[name], split)


@pytest.mark.parametrize(("name", "pair"), PAIRS, ids=IDS)
def test_a_neutral_block_beside_an_acting_one_changes_nothing(models, name, pair):
    patcher = models(name)
    for acting, idle in (pair, pair[::-1]):
        frames = 1 if idle == "board" else 2 * (acting == "board")  # a board of one frame is an ordinary prompt
        given, rule = inputs(patcher, name, ROWS, frames), MAKE[acting](patcher)
        alone = drawn(patcher, given, rule)
        assert torch.equal(drawn(patcher, given, rule, MAKE[idle](patcher, neutral=True)), alone), idle
