"""Masked attention inside ComfyUI: the laws of the house and the invariants of PEEKABOO on tiny models of every family."""

import comfy.context_windows
import comfy.ldm.modules.attention as backends
import comfy.model_patcher
import comfy.patcher_extension
import comfy_extras.nodes_context_windows as windows
import pytest
import tiny
import torch
from storyweft.attention.consistent import ConsistentOptions
from storyweft.attention.labels import BoxRegions
from storyweft.attention.masked import ANY, NOBODY, partition
from storyweft.host import masked, override
from storyweft.host.consistent import ConsistentRule
from storyweft.host.layout import Layer
from storyweft.host.masked import MaskedOptions, MaskedRule
from storyweft.host.plan import Divisions
from storyweft.host.transformer import FORMS, TransformerFamily
from storyweft.host.words import KEY, Words

ROWS, RATIO = 3, 4
NAN = float("nan")


def frames_of(name):
    """Frames that boxes have: pictures of the batch, or pixel frames of the video."""
    latents = tiny.FAMILIES[name].frames
    return ROWS if latents < 2 else 1 + (latents - 1) * RATIO


def moving(name):
    count = frames_of(name)
    return BoxRegions(torch.tensor([[(0.4 * f / count, 0.2, 0.4 + 0.4 * f / count, 0.8) for f in range(count)]]).double())


def words(name, both=True):
    length = tiny.FAMILIES[name].text[0]
    return Words((NOBODY, 1, 1, *[0] * (length - 3)), (0, 1), both)


def on(patcher, name, regions=None, **options):
    settings = {"steps": 1, "cross": name != "svd"} | options
    return override.register(patcher, MaskedRule(regions or moving(name), MaskedOptions(**settings), RATIO))


def inputs(name, rows=ROWS, marks=True):
    marked = {KEY: words(name)} if marks and name != "svd" else {}
    return tiny.conditioning(name, rows, 1, marks=marked), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


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


@pytest.fixture(scope="module")
def wan():
    return tiny.build("wan")


@pytest.fixture
def seen(monkeypatch):
    """(layout, constraints by where they stand) of every attention call that the rule plans."""
    found, plan = [], MaskedRule.plan

    def watch(self, run, call, layout, plan_):
        acted = plan(self, run, call, layout, plan_)
        found.append((layout, plan_, run.step))
        return acted

    monkeypatch.setattr(MaskedRule, "plan", watch)
    return found


def test_it_acts_on_every_family_and_without_masked_steps_is_bit_identical(name, patcher):
    plain = tiny.sample(patcher, *inputs(name))
    assert torch.equal(plain, tiny.sample(on(patcher, name, steps=0, part=0.0), *inputs(name)))
    assert apart(tiny.sample(on(patcher, name, steps=3), *inputs(name)), plain) > 1e-3
    assert torch.equal(plain, tiny.sample(patcher, *inputs(name)))


def test_split_chunks_and_a_second_run_change_nothing(name, patcher, monkeypatch):
    model = on(patcher, name, steps=3)
    together, plain = tiny.sample(model, *inputs(name)), tiny.sample(patcher, *inputs(name))
    torch.manual_seed(99)
    assert torch.equal(together, tiny.sample(model, *inputs(name)))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    rounding = apart(tiny.sample(patcher, *inputs(name)), plain)  # CogVideoX's first sigma is 4500
    assert apart(tiny.sample(model, *inputs(name)), together) < max(2e-5, 4 * rounding)


def test_every_layer_of_every_kind_is_masked(name, patcher, seen):
    """Pictures: all layers. Video U-Nets: middle and output path. (k) counts the calls of one evaluation."""
    tiny.sample(on(patcher, name), *inputs(name))
    family = override.families.find(patcher, "test")
    layers = [*family.layers, *(() if name == "svd" else family.cross_layers), *family.time_layers]
    wanted = {layer for layer in layers if name != "svd" or layer.path != "input"}
    assert {layout.layer for layout, plan, _ in seen if _constraints(plan)} == wanted
    assert all(step == 0 for *_, step in seen)
    calls = [layout for layout, _, _ in seen]
    together = [layout for layout in calls if len(layout.entries) == 2]
    assert len(together) + len(calls) == 2 * len(wanted)  # each layer once, or once for each chunk


