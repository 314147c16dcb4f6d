"""StoryGen on tiny models: against the authors' schedule written out, laws of the mechanism, and what is computed."""

import logging
import re

import blocks
import comfy.hooks
import comfy.samplers
import pytest
import story_gen_tiny as sg
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from storyweft.host import families, override
from storyweft.host import story_gen_weights as weights
from storyweft.host.reference_attention import ReferenceAttentionRule
from storyweft.host.reference_pass import Capture, Noise, Reference
from storyweft.host.story_gen import ImagePatches, check_family
from storyweft.sampling.story_gen import AUTO, MULTI


@pytest.fixture(scope="module")
def model():
    return sg.with_weights(tiny.build("sd15"))


@pytest.fixture(scope="module")
def bare():
    return tiny.build("sd15")


def close(a, b, bound=1e-5):
    return (a - b).abs().max() <= bound * b.abs().max()


def authors(model, references, grey, stage, text, image, steps=2):
    """The authors' schedule as their pipeline has it: three branches, each reference passed three times a step, Euler."""
    base, sites = model.model, weights.weights_of(model, "test").sites
    network, sampling = base.diffusion_model, base.model_sampling
    table = sampling.sigmas
    schedule = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(1, 4, *tiny.SIZE, generator=torch.Generator().manual_seed(3))
    e = Noise(5)(noise.shape)
    x = sampling.noise_scaling(schedule[0], noise, torch.zeros_like(noise), True)
    negative, positive = sg.NEGATIVE[0][0], sg.POSITIVE[0][0]

    def eps(state, sigma, words, options):
        t = sampling.timestep(sigma).float().repeat(len(state))
        return network(state / (1 + sigma**2) ** 0.5, t, context=words, transformer_options=options)

    for sigma, after in zip(schedule[:-1], schedule[1:], strict=True):
        t, kept = int(sampling.timestep(sigma)), []
        for place, one in enumerate(references):
            t_i = t // 10 * (len(references) - place if stage == AUTO else 1)
            latents = torch.cat([grey.latent, one.latent, one.latent])
            capture = Capture()
            noisy = base.process_latent_in(latents) + table[t_i] * e
            words = torch.cat([negative, one.caption[0], one.caption[0]])
            eps(noisy, table[t_i], words, {"patches": {"middle_patch": [capture]}})
            kept.append(capture.features)
        features = {site: torch.cat([found[site] for found in kept], 1) for site in kept[0]}
        options = {}
        ImagePatches(sites.modules(network), sites, [(slice(0, 3), features.get)], 1.0).add_to(options)
        u, v, a = eps(x.repeat(3, 1, 1, 1), sigma, torch.cat([negative, negative, positive]), options).chunk(3)
        x = x + (after - sigma) * (u + image * (v - u) + text * (a - v))
    return base.process_latent_out(x)


@pytest.mark.parametrize("stage", [AUTO, MULTI])
@pytest.mark.parametrize(("text", "image"), [(7.0, 3.5), (5.0, 1.0), (4.0, 4.0), (1.0, 1.0)])
@torch.no_grad()
def test_without_repeated_work_it_gives_what_the_authors_schedule_gives(model, stage, text, image):
    references = [sg.reference(seed) for seed in (11, 12, 13)]
    got = sg.draw(model, sg.rule(model, references, stage), text, image)
    assert close(got, authors(model, references, sg.blank(), stage, text, image), 2e-5)


@pytest.mark.parametrize(
    ("stage", "text", "image", "passes", "main"),
    [(AUTO, 7, 3.5, 6, 3), (MULTI, 7, 3.5, 4, 3), (AUTO, 7, 1, 3, 2), (AUTO, 4, 4, 6, 2), (MULTI, 1, 1, 3, 1), (AUTO, 0.5, 3, 3, 1)],
)
def test_nothing_is_computed_twice_and_no_branch_of_weight_zero(model, stage, text, image, passes, main):
    """The authors pass 3 x 3 latents through the model before each main pass of 3."""
    references = [sg.reference(seed) for seed in (11, 12, 13)]
    schedule = model.get_model_object("model_sampling").sigmas[[900, 600]]  # one step
    with sg.Counter(model) as counter:
        sg.draw(model, sg.rule(model, references, stage), text, image, schedule=schedule)
    assert sum(counter.calls) == passes + main
    assert counter.calls[-1] == main


