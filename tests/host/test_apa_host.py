"""Adaptive prompts alignment inside ComfyUI: the laws of the house on tiny U-Nets."""

import json
from types import SimpleNamespace

import comfy.context_windows
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from loading import GOLDEN
from storyweft.attention.consistent import ConsistentOptions
from storyweft.host import families, override
from storyweft.host.apa import AdaptivePromptRule, layer_alphas
from storyweft.host.consistent import ConsistentRule
from storyweft.host.image_adapter import LoadedAdapter, channels
from storyweft.host.unet import UNetFamily
from storyweft.models.ip_adapter import ImageAdapter, Standard, in_file_order

ROWS = 3
UNETS = (*tiny.UNETS, "svd")
EVEN = dict.fromkeys(("input", "middle", "output"), 1.0)


def adapter_for(patcher, seed=0):
    sizes, width = channels(families.find(patcher, "test"))
    network = ImageAdapter(Standard(24, width, 4), sizes)
    tiny.fill(network, seed)
    return LoadedAdapter("tiny", network.requires_grad_(False))


def tokens_of(patcher, seed=1, count=1):
    width = channels(families.find(patcher, "test"))[1]
    return torch.randn(count, 4, width, generator=torch.Generator().manual_seed(seed))


def subject(patcher, text=1.0, image=1.0, tokens=None, blank=None, adapter=None, **more):
    adapter = adapter or adapter_for(patcher)
    alphas = layer_alphas(
        patcher, adapter, dict.fromkeys(EVEN, text), image if isinstance(image, dict) else dict.fromkeys(EVEN, image)
    )
    tokens = tokens_of(patcher) if tokens is None else tokens
    blank = tokens_of(patcher, 2) if blank is None else blank
    return AdaptivePromptRule(adapter, tokens, blank, alphas, **more)


def aligned(patcher, *args, **more):
    return override.register(patcher, subject(patcher, *args, **more))