def _constraints(plan):
    return plan.constraints if hasattr(plan, "constraints") else [c for chunk in plan.text for b in chunk for c in b.constraints]


def test_the_token_a_layout_names_is_the_one_whose_pixels_changed(name, patcher, seen):
    """Also in front of, behind and between text: only keys of that token differ in the first layer."""
    if name in tiny.UNETS or name == "svd":
        return  # convolutions come before their first attention
    first = []

    def keep(func, q, k, v, heads, *args, **kwargs):
        first.append(k if kwargs.get("skip_reshape") else k.unflatten(-1, (heads, -1)).transpose(1, 2))
        return func(q, k, v, heads, *args, **kwargs)

    def keys(change):
        first.clear(), seen.clear()
        base = patcher.clone()
        base.model_options["transformer_options"]["optimized_attention_override"] = keep

        def wrapper(executor, x, *args, **kwargs):
            return executor(x + change, *args, **kwargs)

        base.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, wrapper)
        one = BoxRegions(torch.full((1, 1, 4), NAN).double())
        tiny.sample(on(base, name, one, cross=False), *inputs(name, 1), steps=1, cfg=1.0)
        layout = seen[0][0]
        lengths = [k.shape[2] for k in first]
        tokens = layout.grid[0] * layout.grid[1] * layout.grid[2]
        place = next(i for i, n in enumerate(lengths) if n >= layout.image.stop and n >= tokens and _is_first(name, i))
        return first[place], layout

    shape = tiny.latent(name, 1).shape
    change = torch.zeros(shape)
    change[..., -1, -3] = 0.5  # last row of pixels, last frame, third column from the right
    if len(shape) == 5:
        change[:, :, :-1] = 0
    before, layout = keys(torch.zeros(shape))
    after, _ = keys(change)
    difference = (before - after).abs().amax((0, 1, 3))
    moved = difference.gt(1e-7).nonzero().flatten().tolist()
    if name == "zimage":  # a refiner has mixed the picture's tokens
        moved = [int(difference.argmax())]
    frames, height, width = layout.grid
    column = (shape[-1] - 3) * width // shape[-1]
    assert moved == [layout.image.start + (frames * height - 1) * width + column]


def _is_first(name, call):
    """Refiners of text (and of pictures) come before the blocks."""
    return call >= {"hunyuan_video": 2, "zimage": 2}.get(name, 0)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "cogvideox", "mochi", "zimage", "hunyuan_video"])
def test_in_joint_sequences_pictures_see_their_words_and_text_sees_all(name, seen):
    tiny.sample(on(tiny.build(name), name), *inputs(name))
    layout, plan, _ = seen[0]
    spatial, text = plan.constraints
    assert layout.text is not None and layout.text.stop - layout.text.start >= 9 and layout.entries[0].role
    outside = torch.ones(plan.q.shape[2], dtype=torch.bool)
    outside[layout.image] = False
    assert (text.query[:, outside] == ANY).all() and (spatial.query[:, outside] == ANY).all()
    assert (spatial.key[:, outside] == ANY).all() and (text.key[:, layout.image] == ANY).all()
    assert text.key[:, layout.text][:, :9].unique(dim=0).tolist() == [[NOBODY, 1, 1, 0, 0, 0, 0, 0, 0]]
    rows = len(text.query) // len(layout.entries)
    own = spatial.query.expand(len(text.query), -1)
    assert torch.equal(own[:rows, layout.image], text.query[:rows, layout.image])


def test_words_with_a_key_mask_leave_the_negative_prompt_alone(seen):
    positive, negative, start = inputs("flux")
    positive[0][1][KEY] = words("flux", both=False)
    tiny.sample(on(tiny.build("flux"), "flux"), positive, negative, start)
    for layout, plan, _ in seen:
        for chunk, entry in enumerate(layout.entries):
            rows = layout.chunk_rows(chunk)
            key = plan.constraints[1].key[rows.start : rows.stop] if len(plan.constraints) == 2 else None
            if entry.role == "negative":
                assert key is None or (key == ANY).all()
            else:
                assert (key[:, layout.text] == 1).any()


