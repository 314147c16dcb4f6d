"""StyleAligned inside ComfyUI: the laws of the house on tiny models of every family it takes."""

import math

import comfy.context_windows
import comfy.ldm.modules.attention as core_attention
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from storyweft.attention.consistent import ConsistentOptions
from storyweft.attention.style import StyleOptions
from storyweft.host import override
from storyweft.host.consistent import ConsistentRule
from storyweft.host.style import StyleRule
from storyweft.nodes.style import StyleAligned

ROWS = 3
TAKEN = ("sd15", "sd2", "sdxl", "svd", "flux", "qwen_image")
NOTHING = {"share_attention": False, "adain_queries": False, "adain_keys": False}


def styled(patcher, **options):
    return override.register(patcher, StyleRule(StyleOptions(**options)))


def consistent(patcher, rate=1.0, layers="all"):
    options = ConsistentOptions(rate=rate, share_early=1.0, share_late=1.0, first_step=0)
    return override.register(patcher, ConsistentRule(options, layers))


def inputs(name, rows=ROWS):
    return tiny.conditioning(name, rows, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module", params=TAKEN)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


@pytest.fixture
def one_by_one(monkeypatch):
    """Core's attention on CPUs, a query at a time: products of several at once round by their number on some CPUs."""
    whole = core_attention.efficient_dot_product_attention

    def each(query, key, value, *args, mask=None, **kwargs):
        masks = [None] * len(query) if mask is None else mask.expand(len(query), *mask.shape[1:]).split(1)
        rows = zip(query.split(1), key.split(1), value.split(1), masks, strict=True)
        seen = [
            [whole(q[:, n : n + 1], k, v, *args, mask=one if one is None else one[:, n : n + 1], **kwargs) for n in range(q.shape[1])]
            for q, k, v, one in rows
        ]
        return torch.cat([torch.cat(row, 1) for row in seen])

    monkeypatch.setattr(core_attention, "efficient_dot_product_attention", each)


@pytest.fixture
def split(monkeypatch):
    """Makes core run cond and uncond in calls of their own, as it does when memory is short."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)


def test_it_acts_on_the_others_and_the_first_picture_is_the_plain_one(name, patcher, request):
    if name in ("flux", "qwen_image"):  # picture and text ask in calls of their own
        request.getfixturevalue("one_by_one")
    plain, out = tiny.sample(patcher, *inputs(name)), tiny.sample(styled(patcher), *inputs(name))
    for row in range(1, ROWS):
        assert apart(out[row], plain[row]) > 1e-4
    if name != "svd":  # its temporal layers carry every frame into every other
        assert torch.equal(out[0], plain[0])
    assert torch.equal(plain, tiny.sample(patcher, *inputs(name)))


def test_neutral_settings_are_bit_identical(name, patcher):
    plain = tiny.sample(patcher, *inputs(name))
    for options in ({"only_self_level": 1.0}, NOTHING):
        assert torch.equal(plain, tiny.sample(styled(patcher, share_group_norm=False, **options), *inputs(name)))


def test_cond_and_uncond_in_calls_of_their_own_change_nothing(name, patcher, request):
    together = tiny.sample(styled(patcher), *inputs(name))
    request.getfixturevalue("split")
    assert apart(tiny.sample(styled(patcher), *inputs(name)), together) < 2e-5


def test_the_same_graph_twice_gives_the_same(name, patcher):
    model = styled(patcher, adain_values=True, shared_score_shift=0.5)
    assert torch.equal(tiny.sample(model, *inputs(name)), tiny.sample(model, *inputs(name)))


@pytest.mark.parametrize(
    "options",
    [
        {"share_group_norm": False},
        {"adain_values": True},
        {"share_attention": False},
        {"shared_score_scale": 0.5, "shared_score_shift": math.log(3)},
        {"only_self_level": 0.5},
        {**NOTHING},
    ],
)
def test_the_reference_is_plain_and_the_others_are_not_in_every_option_but_full_sharing(sd15, options):
    plain, out = tiny.sample(sd15, *inputs("sd15")), tiny.sample(styled(sd15, **options), *inputs("sd15"))
    assert torch.equal(out[0], plain[0])
    assert apart(out[1:], plain[1:]) > 1e-4


def test_full_sharing_changes_the_first_picture_too_and_is_attention_over_all(sd15):
    full = tiny.sample(styled(sd15, full_attention_share=True, share_group_norm=False), *inputs("sd15"))
    assert apart(full[:1], tiny.sample(sd15, *inputs("sd15"))[:1]) > 1e-4
    assert apart(full, tiny.sample(consistent(sd15), *inputs("sd15"))) < 2e-5
    strange = {"shared_score_shift": 3.0, "shared_score_scale": 0.2, "adain_values": True}
    same = styled(sd15, full_attention_share=True, share_group_norm=False, **strange)
    assert torch.equal(full, tiny.sample(same, *inputs("sd15")))


def test_a_very_negative_shift_leaves_only_the_alignment(sd15):
    out = tiny.sample(styled(sd15, shared_score_shift=-1e4), *inputs("sd15"))
    assert apart(out, tiny.sample(styled(sd15, share_attention=False), *inputs("sd15"))) < 2e-5


def test_a_reference_of_each_guidance_chunk_is_its_own_first_row(sd15):
    positive, negative, start = inputs("sd15")
    model = styled(sd15)
    alone = tiny.sample(model, positive, negative, start, cfg=1.0)
    assert apart(tiny.sample(model, positive, tiny.conditioning("sd15", 1, 77), start, cfg=1.0), alone) < 2e-5
    twice = tiny.sample(model, [*positive, *positive], negative, start)
    assert apart(twice, tiny.sample(model, positive, negative, start)) < 2e-5
    other = [[positive[0][0].clone(), {}]]
    other[0][0][2] += 1  # the last picture's prompt is its own affair
    assert apart(tiny.sample(model, other, negative, start)[:2], tiny.sample(model, positive, negative, start)[:2]) < 2e-5
    other[0][0][0] += 1
    assert apart(tiny.sample(model, other, negative, start)[1], tiny.sample(model, positive, negative, start)[1]) > 1e-5


def test_dual_cfg_with_other_numbers_for_the_same_roles(sd15):
    positive, negative, start = inputs("sd15")
    model = styled(sd15)
    guider = custom.Guider_DualCFG(model)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(3.0, 3.0)
    ks = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal", 1.0, model.model_options)
    noise = comfy.sample.prepare_noise(start, 0, list(range(ROWS)))
    out = guider.sample(noise, start, comfy.samplers.sampler_object("euler"), ks.sigmas, disable_pbar=True, seed=0)
    assert apart(out, tiny.sample(model, positive, negative, start)) < 2e-5


def forwards(patcher):
    """Group norms of the network that carry a forward of their own."""
    modules = patcher.model.diffusion_model.modules()
    return [module for module in modules if isinstance(module, torch.nn.GroupNorm) and "forward" in vars(module)]


def test_group_norms_are_exchanged_during_a_call_only_and_never_for_another_clone(sd15):
    plain = tiny.sample(sd15, *inputs("sd15"))
    seen = []

    def looking(n, context, value, extra):
        seen.append(len(forwards(sd15)))
        return n, context, value

    model = styled(sd15, **NOTHING)
    model.set_model_attn1_patch(looking)
    out = tiny.sample(model, *inputs("sd15"))
    assert min(seen) > 10
    assert apart(out[1:], plain[1:]) > 1e-4
    assert forwards(sd15) == []
    assert torch.equal(plain, tiny.sample(sd15, *inputs("sd15")))


@pytest.mark.parametrize("fault", [RuntimeError("somebody else's patch"), comfy.model_management.InterruptProcessingException()])
def test_nothing_stays_after_an_error_or_an_interrupt(sd15, fault):
    model = styled(sd15)
    good = tiny.sample(model, *inputs("sd15"))
    broken = model.clone()

    def fail(n, c, v, extra):
        raise fault

    broken.set_model_attn1_patch(fail)
    with pytest.raises(type(fault)):
        tiny.sample(broken, *inputs("sd15"))
    assert forwards(sd15) == []
    assert torch.equal(good, tiny.sample(model, *inputs("sd15")))


def test_a_forward_that_another_pack_put_on_a_norm_is_put_back(sd15):
    norm = next(m for m in sd15.model.diffusion_model.modules() if isinstance(m, torch.nn.GroupNorm))
    theirs = norm.forward
    norm.forward = theirs
    try:
        tiny.sample(styled(sd15), *inputs("sd15"), steps=1)
        assert vars(norm)["forward"] is theirs
    finally:
        del norm.forward


def test_steps_outside_the_range_are_plain(sd15):
    plain, always = tiny.sample(sd15, *inputs("sd15")), tiny.sample(styled(sd15), *inputs("sd15"))
    none = StyleAligned.execute(sd15, start_percent=1.0, end_percent=1.0).args[0]
    assert torch.equal(tiny.sample(none, *inputs("sd15")), plain)
    early = tiny.sample(StyleAligned.execute(sd15, end_percent=0.4).args[0], *inputs("sd15"))
    assert apart(early[1:], plain[1:]) > 1e-5
    assert apart(early[1:], always[1:]) > 1e-5


def test_with_consistent_self_attention_every_token_counts_once(sd15):
    """Without alignment the reference is one of the pictures that sampling at rate 1 shows anyway."""
    both = styled(consistent(sd15), adain_queries=False, adain_keys=False, share_group_norm=False)
    assert apart(tiny.sample(both, *inputs("sd15")), tiny.sample(consistent(sd15), *inputs("sd15"))) < 2e-5


def test_with_consistent_self_attention_in_either_order_of_the_graph(sd15):
    one, other = consistent(styled(sd15), 0.5, "output path"), styled(consistent(sd15, 0.5, "output path"))
    out = tiny.sample(one, *inputs("sd15"))
    assert torch.equal(out, tiny.sample(other, *inputs("sd15")))
    for alone in (styled(sd15), consistent(sd15, 0.5, "output path")):
        assert apart(out[1:], tiny.sample(alone, *inputs("sd15"))[1:]) > 1e-4


def test_one_picture_is_refused_before_the_first_step(sd15):
    with pytest.raises(ValueError, match="StoryweftStyleAligned: the latent holds 1 picture.*set batch_size to 2"):
        tiny.sample(styled(sd15), *inputs("sd15", 1))


@pytest.mark.parametrize("other", ["wan", "sd3", "ltxv", "zimage"])
def test_families_whose_positions_hide_the_moments_are_refused(other):
    model = tiny.build(other)
    with pytest.raises(ValueError, match=f"StoryweftStyleAligned: {type(model.model.diffusion_model).__name__} shows"):
        StyleAligned.execute(model)


@pytest.mark.parametrize("option", ["only_self_level", "start_percent", "end_percent"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_numbers_outside_0_to_1_are_refused(sd15, option, value):
    with pytest.raises(ValueError, match=f"StoryweftStyleAligned: {option} is {value}; give a number from 0 to 1"):
        StyleAligned.execute(sd15, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shared_score_scale", -0.5),
        ("shared_score_scale", math.nan),
        ("shared_score_scale", math.inf),
        ("shared_score_shift", math.nan),
        ("shared_score_shift", -math.inf),
    ],
)
def test_scale_and_shift_that_are_no_numbers_are_refused(sd15, option, value):
    with pytest.raises(ValueError, match=f"StoryweftStyleAligned: {option} is {value}; give a"):
        StyleAligned.execute(sd15, **{option: value})


def test_an_empty_range_and_a_second_block_are_refused(sd15):
    with pytest.raises(ValueError, match=r"start_percent 0.8 lies after end_percent 0.2; swap them"):
        StyleAligned.execute(sd15, start_percent=0.8, end_percent=0.2)
    with pytest.raises(ValueError, match="already carries a StoryweftStyleAligned"):
        styled(styled(sd15))


def test_windows_without_the_reference_are_refused(sd15):
    model = styled(sd15)
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=2,
        context_overlap=0,
        dim=0,
    )
    with pytest.raises(RuntimeError, match="shows the model pictures [2-4, ]+ without picture 1, the style"):
        tiny.sample(model, *inputs("sd15", 4))