def inputs(name, rows=ROWS):
    return tiny.conditioning(name, rows, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module", params=UNETS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def by_hand(patcher, adapter, tokens, scale, roles=None, text=1.0):
    """IP-Adapter written as plain attn2 replace patches, for models called with the rows' roles in `roles`."""
    model = patcher.clone()
    family = families.find(patcher, "test")
    for index, layer in enumerate(in_file_order(family.cross_layers)):

        def patch(q, k, v, extra, index=index):
            plain = optimized_attention(q, k, v, extra["n_heads"])
            if q.shape[1] != extra["activations_shape"][2] * extra["activations_shape"][3]:
                return plain  # the temporal transformer of a video U-Net bears the same name
            parts = [tokens[number] for number in extra["cond_or_uncond"]]
            rows = len(q) // len(parts)
            seen = torch.cat([part.expand(rows, -1, -1) for part in parts])
            k, v = adapter.network.project(index, seen)
            return text * plain + scale * optimized_attention(q, k, v, extra["n_heads"])

        model.set_model_attn2_replace(patch, layer.path, layer.block, layer.depth)
    return model


def test_one_and_zero_is_the_model_without_the_block(name, patcher):
    plain = tiny.sample(patcher, *inputs(name))
    rule = subject(patcher, 1.0, 0.0)
    assert rule.neutral
    assert torch.equal(plain, tiny.sample(override.register(patcher, rule), *inputs(name)))
    rule.neutral = False  # planned all the same
    assert torch.equal(plain, tiny.sample(override.register(patcher, rule), *inputs(name)))
    assert torch.equal(plain, tiny.sample(aligned(patcher, sigma_range=(1e-4, 0.0)), *inputs(name)))
    assert apart(tiny.sample(aligned(patcher), *inputs(name)), plain) > 1e-3
    assert torch.equal(plain, tiny.sample(patcher, *inputs(name)))


def test_alpha_text_one_is_ip_adapter(name, patcher):
    """And with alpha_text 0.7 the text's answer is scaled in every row, on SVD the one token of its picture."""
    adapter, tokens, blank = adapter_for(patcher), tokens_of(patcher), tokens_of(patcher, 2)
    for text, image in ((1.0, 0.8), (0.7, 0.8), (0.7, 0.0)):
        by_rule = tiny.sample(aligned(patcher, text, image), *inputs(name))
        reference = tiny.sample(by_hand(patcher, adapter, (tokens, blank), image, text=text), *inputs(name))
        assert apart(by_rule, reference) < 2e-5
    shown = tiny.sample(by_hand(patcher, adapter, (tokens, tokens), 0.8), *inputs(name))
    assert apart(tiny.sample(aligned(patcher, 1.0, 0.8, guidance="MagDiff"), *inputs(name)), shown) < 2e-5
    assert apart(shown, tiny.sample(aligned(patcher, 1.0, 0.8), *inputs(name))) > 1e-4


def test_every_layer_is_reached_and_projected_once_a_run(name, patcher, monkeypatch):
    rule, calls = subject(patcher), []
    project = rule.adapter.network.project
    monkeypatch.setattr(
        rule.adapter.network, "project", lambda index, tokens: calls.append(index) or project(index, tokens)
    )
    tiny.sample(override.register(patcher, rule), *inputs(name), steps=3)
    layers = families.find(patcher, "test").cross_layers
    assert sorted(calls) == sorted([*range(len(layers))] * 2)
    assert {layer.path for layer in layers} == {"input", "middle", "output"}


@pytest.mark.parametrize("path", EVEN)
def test_each_group_of_blocks_has_its_own_weight(sd15, path):
    """Weights of one group only act there, the middle block included."""
    adapter, tokens, blank = adapter_for(sd15), tokens_of(sd15), tokens_of(sd15, 2)
    only = {key: float(key == path) for key in EVEN}
    reference = by_hand(sd15, adapter, (tokens, blank), 1.0)
    patches = reference.model_options["transformer_options"]["patches_replace"]["attn2"]
    reference.model_options["transformer_options"]["patches_replace"]["attn2"] = {
        key: patch for key, patch in patches.items() if key[0] == path
    }
    assert (
        apart(tiny.sample(aligned(sd15, image=only), *inputs("sd15")), tiny.sample(reference, *inputs("sd15"))) < 2e-5
    )


def test_cond_and_uncond_in_calls_of_their_own_change_nothing(name, patcher, monkeypatch):
    together = tiny.sample(aligned(patcher), *inputs(name))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(tiny.sample(aligned(patcher), *inputs(name)), together) < 2e-5


def test_the_same_graph_twice_and_after_a_failure_gives_the_same(sd15):
    model = aligned(sd15)
    first = tiny.sample(model, *inputs("sd15"))
    torch.manual_seed(99)
    broken = model.clone()

    def fail(n, c, v, extra):
        raise RuntimeError("somebody else's patch")

    broken.set_model_attn1_patch(fail)
    with pytest.raises(RuntimeError, match="somebody else"):
        tiny.sample(broken, *inputs("sd15"))
    assert torch.equal(first, tiny.sample(model, *inputs("sd15")))


def guided(guider, model, start):
    sampler = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal", 1.0, model.model_options)
    noise = comfy.sample.prepare_noise(start, 0, list(range(ROWS)))
    return guider.sample(
        noise, start, comfy.samplers.sampler_object("euler"), sampler.sigmas, disable_pbar=True, seed=0
    )


def test_guiders_with_three_lists_give_the_negative_no_picture(sd15):
    positive, negative, start = inputs("sd15")
    model = aligned(sd15)
    usual = tiny.sample(model, positive, negative, start)
    dual = custom.Guider_DualCFG(model)
    dual.set_conds(positive, positive, negative)
    dual.set_cfg(3.0, 3.0)
    assert apart(guided(dual, model, start), usual) < 2e-5
    perp = perpneg.Guider_PerpNeg(model)
    perp.set_conds(positive, negative, negative)
    perp.set_cfg(3.0, 1.0)
    assert apart(guided(perp, model, start), usual) < 2e-5


def test_a_list_of_another_name_is_refused_unless_all_rows_see_the_picture(sd15):
    positive, negative, start = inputs("sd15")
    for guidance in ("IP-Adapter", "MagDiff"):
        model = aligned(sd15, guidance=guidance)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive, "negative": negative, "style": positive})
        guider.set_cfg(3.0)
        if guidance == "MagDiff":
            assert apart(guided(guider, model, start), tiny.sample(model, positive, negative, start)) < 2e-5
        else:
            with pytest.raises(ValueError, match="list of conditionings named 'style'"):
                guided(guider, model, start)


def test_two_subjects_add_up_in_any_order_and_text_factors_multiply(sd15):
    one, two = (
        subject(sd15, text, image, tokens=tokens_of(sd15, seed)) for text, image, seed in ((0.9, 0.5, 5), (0.8, 0.7, 6))
    )
    there = tiny.sample(override.register(override.register(sd15, one), two), *inputs("sd15"))
    back = tiny.sample(override.register(override.register(sd15, two), one), *inputs("sd15"))
    assert apart(there, back) < 2e-5
    assert apart(there, tiny.sample(override.register(sd15, one), *inputs("sd15"))) > 1e-4
    twins = [subject(sd15, 1.0, 0.4), subject(sd15, 0.7, 0.6)]
    both = tiny.sample(override.register(override.register(sd15, twins[0]), twins[1]), *inputs("sd15"))
    assert apart(both, tiny.sample(aligned(sd15, 0.7, 1.0), *inputs("sd15"))) < 2e-5


