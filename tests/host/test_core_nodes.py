"""Storyweft blocks beside the core nodes that people put on one MODEL: right in either order, or refused by name."""

from types import SimpleNamespace

import blocks
import comfy.hooks
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import tiny
import torch
from blocks import apart
from comfy_extras import (
    nodes_context_windows,
    nodes_easycache,
    nodes_freelunch,
    nodes_hypertile,
    nodes_nag,
    nodes_pag,
    nodes_sag,
    nodes_tomesd,
)
from storyweft.host import masked, override
from storyweft.host.layout import Entry
from test_consistent_nodes import control_net

ROWS = 3
RULES = {
    "style": blocks.style,
    "consistent": lambda patcher: blocks.consistent(patcher, layers="output path"),
    "board": blocks.board,
    "masked": lambda patcher: blocks.masked(patcher, frames=ROWS),
    "subject": blocks.subject,
}
FINE = {
    "freeu": lambda model: nodes_freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2),
    "freeu v2": lambda model: nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2),
    "pag": lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0),
    "sag": lambda model: nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0),
    "nag": lambda model: nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5),
    "easycache": lambda model: nodes_easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False),
    "context windows": lambda model: nodes_context_windows.ContextWindowsManualNode.execute(
        model, 2, 1, "standard_static", 1, False, "pyramid", 0, False, causal_window_fix=False
    ),
}
REGROUPING = {
    "hypertile": lambda model: nodes_hypertile.HyperTile.execute(model, 32, 2, 0, False),
    "tome": lambda model: nodes_tomesd.TomePatchModel.execute(model, 0.5),
}
REFUSED = {
    ("sag", "style"): "StoryweftStyleAligned: middle block 0.*nodes_sag",
    ("sag", "masked"): "StoryweftMaskedAttention: middle block 0.*nodes_sag",
    ("context windows", "style"): "StoryweftStyleAligned: a context window shows the model pictures",
} | {(node, rule): "HyperTile, ToMe" for node in REGROUPING for rule in ("style", "consistent", "masked")}
NODES = FINE | REGROUPING
BATCHED_ONLY = ("nag", "easycache", "tome")  # NAG needs both parts, EasyCache measures what it skips, ToMe draws anew each call
ALONE = ("board", "masked", "subject")  # blocks under which a picture does not look at the others of its batch


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def inputs(patcher, rule, size=(16, 16), seed=1):
    return blocks.inputs(patcher, "sd15", ROWS, 2 * (rule == "board"), size, seed)


def draw(model, given, **more):
    return tiny.sample(model, *given, **{"steps": 2} | more)


def unplanned(given):
    """The same prompt without what Storyweft nodes told about it."""
    (text, extras), = given[0]
    return [[text, {key: extras[key] for key in extras if not key.startswith("storyweft")}]], *given[1:]


def with_block(model, rule):
    return override.register(model, RULES[rule](model))