def test_passes_are_kept_while_the_timestep_of_references_stays(model):
    """Heun asks for each inner noise level twice."""
    references = [sg.reference(11)]
    schedule = model.get_model_object("model_sampling").sigmas[[900, 600, 300]]
    with sg.Counter(model) as counter:
        sg.draw(model, sg.rule(model, references), schedule=schedule, sampler="heun")
    assert len(counter.calls) == 3 + 4
    assert sum(counter.calls) == 3 * 2 + 4 * 3


def test_strength_zero_and_stage_no_are_the_model_without_references(model, bare):
    plain = comfy.samplers.CFGGuider(bare)
    plain.set_conds(sg.POSITIVE, sg.NEGATIVE)
    plain.set_cfg(7.0)
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "normal", 2)
    noise = torch.randn(1, 4, *tiny.SIZE, generator=torch.Generator().manual_seed(3))
    want = plain.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    references = [sg.reference(11)]
    assert torch.equal(sg.draw(model, None), want)
    assert torch.equal(sg.draw(model, sg.rule(model, references, strength=0.0)), want)
    assert not close(sg.draw(model, sg.rule(model, references)), want, 1e-2)


def test_strength_scales_the_image_branch_as_one_unit():
    """h + a2 + s (h + a3): at s = 0.5 the answer of a block lies midway, which scaling a3 alone would miss."""
    patcher = sg.with_weights(tiny.build("sd15"))
    sites = weights.weights_of(patcher, "test").sites
    site, module = next(iter(sites.modules(None).items()))
    channels = module.norm4.weight.shape[0]
    h, n, image = torch.randn(3, 2, 6, channels, generator=torch.Generator().manual_seed(0))
    extra = {"block": site[:2], "block_index": site[2]}

    def answer(strength):
        patches = ImagePatches(sites.modules(None), sites, [(slice(0, 2), {site: image}.get)], strength)
        patches.remember(h, extra)
        return patches.apply(n, extra)

    assert torch.equal(answer(0.0), n)
    assert close(answer(0.5), (n + answer(1.0)) / 2)
    assert close(answer(1.0) - n - h, answer(1.0) - answer(0.0) - h)
    without_h = ImagePatches(
        sites.modules(None), weights.ImageSites(sites.modules, sites.head, False), [(slice(0, 2), {site: image}.get)], 1.0
    )
    without_h.remember(h, extra)
    assert close(answer(1.0) - without_h.apply(n, extra), h, 1e-4)


def test_features_are_not_normalised(model):
    sites = weights.weights_of(model, "test").sites
    site, module = next(iter(sites.modules(None).items()))
    h, n, image = torch.randn(3, 1, 6, module.norm4.weight.shape[0], generator=torch.Generator().manual_seed(0))
    extra = {"block": site[:2], "block_index": site[2]}
    found = []
    for factor in (1, 2):
        patches = ImagePatches(sites.modules(None), sites, [(slice(0, 1), {site: factor * image}.get)], 1.0)
        patches.remember(h, extra)
        found.append(patches.apply(n, extra))
    assert not close(found[0], found[1], 1e-2)


def test_order_of_references_counts_in_stage_auto_regressive_alone(model):
    one, two = sg.reference(11), sg.reference(12)
    for stage, same in ((MULTI, True), (AUTO, False)):
        found = [sg.draw(model, sg.rule(model, order, stage)) for order in ((one, two), (two, one))]
        assert bool(close(*found)) is same


def test_a_repeated_list_of_references_changes_nothing_and_costs_nothing(model):
    one, two = sg.reference(11), sg.reference(12)
    with sg.Counter(model) as once:
        plain = sg.draw(model, sg.rule(model, (one, two), MULTI))
    with sg.Counter(model) as twice:
        repeated = sg.draw(model, sg.rule(model, (one, two, one, two), MULTI))
    assert close(repeated, plain)
    assert sum(once.calls) == sum(twice.calls)
    weighted = sg.draw(model, sg.rule(model, (one, two, one), MULTI))  # counts twice in the softmax
    assert not close(weighted, plain, 1e-3)