def region(*columns, width=12):
    mask = torch.zeros(1, 8, width)
    for column in columns:
        mask[:, :, column] = 1
    return mask


def test_a_region_of_everything_or_nothing(sd15):
    whole = tiny.sample(aligned(sd15), *inputs("sd15"))
    assert apart(tiny.sample(aligned(sd15, mask=torch.ones(1, 64, 96)), *inputs("sd15")), whole) < 2e-5
    plain = tiny.sample(sd15, *inputs("sd15"))
    assert apart(tiny.sample(aligned(sd15, mask=torch.zeros(1, 64, 96)), *inputs("sd15")), plain) < 2e-5
    left = aligned(sd15, mask=region(*range(6)))
    assert apart(tiny.sample(left, *inputs("sd15")), whole) > 1e-4
    split = override.register(left, subject(sd15, mask=region(*range(6, 12))))
    assert apart(tiny.sample(split, *inputs("sd15")), whole) < 2e-5


def test_a_region_follows_an_area_entry(sd15):
    """A picture allowed in the right half only does not reach an entry whose area is the left half."""
    positive, negative, start = inputs("sd15")
    area = [*positive, [tiny.conditioning("sd15", ROWS, 5)[0][0], {"area": (8, 4, 0, 0), "strength": 1.0}]]
    rule, seen = subject(sd15, mask=region(*range(8, 12))), {}
    keep = rule._region

    def watched(run, call, layout, q):
        found = keep(run, call, layout, q)
        seen.setdefault(call.shape[-2:], found.sum().item())
        return found

    rule._region = watched
    tiny.sample(override.register(sd15, rule), area, negative, start)
    assert seen.pop((8, 4)) == 0
    assert next(iter(seen.values())) > 0


@pytest.mark.parametrize("count", [2, 4])
def test_pictures_that_do_not_fit_the_latent_are_refused_with_both_numbers(sd15, count):
    with pytest.raises(ValueError, match=f"image holds {count} pictures and the latent 3 rows; give one or 3"):
        tiny.sample(aligned(sd15, tokens=tokens_of(sd15, count=count)), *inputs("sd15"))
    with pytest.raises(ValueError, match=f"region holds {count} masks and the latent 3 rows"):
        tiny.sample(aligned(sd15, mask=torch.ones(count, 8, 12)), *inputs("sd15"))


def test_a_region_of_another_shape_is_refused(sd15):
    with pytest.raises(ValueError, match="region is 64 x 64 and the picture 96 x 64"):
        tiny.sample(aligned(sd15, mask=torch.ones(1, 64, 64)), *inputs("sd15"))


def test_tokens_of_each_frame_stay_with_their_frame(name, patcher):
    tokens = tokens_of(patcher, 3, ROWS)
    whole = tiny.sample(aligned(patcher, tokens=tokens), *inputs(name))
    if name != "svd":  # the frames of a video look at each other
        for row in range(ROWS):
            alone = tiny.sample(aligned(patcher, tokens=tokens[row : row + 1]), *inputs(name))
            assert apart(alone[row], whole[row]) < 2e-5
    same = tokens[:1].expand(ROWS, -1, -1)
    assert (
        apart(
            tiny.sample(aligned(patcher, tokens=same), *inputs(name)),
            tiny.sample(aligned(patcher, tokens=tokens[:1]), *inputs(name)),
        )
        < 2e-5
    )


def test_tokens_of_each_frame_follow_context_windows(sd15):
    """The rows of this U-Net do not see each other, so windows must change nothing."""
    positive, negative, start = inputs("sd15", 6)
    mask = torch.rand(6, 8, 12, generator=torch.Generator().manual_seed(1))
    model = aligned(sd15, tokens=tokens_of(sd15, 3, 6), mask=mask)
    whole = tiny.sample(model, positive, negative, start)
    handler = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule("standard_static"),
        comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=4,
        context_overlap=2,
        dim=0,
    )
    model.model_options["context_handler"] = handler
    assert apart(tiny.sample(model, positive, negative, start), whole) < 2e-5


def test_tokens_of_each_frame_follow_the_windows_of_animatediff_evolved(sd15):
    """That pack says in ad_params which frames the rows of a call are."""
    tokens, order = tokens_of(sd15, 3, ROWS), [2, 0, 1]
    model = aligned(sd15, tokens=tokens)
    model.model_options["transformer_options"]["ad_params"] = {"sub_idxs": order}
    expected = tiny.sample(aligned(sd15, tokens=tokens[order]), *inputs("sd15"))
    assert apart(tiny.sample(model, *inputs("sd15")), expected) < 2e-5