def test_clip_words_mask_the_negative_prompt_at_the_same_places(sd15, seen):
    tiny.sample(on(sd15, "sd15"), *inputs("sd15"))
    crosses = [(layout, plan) for layout, plan, _ in seen if layout.layer.kind == "cross"]
    for layout, plan in crosses:
        for chunk in range(len(layout.entries)):
            assert plan.text[chunk][0].constraints[0].key.tolist() == [[NOBODY, 1, 1, 0, 0, 0, 0]]
    assert {entry.role for layout, _ in crosses for entry in layout.entries} == {"positive", "negative"}


def test_a_prompt_repeated_for_a_longer_partner_keeps_its_words(sd15, seen):
    positive, _, start = inputs("sd15")
    tiny.sample(on(sd15, "sd15"), positive, tiny.conditioning("sd15", 1, 2, tokens=14), start)
    key = next(plan.text[0][0].constraints[0].key for layout, plan, _ in seen if layout.layer.kind == "cross")
    assert key.tolist() == [[NOBODY, 1, 1, 0, 0, 0, 0] * 2]


def test_a_negative_prompt_of_other_length_is_masked_alike_together_and_alone(sd15, monkeypatch):
    """More chunks than the positive has, and fewer."""
    start, model = tiny.latent("sd15", ROWS), on(sd15, "sd15")
    long = Words((*words("sd15").labels, *words("sd15").labels), (0, 1), True)
    for tokens, marks in ((21, {KEY: words("sd15")}), (7, {KEY: long})):
        positive = tiny.conditioning("sd15", ROWS, 1, tokens=len(marks[KEY].labels), marks=marks)
        negative = tiny.conditioning("sd15", 1, 2, tokens=tokens)
        with monkeypatch.context() as patched:
            together = tiny.sample(model, positive, negative, start)
            patched.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
            assert apart(tiny.sample(model, positive, negative, start), together) < 2e-5


def test_h_masked_steps_are_the_first_whatever_comes_after(sd15):
    def steps(**options):
        states = []
        tiny.sample(
            on(sd15, "sd15", **options), *inputs("sd15"), steps=8, callback=lambda *given: states.append(given[2].clone())
        )
        return states

    two, six, fraction = steps(steps=2), steps(steps=6), steps(steps=0, part=0.25)
    assert all(torch.equal(a, b) for a, b in zip(two, fraction, strict=True))
    same = [torch.equal(a, b) for a, b in zip(two, six, strict=True)]
    assert same[:3] == [True, True, True] and not any(same[3:])  # a state is what a step starts from


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m_sde", "uni_pc"])
def test_samplers_with_several_evaluations_a_step_mask_exactly_the_first_steps(sd15, seen, sampler):
    tiny.sample(on(sd15, "sd15", steps=2), *inputs("sd15"), steps=4, sampler=sampler)
    assert {step for *_, step in seen} <= {0, 1}
    assert tiny.sample(on(sd15, "sd15", steps=4), *inputs("sd15"), steps=4, sampler=sampler).isfinite().all()


def test_the_first_steps_of_a_shortened_schedule(sd15, seen):
    """denoise 0.5: the schedule starts in the middle and its own first step is masked."""
    tiny.sample(on(sd15, "sd15"), *inputs("sd15"), steps=4, denoise=0.5)
    assert {step for *_, step in seen} == {0}


def test_cfg_1_two_positives_and_a_batch_of_videos(sd15, wan):
    positive, negative, start = inputs("sd15")
    one = tiny.sample(on(sd15, "sd15"), positive, negative, start, cfg=1.0)
    assert apart(tiny.sample(on(sd15, "sd15"), [*positive, *positive], negative, start, cfg=1.0), one) < 2e-5
    positive, negative, start = inputs("wan", 2)
    both = tiny.sample(on(wan, "wan"), positive, negative, start)
    single = [[positive[0][0][:1], positive[0][1]]]
    assert apart(tiny.sample(on(wan, "wan"), single, negative, start[:1]), both[:1]) < 2e-5