def test_captions_noise_seed_and_references_all_count(model):
    one = sg.reference(11)
    base = sg.draw(model, sg.rule(model, [one]))
    other_caption = Reference(one.latent, sg.reference(12).caption)
    assert not close(sg.draw(model, sg.rule(model, [other_caption])), base, 1e-4)
    assert not close(sg.draw(model, sg.rule(model, [sg.reference(13)])), base, 1e-3)
    assert not close(sg.draw(model, sg.rule(model, [one], seed=6)), base, 1e-4)
    assert torch.equal(sg.draw(model, sg.rule(model, [one])), base)


def test_noise_of_references_is_not_that_of_a_sampler_with_the_same_seed():
    plain = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(Noise(7)((1, 4, 8, 8)), plain)
    assert torch.equal(Noise(7)((1, 4, 8, 8)), Noise(7)((1, 4, 8, 8)))


def test_chunks_split_over_calls_give_the_same(model, monkeypatch):
    references = [sg.reference(11), sg.reference(12, tokens=14)]
    want = sg.draw(model, sg.rule(model, references), rows=2)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 1)
    with sg.Counter(model) as counter:
        got = sg.draw(model, sg.rule(model, references), rows=2)
    assert set(counter.calls) == {2}  # every pass and every branch by itself
    assert close(got, want, 2e-5)


def test_rows_of_a_batch_have_references_with_their_own_noise(model):
    references = [sg.reference(11)]
    both = sg.draw(model, sg.rule(model, references), rows=2)

    def first_noise(shape):
        return Noise(5)((2, *shape[1:]))[:1]

    own = sg.rule(model, references)
    own.noise = first_noise
    start = torch.randn(2, 4, *tiny.SIZE, generator=torch.Generator().manual_seed(3))[:1]
    guider = sg.make_guider(override.register(model, own), own, sg.POSITIVE, sg.NEGATIVE, 7.0, 3.5)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    alone = guider.sample(start, torch.zeros_like(start), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    assert close(both[:1], alone, 2e-5)


@pytest.mark.parametrize("size", [(9, 7), (8, 12), (10, 6)])
def test_sizes_that_are_no_multiple_of_64_and_references_of_other_sizes_work(model, size):
    found = sg.draw(model, sg.rule(model, [sg.reference(11, size), sg.reference(12, (6, 10))], grey=sg.blank((8, 8))), size=size)
    assert found.shape == (1, 4, *size)
    assert found.isfinite().all()


def test_inputs_stay_as_they_are_and_a_second_run_is_the_same(model):
    one = sg.reference(11)
    before = one.latent.clone(), one.caption[0].clone()
    own = sg.rule(model, [one])
    first = sg.draw(model, own)
    assert torch.equal(one.latent, before[0]) and torch.equal(one.caption[0], before[1])
    assert torch.equal(sg.draw(model, own), first)


def test_references_beyond_the_schedule_are_held_at_its_end(model, caplog):
    references = [sg.reference(seed) for seed in range(11)]
    with caplog.at_level(logging.WARNING):
        sg.draw(model, sg.rule(model, references), steps=1)
    assert "11 references in stage auto-regressive reach beyond timestep 999" in caplog.text


def test_an_area_and_a_list_of_unknown_name_are_refused_before_the_model_runs(model):
    one = sg.rule(model, [sg.reference(11)])
    ((text, extras),) = sg.POSITIVE
    with pytest.raises(ValueError, match="role positive has an area"), sg.Counter(model) as counter:
        sg.draw(model, one, positive=[[text, {**extras, "area": (4, 4, 0, 0), "strength": 1.0}]])
    assert counter.calls == []
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"patches": {"attn1_patch": [print]}}))
    with pytest.raises(ValueError, match="role positive has hooks"):
        sg.draw(model, one, positive=[[text, {**extras, "hooks": hooks}]])
    guider = sg.make_guider(override.register(model, one), one, sg.POSITIVE, sg.NEGATIVE, 7.0, 3.5)
    guider.inner_set_conds({"elsewhere": sg.POSITIVE})
    start = torch.zeros(1, 4, *tiny.SIZE)
    with pytest.raises(ValueError, match="named 'elsewhere'"):
        guider.sample(start, start, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True)


