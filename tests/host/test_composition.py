"""Storyweft blocks together on one MODEL: the laws of the house for every pair, and what the formulas say of some."""

import dataclasses
import itertools
import math

import comfy.model_management
import comfy.model_patcher
import pytest
import tiny
import torch
from blocks import MAKE, apart, boxes, inputs, with_rules, words
from comfy.patcher_extension import WrappersMP
from storyweft.attention.core import split_heads
from storyweft.attention.style import adain
from storyweft.host import override
from storyweft.host.board import MARK
from storyweft.host.style import ReferenceRule, StyleReference
from storyweft.host.words import KEY
from storyweft.sampling.inversion import replay_index

ROWS, STEPS = 2, 2
BLOCKS = {
    "sd15": ("style", "consistent", "board", "masked", "motion", "subject", "fidelity"),
    "sdxl": ("style", "consistent", "board", "masked", "motion", "subject", "fidelity"),
    "svd": ("style", "consistent", "masked", "subject"),
    "flux": ("style", "consistent", "board", "masked"),
    "qwen_image": ("style", "consistent", "board", "masked"),
    "sd3": ("consistent", "board", "masked"),
    "wan": ("consistent", "board", "masked"),
}
BOARDS = ("board", "trained_board")
APART = {"board", "masked"}  # what a trained board refuses
PAIRS = [(name, pair) for name, blocks in BLOCKS.items() for pair in itertools.combinations(blocks, 2)]
PAIRS += [("sd15", (block, "trained_board")) for block in BLOCKS["sd15"] if block not in APART]
ROWS_OF_PROMPT = [("prompt_rows", block) for block in (*BLOCKS["sd15"], "trained_board") if block != "motion"]
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
    length = tiny.FAMILIES[name].text[0]
    kept = {key: value for key, value in extras.items() if key != MARK}
    return [[text, {**kept, KEY: words(length, text.shape[1] // length)}]], *given[1:]


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
    given = inputs(patcher, name, ROWS, 2 * any(block in BOARDS for block in names))
    made = {name: MAKE[name](patcher) for name in names}
    model = with_rules(patcher, *made.values())
    both = draw(model, given)
    assert both.isfinite().all()
    assert torch.equal(drawn(patcher, given, *reversed(made.values())), both)
    for block in names:
        others = [made[other] for other in names if other != block]
        rest = without_board(given, name) if block in BOARDS else given
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


@pytest.mark.parametrize("pair", ROWS_OF_PROMPT, ids="+".join)
def test_predicted_rows_of_the_prompt_act_beside_every_other_block(sd15, pair, split):
    check_laws(sd15, "sd15", pair, split)


@pytest.mark.parametrize("name", BLOCKS)
def test_all_blocks_of_a_family_together_keep_the_same_laws(models, name, split):
    check_laws(models(name), name, BLOCKS[name], split)


@pytest.mark.parametrize(("name", "pair"), PAIRS, ids=IDS)
def test_a_neutral_block_beside_an_acting_one_changes_nothing(models, name, pair):
    patcher = models(name)
    for acting, idle in (pair, pair[::-1]):
        frames = 1 if idle in BOARDS else 2 * (acting in BOARDS)  # a board of one frame is an ordinary prompt
        given, rule = inputs(patcher, name, ROWS, frames), MAKE[acting](patcher)
        alone = drawn(patcher, given, rule)
        assert torch.equal(drawn(patcher, given, rule, MAKE[idle](patcher, neutral=True)), alone), idle


@pytest.mark.parametrize("block", sorted(APART))
def test_a_trained_board_refuses_what_changes_the_same_branches_by_name(sd15, block):
    model = with_rules(sd15, MAKE["trained_board"](sd15), MAKE[block](sd15))
    with pytest.raises(ValueError, match="^StoryweftTrainedBoard: it cannot act beside Storyweft"):
        draw(model, inputs(sd15, "sd15", ROWS, 2))


def dense(q, k, v, seen):
    """One attention under a full mask [rows, queries, keys], the form that is never built outside tests."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])


def labels_of(layout):
    """Label of every token of both pictures, [rows, tokens]."""
    return boxes(ROWS).labels([[row] for row in range(ROWS)], *layout.grid[1:])


def self_attention(run, layout, rules, q, k, v):
    """Of each picture over all pictures of its guidance chunk."""
    if "style" in rules:
        q, k = adain(q, ROWS), adain(k, ROWS)
    labels, out = labels_of(layout), torch.empty_like(q)
    for chunk in range(len(layout.entries)):
        rows = slice(chunk * ROWS, (chunk + 1) * ROWS)
        drawn_tokens = [rules["consistent"].draws.tokens(run.evaluation, layout.grid, row) for row in range(ROWS)]
        seen = torch.zeros(ROWS, q.shape[2], ROWS, k.shape[2], dtype=torch.bool)
        for row in range(ROWS):
            for other in range(ROWS):
                whole = row == other or ("style" in rules and other == 0)
                seen[row, :, other] = True if whole else drawn_tokens[other]
                if "masked" in rules:
                    seen[row, :, other] &= labels[row][:, None] == labels[other]
        keys, values = (torch.cat(tuple(x[rows]), 1).expand(ROWS, -1, -1, -1) for x in (k, v))
        out[rows] = dense(q[rows], keys, values, seen.flatten(2))
    return out


def cross_attention(run, layout, rules, q, k, v):
    labels, out = labels_of(layout), torch.empty_like(q)
    captions = torch.arange(2).repeat_interleave(7)
    cells = (torch.arange(layout.grid[2]) >= layout.grid[2] // 2).long().repeat(layout.grid[1])
    for chunk, entry in enumerate(layout.entries):
        rows, board = slice(chunk * ROWS, (chunk + 1) * ROWS), entry.cond.get(MARK)
        keys, values, told = k[rows], v[rows], words(7)
        if board is not None:
            made = run.family.project(layout.layer, board.captions)
            keys, values = (split_heads(x, q.shape[1]).expand(ROWS, -1, -1, -1) for x in made)
            told = words(7, 2)
        elif "board" in rules:
            out[rows] = dense(q[rows], keys, values, torch.ones(1, 1, 7, dtype=torch.bool))  # another prompt
            continue
        its = labels[:, :, None] == torch.tensor(told.labels)
        out[rows] = dense(q[rows], keys, values, its)
        if board is not None:
            by_frame = dense(q[rows], keys, values, its & (cells[:, None] == captions))
            out[rows] = rules["board"].blend * out[rows] + (1 - rules["board"].blend) * by_frame
    if "subject" in rules:
        subject = rules["subject"]
        pictures = torch.cat([subject.tokens if e.role == "positive" else subject.blank for e in layout.entries])
        keys, values = (
            split_heads(x, q.shape[1]).repeat_interleave(ROWS, 0)
            for x in subject.adapter.network.project(subject.index[layout.layer], pictures)
        )
        out = 0.8 * out + 0.7 * torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    return out


@pytest.mark.parametrize("names", [
    ("consistent", "masked"), ("style", "consistent"), ("style", "consistent", "masked"),
    ("board", "masked"), ("masked", "subject"), ("board", "masked", "subject"),
])  # fmt: skip
def test_blocks_together_are_one_attention_as_the_formulas_say(sd15, names, monkeypatch):
    rules = {name: MAKE[name](sd15) for name in names}
    kind = "self" if "consistent" in names else "cross"
    plan_for, seen = override.make_plan, {}

    def watch(run, call, layout, wanting, attention):
        plan = plan_for(run, call, layout, wanting, attention)
        if layout.layer.kind == kind:
            formula = self_attention if kind == "self" else cross_attention
            expected = formula(run, layout, rules, *attention.tensors)
            seen[layout.layer] = max(seen.get(layout.layer, 0), apart(plan.run(attention, run.divisions), expected))
        return plan

    monkeypatch.setattr(override, "make_plan", watch)
    drawn(sd15, inputs(sd15, "sd15", ROWS, 2 * ("board" in names)), *rules.values())
    assert len(seen) == 7 and max(seen.values()) < 1e-5


def test_the_reference_picture_stays_whole_beside_known_frames(sd15):
    """Row 0 is the inverted picture in every evaluation and in the result; only other rows have the board's known frames."""
    positive, negative, _ = inputs(sd15, "sd15", ROWS, 2)
    mark = positive[0][1][MARK]
    of = dataclasses.replace(mark.board, targets=(False, True))
    positive[0][1][MARK] = dataclasses.replace(mark, board=of)
    generator = torch.Generator().manual_seed(3)
    start, trajectory = (torch.randn(n, 4, *tiny.SIZE, generator=generator) for n in (ROWS, STEPS + 1))
    sigmas = comfy.samplers.KSampler(sd15, STEPS, torch.device("cpu"), "euler", "normal", 1.0).sigmas.tolist()
    reference = StyleReference(trajectory, tuple(sigmas), 1.0, torch.randn(1, 4, *tiny.SIZE, generator=generator))
    rules, seen = (MAKE["board"](sd15), ReferenceRule(reference, 0)), []
    rules[0].clean = True

    def look(executor, x, t, *args, **kwargs):
        seen.append((float(t[0]), x[0].clone()))
        return executor(x, t, *args, **kwargs)

    for order in (rules, rules[::-1]):
        model = with_rules(sd15, *order)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
        out = tiny.sample(model, positive, negative, start, steps=STEPS, noise_mask=of.mask()[None])
        known = of.mask() == 0
        assert torch.equal(out[0], reference.latent[0])
        assert torch.equal(out[1, :, known], start[1, :, known])
    for sigma, first in seen:
        state = trajectory[replay_index(min(range(STEPS), key=lambda n: abs(sigmas[n] - sigma)), 0)]
        torch.testing.assert_close(first, state * math.hypot(sigma, 1.0))


@pytest.mark.parametrize("name", BLOCKS["sd3"])
def test_second_attention_of_sd35_holds_no_words(name, monkeypatch):
    """Layers over the picture alone stand beside joint ones; every block knows both."""
    family = tiny.FAMILIES["sd3"]
    settings = family.settings | {"x_block_self_attn_layers": [0]}
    monkeypatch.setitem(tiny.FAMILIES, "sd3", family._replace(settings=settings))
    model = tiny.build("sd3")
    given = inputs(model, "sd3", ROWS, 2 * (name == "board"))
    assert apart(drawn(model, given, MAKE[name](model)), drawn(model, given)) > 1e-4