@pytest.mark.parametrize("backend", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"])
def test_l_every_backend_gives_the_same(backend):
    for name in ("sd15", "qwen_image", "svd"):
        patcher = tiny.build(name)
        base = patcher.clone()

        def other(func, *args, **kwargs):
            return getattr(backends, backend)(*args, **kwargs)

        base.model_options["transformer_options"]["optimized_attention_override"] = other
        assert apart(tiny.sample(on(base, name), *inputs(name)), tiny.sample(on(patcher, name), *inputs(name))) < 1e-4


def test_l_a_foreign_override_before_or_after_keeps_working(sd15):
    wanted, calls = tiny.sample(on(sd15, "sd15"), *inputs("sd15")), []

    def counting(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    before = sd15.clone()
    before.model_options["transformer_options"]["optimized_attention_override"] = counting
    assert apart(tiny.sample(on(before, "sd15"), *inputs("sd15")), wanted) < 2e-5 and calls
    after = on(sd15, "sd15")
    ours = after.model_options["transformer_options"]["optimized_attention_override"]

    def around(func, *args, **kwargs):
        calls.append(1)
        return ours(func, *args, **kwargs)

    after.model_options["transformer_options"]["optimized_attention_override"] = around
    assert apart(tiny.sample(after, *inputs("sd15")), wanted) < 2e-5
    after.model_options["transformer_options"]["optimized_attention_override"] = counting
    with pytest.raises(RuntimeError, match="StoryweftMaskedAttention: input block .* of an unknown pack"):
        tiny.sample(after, *inputs("sd15"))


def test_boxes_that_leave_one_label_are_bit_identical_without_words(name, patcher):
    """An absent object and a box over everything: nothing to keep apart."""
    plain = tiny.sample(patcher, *inputs(name))
    for corner in ((NAN,) * 4, (0.0, 0.0, 1.0, 1.0)):
        regions = BoxRegions(torch.tensor([[corner]]).double())
        assert torch.equal(tiny.sample(on(patcher, name, regions, cross=False), *inputs(name)), plain)


def test_ablation_switches_name_the_layers_that_act(seen):
    svd = tiny.build("svd")
    for options, kinds in (({"temporal": False}, {"self"}), ({"spatial": False}, {"time"})):
        seen.clear()
        tiny.sample(on(svd, "svd", **options), *inputs("svd"))
        assert {layout.layer.kind for layout, *_ in seen} == kinds
    sd15 = tiny.build("sd15")
    for options, kinds in (({"spatial": False}, {"cross"}), ({"cross": False}, {"self"})):
        seen.clear()
        tiny.sample(on(sd15, "sd15", **options), *inputs("sd15"))
        assert {layout.layer.kind for layout, *_ in seen} == kinds
    seen.clear()
    tiny.sample(on(sd15, "sd15", layers="middle and output path"), *inputs("sd15"))
    assert {layout.layer.path for layout, *_ in seen} == {"middle", "output"}


def test_context_windows_pick_the_boxes_of_their_frames(sd15, wan, seen):
    window = {"context_length": 2, "context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1}
    window |= {"closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
    model = windows.ContextWindowsManualNode.execute(on(sd15, "sd15"), **window, dim=0).args[0]
    positive, negative, start = inputs("sd15")
    tiny.sample(model, positive, negative, start)
    full = moving("sd15").labels([[0], [1], [2]], *next(layout.grid[1:] for layout, *_ in seen if layout.layer.kind == "self"))
    items = set()
    for layout, plan, _ in seen:
        if layout.layer.kind == "self" and layout.grid[1] * layout.grid[2] == full.shape[1]:
            items.add(layout.items)
            assert torch.equal(plan.constraints[0].query[: len(layout.items)], full[list(layout.items)])
    assert len(items) == 2 and set().union(*items) == {0, 1, 2}

    seen.clear()
    video = torch.zeros(1, 16, 5, *tiny.SIZE)
    frames = torch.tensor([[(0.05 * f, 0.0, 0.05 * f + 0.3, 1.0) for f in range(5)]]).double()
    model = windows.ContextWindowsManualNode.execute(on(wan, "wan", BoxRegions(frames)), **window, dim=2).args[0]
    positive, negative, _ = inputs("wan", 1)
    tiny.sample(model, positive, negative, video)
    labels = BoxRegions(frames).labels([[f] for f in range(5)], 4, 6)
    starts = set()
    for layout, plan, _ in seen:
        if layout.layer.kind == "self":
            query = plan.constraints[0].query[0].view(layout.grid[0], -1)
            starts |= {f for f in range(5) for row in query if torch.equal(row, labels[f])}
    assert starts == {0, 1, 2, 3, 4}


def test_video_frames_map_to_latent_frames(wan, seen):
    """9 pixel frames in 3 latent ones: the box stands left in frames 0 to 4, right in 5 to 8."""
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    regions = BoxRegions(torch.tensor([[left] * 5 + [right] * 4]).double())
    positive, negative, _ = inputs("wan", 1)
    tiny.sample(on(wan, "wan", regions), positive, negative, torch.zeros(1, 16, 3, *tiny.SIZE))
    query = next(plan.constraints[0].query for layout, plan, _ in seen if layout.layer.kind == "self").view(3, 4, 6)
    assert query[:, 0].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("frames", "latents", "message"), [(4, 3, "4 frames and the video 9 .in 3 latent frames.")])
def test_frames_that_fit_neither_count_are_refused(wan, frames, latents, message):
    regions = BoxRegions(torch.tensor([[(0.0, 0.0, 0.5, 1.0)] * frames]).double())
    positive, negative, _ = inputs("wan", 1)
    with pytest.raises(ValueError, match=message):
        tiny.sample(on(wan, "wan", regions), positive, negative, torch.zeros(1, 16, latents, *tiny.SIZE))


def test_bad_runs_are_refused_before_the_first_step(sd15):
    called = []
    base = sd15.clone()
    base.add_wrapper(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
        lambda executor, *args, **kwargs: called.append(1) or executor(*args, **kwargs),
    )
    positive, negative, start = inputs("sd15")
    two = BoxRegions(torch.tensor([[(0.0, 0.0, 0.5, 1.0)] * 2]).double())
    area = [[positive[0][0], {**positive[0][1], "area": (4, 6, 0, 0), "strength": 1.0}]]
    longer = [[torch.cat([positive[0][0]] * 2, 1), positive[0][1]]]
    for model, text, message in (
        (on(base, "sd15", two), positive, "boxes has 2 frames and the latent batch 3 pictures"),
        (on(base, "sd15", steps=4), positive, "masked_steps is 4 and the sampler takes 3 steps"),
        (on(base, "sd15"), area, "positive conditioning 0 has an area"),
        (on(base, "sd15"), tiny.conditioning("sd15", ROWS, 1), "no conditioning of this run knows the objects' words"),
        (on(base, "sd15"), longer, "has 14 tokens where the block's prompt has 7"),
    ):
        with pytest.raises(ValueError, match=f"StoryweftMaskedAttention: .*{message}"):
            tiny.sample(model, text, negative, start)
    assert not called


def test_a_cross_patch_that_hides_the_words_is_refused_by_name(sd15):
    model = on(sd15, "sd15")
    model.set_model_attn2_replace(lambda q, k, v, extra: q, "output", 0)
    with pytest.raises(RuntimeError, match="test_masked_host.*cannot be told who sees which words"):
        tiny.sample(model, *inputs("sd15"))


def test_a_wan_class_with_other_tokens_is_refused(wan):
    class HumoWanModel(type(wan.model.diffusion_model)):
        pass

    model = tiny.build("wan")
    model.model.diffusion_model.__class__ = HumoWanModel
    with pytest.raises(ValueError, match="the order of tokens in HumoWanModel is not known"):
        tiny.sample(on(model, "wan"), *inputs("wan"))


def test_added_tokens_that_hide_the_picture_stop_the_run(wan, monkeypatch):
    monkeypatch.setattr(TransformerFamily, "_image", lambda self, call, tokens, count: None if call.count["hidden"] else slice(0, count))
    located = TransformerFamily.locate

    def once(self, call, args, kwargs):
        found = located(self, call, args, kwargs)
        call.count["hidden"] += 1
        return found

    monkeypatch.setattr(TransformerFamily, "locate", once)
    with pytest.raises(RuntimeError, match="attention layers of WanModel.*not known"):
        tiny.sample(on(wan, "wan"), *inputs("wan"))


def test_with_consistent_attention_objects_look_at_each_other_only(sd15, seen):
    """In either order of the nodes; drawn tokens of other pictures carry their labels."""
    rule = ConsistentRule(ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0), "all")
    one = tiny.sample(override.register(on(sd15, "sd15"), rule), *inputs("sd15"))
    both = [plan for layout, plan, _ in seen if layout.layer.kind == "self"]
    assert all(any(plan.seen) and plan.constraints for plan in both)
    assert torch.equal(one, tiny.sample(on(override.register(sd15, rule), "sd15"), *inputs("sd15")))
    assert apart(one, tiny.sample(on(sd15, "sd15"), *inputs("sd15"))) > 1e-4


def test_index_lists_are_made_once_a_run(sd15, monkeypatch):
    made, real = [], override.Run.__init__.__globals__["Divisions"].__call__.__globals__["partition"]

    def counting(*args):
        made.append(1)
        return real(*args)

    monkeypatch.setitem(override.Run.__init__.__globals__["Divisions"].__call__.__globals__, "partition", counting)
    tiny.sample(on(sd15, "sd15", steps=1), *inputs("sd15"), steps=4)
    first = len(made)
    made.clear()
    tiny.sample(on(sd15, "sd15", steps=4), *inputs("sd15"), steps=4)
    assert len(made) == first


def test_a_boundary_lies_between_steps():
    sigmas = [10.0, 5.0, 2.0, 0.0]
    assert [sum(sigma > masked.boundary(sigmas, count) for sigma in sigmas[:-1]) for count in range(4)] == [0, 1, 2, 3]
    assert MaskedOptions(part=0.05).count(40) == 2 and MaskedOptions(part=0.05).count(4) == 1
    assert MaskedOptions(part=0.0).count(40) == 0 and MaskedOptions(part=0.5, steps=3).count(40) == 3


def test_the_prompt_of_hunyuan_video_lies_between_other_text_and_references():
    class Call:
        text = torch.zeros(1, 9, 4)
        kwargs = {"ref_latent": torch.zeros(1, 16, 1, 4, 4)}

    family = TransformerFamily(tiny.build("hunyuan_video").model.diffusion_model, FORMS["HunyuanVideo"])
    layer = Layer("input", 0, 0, 0)
    assert family._text(Call, layer, slice(20, 44), 44, 44) == slice(0, 9)  # then 7 of another encoder, 4 of a reference
    family.prompt_last = True  # HunyuanVideo 1.5 puts pictures and glyphs first
    assert family._text(Call, layer, slice(20, 44), 44, 44) == slice(7, 16)


def test_a_reference_in_one_prompt_alone_has_index_lists_of_its_own(monkeypatch):
    """As with Flux Kontext: the positive's sequence is longer than the negative's, all else alike."""
    model, (positive, negative, start) = on(tiny.build("flux"), "flux", cross=False), inputs("flux", marks=False)
    latent = torch.randn(1, 16, *tiny.SIZE, generator=torch.Generator().manual_seed(4))
    positive[0][1]["reference_latents"] = [latent]
    out = tiny.sample(model, positive, negative, start)
    monkeypatch.setattr(Divisions, "__call__", lambda self, *given: partition(*given))
    assert torch.equal(tiny.sample(model, positive, negative, start), out)