def patched(execute, model):
    """MODEL of a core node, whichever form its answer takes."""
    answer = execute(model)
    return answer[0] if isinstance(answer, tuple) else answer.args[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("node", NODES)
def test_a_block_and_a_core_node_work_together_in_either_order_or_are_refused(sd15, node, rule, monkeypatch):
    given, more = inputs(sd15, rule), {"steps": 3} if node == "easycache" else {}
    before, after = with_block(patched(NODES[node], sd15), rule), patched(NODES[node], with_block(sd15, rule))
    if (node, rule) in REFUSED:
        for model in (before, after):
            with pytest.raises(RuntimeError, match=REFUSED[node, rule]):
                draw(model, given)
        return
    both = draw(after, given, **more)
    assert apart(draw(before, given, **more), both) < 2e-5
    assert apart(draw(patched(NODES[node], sd15), unplanned(given), **more), both) > 1e-4
    block_alone = apart(draw(with_block(sd15, rule), given, **more), both)
    assert block_alone < 2e-5 if node == "context windows" and rule in ALONE else block_alone > 1e-5
    if node not in BATCHED_ONLY:
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
        assert apart(draw(before, given), both) < 2e-5


def test_a_layer_that_self_attention_guidance_answers_is_refused_by_name(sd15):
    model = override.register(sd15, blocks.consistent(sd15, layers="all"))
    with pytest.raises(RuntimeError, match=r"middle block 0.*nodes_sag"):
        draw(patched(FINE["sag"], model), inputs(sd15, "consistent"))


def test_one_evaluation_of_a_block_leaves_the_models_options_as_they_were(sd15):
    model = with_block(sd15, "consistent")
    before = {key: value for key, value in model.model_options["transformer_options"].items() if key != "patches"}
    draw(model, inputs(sd15, "consistent"))
    after = {key: value for key, value in model.model_options["transformer_options"].items() if key != "patches"}
    assert before == after


def changed(given, extras):
    """The positive with other extras in its entry."""
    (text, own), = given[0]
    return [[text, {**own, **extras}]], *given[1:]


@pytest.mark.parametrize("rule", RULES)
def test_control_nets_are_told_from_the_model_and_act_beside_a_block(sd15, rule, monkeypatch):
    given = inputs(sd15, rule, tiny.SIZE)
    steered = changed(given, {"control": control_net(0.5), "control_apply_to_uncond": True})
    model = with_block(sd15, rule)
    both = draw(model, steered)
    assert apart(both, draw(model, given)) > 1e-4
    assert apart(both, draw(sd15, unplanned(steered))) > 1e-4
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(draw(model, steered), both) < 2e-5


def lora(model):
    """LoRA weights, by key, for what every block looks at: keys of self and cross-attention."""
    out = {}
    for key, weight in model.model.diffusion_model.state_dict().items():
        if key.endswith("to_k.weight"):
            name, generator = f"diffusion_model.{key.removesuffix('.weight')}", torch.Generator().manual_seed(len(key))
            out[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            out[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3
    return out


def hooked(conditioning, weights):
    return comfy.hooks.set_hooks_for_conditioning(conditioning, comfy.hooks.create_hook_lora(weights, 1.0, 0.0))


@pytest.mark.parametrize("rule", RULES)
def test_a_lora_hook_on_all_conditionings_is_the_lora_on_the_model(sd15, rule):
    positive, negative, start = given = inputs(sd15, rule, tiny.SIZE)
    weights = lora(sd15)
    whole = comfy.sd.load_lora_for_models(sd15, None, weights, 1.0, 0.0)[0]
    usual = draw(with_block(whole, rule), given)
    by_hook = draw(with_block(sd15, rule), (hooked(positive, weights), hooked(negative, weights), start))
    assert apart(by_hook, usual) < 2e-5
    assert apart(draw(with_block(sd15, rule), given), usual) > 1e-4


def test_captions_of_one_board_with_and_without_a_hook_keep_their_own_weights(sd15):
    """Two entries of one prompt: what the hooked one made of the captions must not reach the other."""
    positive, negative, start = inputs(sd15, "board", tiny.SIZE)
    weights = lora(sd15)
    model, left = with_block(sd15, "board"), torch.zeros(1, *tiny.SIZE)
    left[:, :, :6] = 1
    split = [
        [[text, {**extras, "mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}] for text, extras in entries]
        for mask, entries in ((left, hooked(positive, weights)), (1 - left, positive))
    ]
    there, back = split[0] + split[1], split[1] + split[0]
    assert apart(draw(model, (there, negative, start)), draw(model, (back, negative, start))) < 2e-5


@pytest.mark.parametrize("rule", RULES)
def test_one_prompt_on_two_masks_that_fill_the_picture_is_the_prompt(sd15, rule):
    given = inputs(sd15, rule, tiny.SIZE)
    left = torch.zeros(1, *tiny.SIZE)
    left[:, :, :6] = 1
    halves = [changed(given, {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False})[0] for mask in (left, 1 - left)]
    model = with_block(sd15, rule)
    assert apart(draw(model, (halves[0] + halves[1], *given[1:])), draw(model, given)) < 2e-5


@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_for_an_area_is_drawn_with_the_block_or_refused(sd15, rule, monkeypatch):
    given = inputs(sd15, rule, tiny.SIZE)
    area = given[0] + changed(inputs(sd15, rule, tiny.SIZE, seed=9), {"area": (4, 6, 0, 4), "strength": 1.0})[0]
    model = with_block(sd15, rule)
    if rule in ("board", "masked"):
        with pytest.raises(ValueError, match=f"{override.rules_of(model)[0].node_id}.* has an area"):
            draw(model, (area, *given[1:]))
        return
    out = draw(model, (area, *given[1:]))
    assert apart(out, draw(sd15, (area, *given[1:]))) > 1e-4 and apart(out, draw(model, given)) > 1e-4
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(draw(model, (area, *given[1:])), out) < 2e-5


@pytest.mark.parametrize("rule", RULES)
def test_guiders_with_three_lists_give_what_the_usual_one_does(sd15, rule):
    positive, negative, start = given = inputs(sd15, rule, tiny.SIZE)
    model = with_block(sd15, rule)
    usual = draw(model, given)
    dual, perp = custom.Guider_DualCFG(model), perpneg.Guider_PerpNeg(model)
    dual.set_conds(positive, positive, negative)
    dual.set_cfg(3.0, 3.0)
    perp.set_conds(positive, negative, negative)
    perp.set_cfg(3.0, 1.0)
    noise = comfy.sample.prepare_noise(start, 0, list(range(ROWS)))
    steps = comfy.samplers.KSampler(model, 2, torch.device("cpu"), "euler", "normal", 1.0, model.model_options).sigmas
    for guider in (dual, perp):
        euler = comfy.samplers.sampler_object("euler")
        assert apart(guider.sample(noise, start, euler, steps, disable_pbar=True, seed=0), usual) < 2e-5


def test_words_of_the_positive_mask_negatives_only(sd15):
    """The second text of DualCFG is no negative, and its words are at other places."""
    run = SimpleNamespace(sigmas=[1.0, 0.0], latent_shape=tuple(tiny.latent("sd15", ROWS).shape))
    state = masked.State(RULES["masked"](sd15), run)
    state.fallback = ("positive", blocks.words(7))
    for role in ("negative", "empty_negative_prompt"):
        assert state.words_of(Entry(role, 0)) == blocks.words(7)
    assert state.words_of(Entry("middle", 0)) is None