def test_what_references_take_is_said_before_and_refused_when_it_does_not_fit(model, caplog, monkeypatch):
    references = [sg.reference(seed) for seed in (11, 12, 13)]
    with caplog.at_level(logging.INFO):
        sg.draw(model, sg.rule(model, references, MULTI), steps=1, rows=2)
    family, own = families.find(model, "test"), sg.rule(model, references, MULTI)
    state = own.start(None)
    expected = own.size_of(model.model, family, own.passes(), 2)
    assert re.search(r"passes over references in a step: 4 for 2 pictures, keeping ([\d.]+) MiB", caplog.text)
    kept = {}
    original = type(state).ready

    def ready(self, pairs, device):
        original(self, pairs, device)
        kept["bytes"] = sum(x.numel() * x.element_size() for found in self._kept.values() for x in found.values())

    monkeypatch.setattr(type(state), "ready", ready)
    sg.draw(model, own, steps=1, rows=2)
    assert kept["bytes"] == expected
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *args, **more: 1000)
    with pytest.raises(ValueError, match="give fewer or smaller references"), sg.Counter(model) as counter:
        sg.draw(model, own, steps=1, rows=2)
    assert counter.calls == []


def test_core_dual_guidance_with_the_same_rule_gives_the_same(model):
    """Its formula is the same; it computes all branches."""
    own = sg.rule(model, [sg.reference(11)])
    guider = Guider_DualCFG(override.register(model, own))
    guider.set_conds(sg.POSITIVE, sg.NEGATIVE, sg.NEGATIVE)
    guider.set_cfg(7.0, 3.5)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    noise = torch.randn(1, 4, *tiny.SIZE, generator=torch.Generator().manual_seed(3))
    want = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    assert close(sg.draw(model, own), want, 2e-5)


@pytest.mark.parametrize("name", tiny.UNETS)
def test_reference_attention_acts_on_rows_of_the_prompt_and_at_strength_zero_on_none(name):
    patcher = tiny.build(name)
    blocks = weights.transformer_blocks(patcher.model.diffusion_model)
    positive, negative = tiny.conditioning(name, 1, 1), tiny.conditioning(name, 1, 2)
    shown = Reference(sg.reference(11).latent, tiny.conditioning(name, 1, 3)[0])
    plain = tiny.sample(patcher, positive, negative, tiny.latent(name, 1))

    def drawn(strength, cfg=3.0):
        own = ReferenceAttentionRule(blocks, (shown,), AUTO, Noise(0), strength)
        return tiny.sample(override.register(patcher, own), positive, negative, tiny.latent(name, 1), cfg=cfg)

    assert torch.equal(drawn(0.0), plain)
    assert not close(drawn(1.0), plain, 1e-4)
    with sg.Counter(patcher) as counter:
        drawn(1.0)
    assert sum(counter.calls) == 3 * (1 + 2)  # the reference once a step, no grey picture


def test_other_blocks_act_on_the_main_pass_and_not_on_references(model):
    """A Consistent Self-Attention block shares between rows; the passes of references must not see it."""
    one = sg.rule(model, [sg.reference(11)])
    shared = override.register(model, blocks.consistent(model))
    with_both = sg.draw(shared, one, rows=2)
    assert not close(with_both, sg.draw(model, one, rows=2), 1e-4)
    seen = []

    def watch(q, k, v, extra):
        seen.append("storyweft" in extra)
        return q, k, v

    watched = shared.clone()
    watched.set_model_attn1_patch(watch)
    sg.draw(watched, one, rows=2, steps=1)
    assert seen and all(seen)  # another pack's patch is never called in a reference pass


def test_models_that_are_no_unet_of_pictures_are_refused():
    for name in ("svd", "flux", "sd3", "wan", "ltxv", "qwen_image"):
        with pytest.raises(ValueError, match="is not a U-Net of single pictures"):
            check_family(families.find(tiny.build(name), "test"), "test")
