"""Consistent Self-Attention inside ComfyUI: the laws of the house on tiny models of every family."""

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as nodes
import pytest
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from storyweft.attention.consistent import ConsistentOptions
from storyweft.host import bank, families, override
from storyweft.host.consistent import ConsistentRule
from storyweft.host.run import enclosing_step
from storyweft.story.script import parse_script

ALWAYS = ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0)
ROWS = 3


def shared(patcher, options=ALWAYS, layers="output path", **more):
    return override.register(patcher, ConsistentRule(options, layers, **more))


def inputs(name, rows=ROWS):
    return tiny.conditioning(name, rows, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def split(monkeypatch):
    """Makes core run cond and uncond in calls of their own, as it does when memory is short."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)


def test_it_acts_on_every_family_and_rate_zero_is_bit_identical(name, patcher):
    plain = tiny.sample(patcher, *inputs(name))
    assert torch.equal(plain, tiny.sample(shared(patcher, ConsistentOptions(rate=0.0)), *inputs(name)))
    assert apart(tiny.sample(shared(patcher), *inputs(name)), plain) > 1e-4
    assert torch.equal(plain, tiny.sample(patcher, *inputs(name)))


def test_cond_and_uncond_in_calls_of_their_own_change_nothing(name, patcher, monkeypatch):
    together = tiny.sample(shared(patcher), *inputs(name))
    split(monkeypatch)
    assert apart(tiny.sample(shared(patcher), *inputs(name)), together) < 2e-5


def test_the_same_graph_twice_gives_the_same_and_global_randomness_is_not_touched(name, patcher):
    model = shared(patcher)
    first = tiny.sample(model, *inputs(name))
    torch.manual_seed(99)
    assert torch.equal(first, tiny.sample(model, *inputs(name)))


def test_a_text_prompt_of_a_panel_stays_its_own(name, patcher):
    """Changing panel 2's prompt changes panel 0 only through sharing: not at all without the block."""
    if name == "svd":
        return  # its frames are one video and look at each other in its temporal layers anyway
    positive, negative, start = inputs(name)
    other = [[positive[0][0].clone(), positive[0][1]]]
    other[0][0][2] += 1
    assert (
        apart(tiny.sample(patcher, other, negative, start)[:2], tiny.sample(patcher, positive, negative, start)[:2])
        < 2e-5
    )
    changed = tiny.sample(shared(patcher), other, negative, start)[:2]
    assert apart(changed, tiny.sample(shared(patcher), positive, negative, start)[:2]) > 1e-6


def test_rows_share_within_their_guidance_chunk_only(sd15):
    """A second negative row order, cfg 1 and two positives: the panels of the positive come out the same."""
    positive, negative, start = inputs("sd15")
    model = shared(sd15)
    alone = tiny.sample(model, positive, negative, start, cfg=1.0)
    assert apart(tiny.sample(model, positive, tiny.conditioning("sd15", 1, 77), start, cfg=1.0), alone) < 2e-5
    twice = tiny.sample(model, [*positive, *positive], negative, start)
    assert apart(twice, tiny.sample(model, positive, negative, start)) < 2e-5


def test_dual_cfg_with_other_numbers_for_the_same_roles(sd15):
    positive, negative, start = inputs("sd15")
    model = shared(sd15)
    guider = nodes.Guider_DualCFG(model)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(3.0, 3.0)
    ks = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal", 1.0, model.model_options)
    noise = comfy.sample.prepare_noise(start, 0, list(range(ROWS)))
    out = guider.sample(noise, start, comfy.samplers.sampler_object("euler"), ks.sigmas, disable_pbar=True, seed=0)
    assert apart(out, tiny.sample(model, positive, negative, start)) < 2e-5


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "uni_pc"])
def test_samplers_with_several_evaluations_a_step_run_and_repeat(sd15, sampler):
    first = tiny.sample(shared(sd15), *inputs("sd15"), sampler=sampler)
    assert torch.equal(first, tiny.sample(shared(sd15), *inputs("sd15"), sampler=sampler))


def test_steps_come_from_sigmas():
    sigmas = [10.0, 5.0, 2.0, 0.0]
    assert [enclosing_step(sigmas, s) for s in (10.0, 7.0, 5.0001, 4.9, 2.0, 1.0, 12.0)] == [0, 0, 1, 1, 2, 2, 0]


def test_an_area_entry_shares_too(sd15):
    positive, negative, start = inputs("sd15")
    area = [*positive, [tiny.conditioning("sd15", ROWS, 5)[0][0], {"area": (4, 6, 0, 0), "strength": 1.0}]]
    model = shared(sd15)
    assert torch.equal(tiny.sample(model, area, negative, start), tiny.sample(model, area, negative, start))
    assert apart(tiny.sample(model, area, negative, start), tiny.sample(sd15, area, negative, start)) > 1e-4


def test_an_override_set_before_keeps_being_called(sd15):
    calls = []

    def counting(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    before = sd15.clone()
    before.model_options["transformer_options"]["optimized_attention_override"] = counting
    out = tiny.sample(shared(before), *inputs("sd15"))
    assert len(calls) > 40
    assert apart(out, tiny.sample(shared(sd15), *inputs("sd15"))) < 2e-5


def test_a_replace_patch_that_hides_a_layer_is_refused_by_name(sd15):
    model = shared(sd15)
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "output", 0)
    with pytest.raises(RuntimeError, match=r"output block 0.0.*test_consistent_host"):
        tiny.sample(model, *inputs("sd15"))