def test_a_patch_of_another_pack_counts_as_text(sd15):
    """A stand-in of IPAdapter_plus, which replaces attn2 of each block, before or after ours in the graph."""
    adapter, tokens, blank = adapter_for(sd15, 7), tokens_of(sd15, 8), tokens_of(sd15, 9)
    pair = (tokens, blank)
    other = by_hand(sd15, adapter, pair, 0.6)
    mine = subject(sd15, adapter=adapter, tokens=tokens, blank=blank, image=0.4)
    both = tiny.sample(override.register(other, mine), *inputs("sd15"))
    assert apart(both, tiny.sample(by_hand(sd15, adapter, pair, 1.0), *inputs("sd15"))) < 2e-5
    after = by_hand(override.register(sd15, mine), adapter, pair, 0.6)
    assert torch.equal(tiny.sample(after, *inputs("sd15")), both)
    halved = subject(sd15, 0.5, 0.4, adapter=adapter, tokens=tokens, blank=blank)
    scaled = by_hand(sd15, adapter, pair, 0.7, text=0.5)  # 0.5 (text + 0.6 picture) + 0.4 picture
    assert (
        apart(tiny.sample(override.register(other, halved), *inputs("sd15")), tiny.sample(scaled, *inputs("sd15")))
        < 2e-5
    )


def test_with_consistent_self_attention_the_order_of_nodes_does_not_matter(sd15):
    shared = ConsistentRule(ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0), "all")
    mine = subject(sd15)
    one = tiny.sample(override.register(override.register(sd15, shared), mine), *inputs("sd15"))
    other = tiny.sample(override.register(override.register(sd15, mine), shared), *inputs("sd15"))
    assert torch.equal(one, other)
    for alone in (shared, mine):
        assert apart(one, tiny.sample(override.register(sd15, alone), *inputs("sd15"))) > 1e-4


def test_alphas_go_evenly_to_their_end(sd15):
    rule = subject(sd15, 1.0, 2.0, at_end=(0.5, 0.0))
    layer = next(iter(rule.alphas))
    steps = [rule.alphas_at(layer, SimpleNamespace(step=step, sigmas=[0.0] * 6)) for step in range(5)]
    assert steps == [(1.0, 2.0), (0.875, 1.5), (0.75, 1.0), (0.625, 0.5), (0.5, 0.0)]
    assert not rule.neutral
    one_step = tiny.sample(override.register(sd15, rule), *inputs("sd15"), steps=1)
    assert torch.equal(one_step, tiny.sample(aligned(sd15, 1.0, 2.0), *inputs("sd15"), steps=1))


@pytest.mark.parametrize("family", ["flux", "wan", "ltxv"])
def test_transformers_are_refused_by_name(sd15, family):
    model = tiny.build(family)
    with pytest.raises(ValueError, match=f"{type(model.model.diffusion_model).__name__} is no U-Net"):
        layer_alphas(model, adapter_for(sd15), EVEN, EVEN)


def test_an_adapter_of_another_family_is_refused_with_both_names(sd15):
    network = ImageAdapter(Standard(24, 2048, 4), [8, 8])
    with pytest.raises(
        ValueError,
        match=r"wide.adapter was made for SDXL \(2 layers, tokens 2048 wide\) and the model is "
        r"another model \(\d+ cross-attention layers, tokens 16 wide\)",
    ):
        layer_alphas(sd15, LoadedAdapter("wide.adapter", network), EVEN, EVEN)


REAL = {
    "sd15": {
        "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "use_linear_in_transformer": False,
    },
    "sdxl": {
        "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}


@pytest.mark.parametrize("family", REAL)
def test_numbers_of_published_files_mean_the_blocks_of_the_real_models(family):
    layouts = json.loads((GOLDEN / "magdiff" / "ip_adapter_layouts.json").read_text())
    with torch.device("meta"):
        unet = UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            use_spatial_transformer=True,
            legacy=False,
            operations=comfy.ops.disable_weight_init,
            **REAL[family],
        )
    found = UNetFamily(unet)
    layers = [(layer.path, layer.block, layer.depth) for layer in in_file_order(found.cross_layers)]
    expected = [(*place, 0)[:3] for place in layouts["comfyui_block_of_index"][family]]
    assert layers == expected
    assert channels(found) == (layouts["channels_of_index"][family], REAL[family]["context_dim"])