def test_a_replace_patch_that_passes_options_on_is_fine(sd15):
    def polite(q, k, v, extra):
        return optimized_attention(
            q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra
        )

    model = shared(sd15)
    model.set_model_attn1_replace(polite, "output", 0)
    assert apart(tiny.sample(model, *inputs("sd15")), tiny.sample(shared(sd15), *inputs("sd15"))) < 2e-5


def test_regrouped_tokens_are_refused(sd15):
    model = sd15.clone()
    model.set_model_attn1_patch(lambda n, c, v, extra: (n[:, ::2], c[:, ::2], v[:, ::2]))
    with pytest.raises(RuntimeError, match="HyperTile"):
        tiny.sample(shared(model), *inputs("sd15"))


def test_two_blocks_on_one_model_are_refused(sd15):
    with pytest.raises(ValueError, match="already carries a StoryweftConsistentSelfAttention"):
        shared(shared(sd15))


def test_an_unknown_family_is_refused_by_name(sd15):
    class Strange(torch.nn.Module):
        pass

    class Model:
        diffusion_model = Strange()

    class Patcher:
        model = Model()

    with pytest.raises(ValueError, match="Strange models are not supported"):
        families.find(Patcher(), "StoryweftConsistentSelfAttention")


def test_nothing_stays_after_a_failed_run(sd15):
    model = shared(sd15)
    good = tiny.sample(model, *inputs("sd15"))
    broken = model.clone()

    def fail(n, c, v, extra):
        raise RuntimeError("somebody else's patch")

    broken.set_model_attn1_patch(fail)
    with pytest.raises(RuntimeError, match="somebody else"):
        tiny.sample(broken, *inputs("sd15"))
    assert torch.equal(good, tiny.sample(model, *inputs("sd15")))


def test_keys_and_values_are_projected_once_for_all_panels(sd15):
    counts = []
    layer = sd15.model.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn1
    handle = layer.to_k.register_forward_hook(lambda module, args, out: counts.append(out.shape[0]))
    try:
        tiny.sample(shared(sd15), *inputs("sd15"), steps=2)
    finally:
        handle.remove()
    assert counts == [2 * ROWS, 2 * ROWS]


def test_windows_bound_who_sees_whom(sd15):
    positive, negative, start = inputs("sd15", 4)
    windows = ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0, window=2)
    out = tiny.sample(shared(sd15, windows), positive, negative, start, steps=1)
    other = [[positive[0][0].clone(), {}]]
    other[0][0][3] += 1
    moved = tiny.sample(shared(sd15, windows), other, negative, start, steps=1)
    assert apart(moved[:2], out[:2]) < 2e-5
    assert apart(moved[2], out[2]) > 1e-6


def test_a_batch_that_does_not_fit_the_panels_is_refused_before_the_first_step(sd15):
    story = parse_script("", "one\ntwo\nthree", id_count=2)
    positive = tiny.conditioning("sd15", 3, 1, marks={"storyweft_panels": (0, 1, 2), "storyweft_story": story})
    with pytest.raises(
        ValueError, match="latent holds 2 pictures and the conditioning 3 panels; set the latent's batch_size to 3"
    ):
        tiny.sample(shared(sd15), positive, tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2))


def test_the_estimate_counts_what_is_stored(sd15):
    recorder = bank.Recorder()
    model = shared(sd15, recorder=recorder)
    tiny.sample(model, *inputs("sd15"), steps=3)
    stored = sum(tensor.nbytes for tensor in recorder.tensors("").values())
    expected = ROWS * 2 * bank.bytes_per_panel(override.rules_of(model)[0], model, tiny.latent("sd15", ROWS).shape, 3)
    assert abs(stored / expected - 1) < 0.1


def test_padding_that_a_family_masks_stays_masked():
    patcher = tiny.build("qwen_image")
    mask = torch.ones(ROWS, 9, dtype=torch.long)
    mask[1, 5:] = 0
    positive = tiny.conditioning("qwen_image", ROWS, 1, marks={"attention_mask": mask})
    other = [[positive[0][0].clone(), positive[0][1]]]
    other[0][0][1, 5:] += 3
    negative = tiny.conditioning("qwen_image", 1, 2)
    model = shared(patcher)
    out = tiny.sample(model, positive, negative, tiny.latent("qwen_image", ROWS))
    assert apart(tiny.sample(model, other, negative, tiny.latent("qwen_image", ROWS)), out) < 2e-5
    assert apart(tiny.sample(patcher, positive, negative, tiny.latent("qwen_image", ROWS)), out) > 1e-4


def test_a_window_that_cannot_act_is_refused(sd15):
    windows = ConsistentOptions(window=2)
    with pytest.raises(ValueError, match="window is 2 and works on U-Nets only"):
        tiny.sample(shared(tiny.build("flux"), windows), *inputs("flux"))
    story = parse_script("[Ana] a fox", "[Ana] one\n[Ana] two\n[NC] three", id_count=2)
    positive = tiny.conditioning("sd15", 3, 1, marks={"storyweft_panels": (0, 1, 2), "storyweft_story": story})
    with pytest.raises(ValueError, match="needs one character that every panel of the batch defines"):
        tiny.sample(shared(sd15, windows), positive, *inputs("sd15")[1:])
