"""Frame-story boards inside ComfyUI: the laws of the house on tiny models of every family that takes captions."""

import logging
import math

import comfy.model_patcher
import comfy.samplers
import comfy_extras.nodes_custom_sampler as nodes
import pytest
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from storyweft.attention.consistent import ConsistentOptions
from storyweft.attention.masked import ANY, Constraint
from storyweft.host import families, override
from storyweft.host.board import MARK, Board, BoardText
from storyweft.host.consistent import ConsistentRule
from storyweft.host.frame_story import FrameStoryRule, check_family, prepare
from storyweft.host.rule import Rule
from storyweft.story.board import BoardShape

ID = "StoryweftFrameStoryCrossAttention"
NAMES = [name for name in tiny.FAMILIES if name != "svd"]
CROSS = ("sd15", "sd2", "sdxl", "wan", "ltxv")
CELL = (4, 6)  # 2 x 2 of them are tiny.SIZE


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def board(rows=2, columns=2, targets=None, cell=CELL, **more):
    shape = BoardShape(rows, columns)
    return Board(shape, cell, ("",) * shape.frames, targets or (True,) * shape.frames, **more)


def captioned(name, of=None, seed=1, change=None, boards=1):
    """The conditioning that StoryweftBoard makes: tokens of all captions side by side; caption `change` is another one."""
    of = of or board()
    rows = tiny.conditioning(name, boards * of.shape.frames, seed)
    text, extras = rows[0][0].clone(), dict(rows[0][1])
    if change is not None:
        text[change] += 1
    length = text.shape[1]
    joined = text.reshape(boards, of.shape.frames * length, -1)
    if "pooled_output" in extras:
        extras["pooled_output"] = extras["pooled_output"][:boards]
    if "attention_mask" in extras:
        extras["attention_mask"] = extras["attention_mask"].reshape(boards, -1)
    labels = torch.arange(of.shape.frames).repeat_interleave(length)
    return [[joined, {**extras, MARK: BoardText(of, joined, labels)}]]


def prepared(model, conditioning, summary=None):
    return prepare(families.find(model, ID), conditioning, summary, ID)


def block(model, blend=0.0, **more):
    return override.register(model, FrameStoryRule(families.find(model, ID), blend, **more))


def drawn(model, name, conditioning, blend=0.0, summary=None, start=None, negative=None, rule=None, **more):
    return tiny.sample(
        block(model, blend, **(rule or {})),
        prepared(model, conditioning, summary),
        negative or tiny.conditioning(name, 1, 2),
        tiny.latent(name, 1) if start is None else start,
        **more,
    )


def split(monkeypatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def test_it_acts_and_one_frame_alone_is_ordinary_sampling_bit_for_bit(name, patcher):
    conditioning = captioned(name)
    plain = tiny.sample(patcher, prepared(patcher, conditioning), tiny.conditioning(name, 1, 2), tiny.latent(name, 1))
    assert apart(drawn(patcher, name, conditioning), plain) > 1e-4
    one = captioned(name, board(1, 1, cell=tiny.SIZE))
    alone = tiny.sample(patcher, one, tiny.conditioning(name, 1, 2), tiny.latent(name, 1))
    assert torch.equal(drawn(patcher, name, one), alone)


def test_equal_captions_are_one_prompt(name, patcher):
    """On joint models the model itself reads the caption four times over, so there it is only near."""
    if name not in CROSS:
        return
    one = tiny.conditioning(name, 1, 5)
    text = one[0][0].repeat(1, 4, 1)
    extras = dict(one[0][1])
    if "attention_mask" in extras:
        extras["attention_mask"] = extras["attention_mask"].repeat(1, 4)
    labels = torch.arange(4).repeat_interleave(one[0][0].shape[1])
    conditioning = [[text, {**extras, MARK: BoardText(board(), text, labels)}]]
    plain = tiny.sample(patcher, one, tiny.conditioning(name, 1, 2), tiny.latent(name, 1), steps=1)
    assert apart(drawn(patcher, name, conditioning, steps=1), plain) < 2e-5


def test_cond_and_uncond_in_calls_of_their_own_change_nothing(name, patcher, monkeypatch):
    """With prompts of one length: core repeats a shorter one to batch it, which CogVideoX's joint attention notices."""
    positive = captioned(name)
    negative = tiny.conditioning(name, 1, 2, tokens=positive[0][0].shape[1])
    together = drawn(patcher, name, positive, negative=negative)
    split(monkeypatch)
    assert apart(drawn(patcher, name, positive, negative=negative), together) < 2e-5


def test_the_same_graph_twice_gives_the_same_and_the_model_without_it_is_as_before(name, patcher):
    inputs = tiny.conditioning(name, 1, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, 1)
    plain = tiny.sample(patcher, *inputs)
    model, conditioning = block(patcher), prepared(patcher, captioned(name))
    first = tiny.sample(model, conditioning, *inputs[1:])
    torch.manual_seed(99)
    assert torch.equal(first, tiny.sample(model, conditioning, *inputs[1:]))
    assert torch.equal(plain, tiny.sample(patcher, *inputs))


def known_start(name, seed=7):
    return torch.randn(tiny.latent(name, 1).shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clean", [False, True])
def test_known_frames_come_back_bit_for_bit_whatever_their_caption_says(name, patcher, clean):
    of = board(targets=(False, True, True, False))
    start = known_start(name)
    outs = [
        drawn(patcher, name, captioned(name, of, change=change), start=start, noise_mask=of.mask()[None],
              rule={"clean": clean})
        for change in (None, 0)
    ]  # fmt: skip
    known = of.mask() == 0
    for out in outs:
        assert torch.equal(out[..., known], start[..., known])
        assert not torch.equal(out[..., ~known], start[..., ~known])
    assert not torch.equal(*outs)
    torch.testing.assert_close(board().frames(outs[0])[0], start[0, ..., : CELL[0], : CELL[1]], atol=0, rtol=0)


def test_clean_known_frames_enter_the_model_without_noise(name, patcher):
    of, start, seen = board(targets=(False, True, True, False)), known_start(name), []
    conditioning = captioned(name, of)

    def look(executor, x, t, *args, **kwargs):
        seen.append(patcher.model.model_sampling.calculate_input(t, x))
        return executor(x, t, *args, **kwargs)

    model = block(patcher, clean=True)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
    tiny.sample(
        model, prepared(patcher, conditioning), tiny.conditioning(name, 1, 2), start, noise_mask=of.mask()[None]
    )
    known, clean = of.mask() == 0, patcher.model.process_latent_in(start)
    assert seen
    for x in seen:
        torch.testing.assert_close(x[:1, ..., known], clean[..., known], atol=1e-4, rtol=1e-4)
        assert (x[:1, ..., ~known] - clean[..., ~known]).abs().max() > 0.1


def test_nothing_to_draw_means_no_sampling(name, patcher, caplog):
    of, start = board(targets=(False,) * 4), known_start(name)
    model = block(patcher)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "never", None)
    with caplog.at_level(logging.WARNING):
        out = tiny.sample(
            model,
            prepared(patcher, captioned(name, of)),
            tiny.conditioning(name, 1, 2),
            start,
            noise_mask=of.mask()[None],
        )
    assert torch.equal(out, start)
    assert "every frame of the board is known" in caplog.text


def dense(text, cells):
    """Logit offsets [1, 1, Q, K] of a frame branch as one full mask, the form that is never built outside tests."""
    bias = torch.full((1, 1, len(cells), len(text)), -1e9)
    bias[0, 0][cells[:, None] == text] = 0
    return bias


def cells_of(height, width):
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return (y >= height // 2).long().mul(2).add((x >= width // 2).long()).flatten()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_on_unets_it_equals_one_fully_masked_attention_in_every_layer(family):
    model = tiny.build(family)
    conditioning = captioned(family)
    text = conditioning[0][0]
    labels = conditioning[0][1][MARK].labels
    reference = model.clone()
    for module, place in [
        (layer.attn2, (path, index, depth))
        for path, blocks in (("input", model.model.diffusion_model.input_blocks), ("middle", [model.model.diffusion_model.middle_block]),
                             ("output", model.model.diffusion_model.output_blocks))
        for index, part in enumerate(blocks) for holder in part if hasattr(holder, "transformer_blocks")
        for depth, layer in enumerate(holder.transformer_blocks)
    ]:  # fmt: skip

        def replace(q, k, v, extra, module=module):
            rows = extra["cond_or_uncond"].index(0)
            heads, (height, width) = extra["n_heads"], extra["activations_shape"][2:]
            out = optimized_attention(q, k, v, heads)
            mask = dense(labels, cells_of(height, width))
            own = optimized_attention(q[rows : rows + 1], module.to_k(text), module.to_v(text), heads, mask=mask)
            out[rows : rows + 1] = own
            return out

        reference.set_model_attn2_replace(replace, *place[:2], place[2])
    mine = drawn(model, family, conditioning)
    theirs = tiny.sample(
        reference, prepared(model, conditioning), tiny.conditioning(family, 1, 2), tiny.latent(family, 1)
    )
    assert apart(mine, theirs) < 2e-5


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "zimage", "wan", "ltxv"])
def test_on_transformers_it_equals_one_fully_masked_attention(family):
    model = tiny.build(family)
    conditioning = captioned(family)
    labels = conditioning[0][1][MARK].labels
    text, grid = len(labels), [math.ceil(s / p) for s, p in zip((1, *tiny.latent(family, 1).shape[2:])[-3:],
                               families.find(model, ID).form.patch, strict=True)]  # fmt: skip
    count, joint = math.prod(grid), family not in ("wan", "ltxv")
    cells = cells_of(*grid[1:]).repeat(grid[0])
    padded = [math.ceil(n / 32) * 32 if family == "zimage" else n for n in (text, count)]

    def masked(func, q, k, v, *args, **kwargs):
        lengths = [x.shape[2] if kwargs.get("skip_reshape") else x.shape[1] for x in (q, k)]
        own = kwargs["transformer_options"]["cond_or_uncond"] == [0]
        if own and not joint and lengths == [count, text]:
            mask = dense(labels, cells)
        elif own and joint and lengths == [sum(padded)] * 2:
            start = padded[0]
            mask = torch.zeros(1, 1, *lengths)
            mask[:, :, start : start + count, :text] = dense(labels, cells)
        else:
            return func(q, k, v, *args, **kwargs)
        given = args[1] if len(args) > 1 else kwargs.pop("mask", None)
        if given is not None:
            mask = mask + given
        heads = args[0] if args else kwargs.pop("heads")
        return func(q, k, v, heads, mask=mask, **kwargs)

    reference = model.clone()
    reference.model_options["transformer_options"]["optimized_attention_override"] = masked
    theirs = tiny.sample(reference, conditioning, tiny.conditioning(family, 1, 2), tiny.latent(family, 1))
    assert apart(drawn(model, family, conditioning), theirs) < 5e-5
    plain = tiny.sample(model, conditioning, tiny.conditioning(family, 1, 2), tiny.latent(family, 1))
    assert apart(theirs, plain) > 1e-4


@pytest.mark.parametrize("family", CROSS)
def test_the_story_branch_reads_all_captions_or_the_summary(family):
    model, conditioning = tiny.build(family), captioned(family)
    outs = {blend: drawn(model, family, conditioning, blend) for blend in (0.0, 0.3, 1.0)}
    assert apart(outs[0.3], outs[0.0]) > 1e-5 and apart(outs[0.3], outs[1.0]) > 1e-5
    told = tiny.conditioning(family, 1, 55)
    with_summary = drawn(model, family, conditioning, 1.0, told)
    plain = [told[0][0], conditioning[0][1]]
    if "attention_mask" in plain[1]:
        plain[1] = plain[1] | told[0][1]
    plain = tiny.sample(model, [plain], tiny.conditioning(family, 1, 2), tiny.latent(family, 1))
    assert apart(with_summary, plain) < 5e-5
    assert apart(drawn(model, family, conditioning, 0.0, told), outs[0.0]) < 5e-5


def test_outside_its_layers_and_steps_the_whole_story_is_read(sd15, caplog):
    conditioning = captioned("sd15")
    story, frame = (drawn(sd15, "sd15", conditioning, blend, steps=4) for blend in (1.0, 0.0))
    never = drawn(sd15, "sd15", conditioning, steps=4, rule={"sigma_range": (1e9, 1e8)})
    assert "every frame read the whole story: no step of this run lies in its range" in caplog.text
    assert torch.equal(never, story)
    part = drawn(sd15, "sd15", conditioning, steps=4, rule={"layers": "output path"})
    assert apart(part, story) > 1e-5 and apart(part, frame) > 1e-5


def test_guidance_parts_other_than_the_boards_are_left_alone(sd15):
    """cfg 1, two positives, DualCFG: the negative answers for itself, whatever its number or place."""
    conditioning = captioned("sd15")
    model, positive = block(sd15), prepared(sd15, conditioning)
    negative, start = tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 1)
    alone = tiny.sample(model, positive, negative, start, cfg=1.0)
    assert apart(tiny.sample(model, positive, tiny.conditioning("sd15", 1, 77), start, cfg=1.0), alone) < 2e-5
    usual = tiny.sample(model, positive, negative, start)
    assert apart(tiny.sample(model, [*positive, *positive], negative, start), usual) < 2e-5
    guider = nodes.Guider_DualCFG(model)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(3.0, 3.0)
    ks = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal", 1.0, model.model_options)
    noise = comfy.sample.prepare_noise(start, 0, [0])
    out = guider.sample(noise, start, comfy.samplers.sampler_object("euler"), ks.sigmas, disable_pbar=True, seed=0)
    assert apart(out, usual) < 2e-5


def test_boards_of_one_batch_share_captions_or_have_their_own(sd15):
    start = tiny.latent("sd15", 2)
    shared = drawn(sd15, "sd15", captioned("sd15"), start=start)
    assert apart(shared[:1], drawn(sd15, "sd15", captioned("sd15"))) < 2e-5
    own = drawn(sd15, "sd15", captioned("sd15", boards=2), start=start)
    changed = captioned("sd15", boards=2, change=5)
    moved = drawn(sd15, "sd15", changed, start=start)
    assert apart(moved[0], own[0]) < 2e-5 and apart(moved[1], own[1]) > 1e-5


def test_captions_are_projected_once_a_run_and_no_batch_is_made_of_frames(sd15):
    counts, queries = [], []
    layer = sd15.model.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn2
    hooks = [
        layer.to_k.register_forward_hook(lambda module, args, out: counts.append(out.shape[:2])),
        layer.to_q.register_forward_hook(lambda module, args, out: queries.append(out.shape[0])),
    ]
    try:
        drawn(sd15, "sd15", captioned("sd15"), 0.2, steps=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts.count((1, 4 * 7)) == 1 and counts.count((2, 7)) == 3 and len(counts) == 4
    assert queries == [2, 2, 2]


def test_a_lora_hooked_conditioning_is_projected_at_every_step(sd15):
    """Hooks may change weights from step to step; keys kept from the first one would be stale."""
    counts = []
    layer = sd15.model.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn2
    handle = layer.to_k.register_forward_hook(lambda module, args, out: counts.append(out.shape[1]))
    model, positive = block(sd15), prepared(sd15, captioned("sd15"))
    rule = override.rules_of(model)[0]

    class Hooked(dict):
        def get(self, key, default=None):
            return "some" if key == "hooks" else super().get(key, default)

    old = rule._keys

    def keys(run, layout, chunk, text, asked):
        object.__setattr__(layout.entries[chunk], "cond", Hooked(layout.entries[chunk].cond))
        return old(run, layout, chunk, text, asked)

    rule._keys = keys
    try:
        tiny.sample(model, positive, tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 1), steps=3)
    finally:
        handle.remove()
    assert counts.count(28) == 3


class Words(Rule):
    """Stands in for masked attention: in the left half of the picture only the first word of each caption is seen."""

    node_id = "StoryweftMaskedAttention"
    kinds = frozenset({"cross"})

    def plan(self, run, call, layout, plan):
        for chunk, entry in enumerate(layout.entries):
            if entry.role == "positive":
                for branch in plan.text[chunk]:
                    words = torch.arange(branch.k.shape[2]) % 7
                    left = torch.arange(layout.grid[2]).repeat(layout.grid[1]) < layout.grid[2] // 2
                    query = torch.where(left, 0, ANY)[None]
                    branch.constraints.append(Constraint(query, words[None], ("words", layout.grid)))
        return True


def test_another_rules_words_narrow_the_captions(sd15):
    conditioning = captioned("sd15")
    model = override.register(block(sd15), Words())
    positive = prepared(sd15, conditioning)
    out = tiny.sample(model, positive, tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 1), steps=1)
    assert apart(out, drawn(sd15, "sd15", conditioning, steps=1)) > 1e-5
    text = conditioning[0][0].clone()
    first = torch.arange(28) % 7 == 0
    text[:, ~first & (torch.arange(28) // 7 % 2 == 0)] += 1  # other words of the frames on the left, which nobody sees
    other = [[text, {**conditioning[0][1], MARK: BoardText(board(), text, conditioning[0][1][MARK].labels)}]]
    moved = tiny.sample(model, prepared(sd15, other), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 1), steps=1)
    assert apart(moved, out) < 2e-5
    assert apart(drawn(sd15, "sd15", other, steps=1), out) > 1e-5


def test_consistent_self_attention_joins_boards_of_one_batch(sd15):
    """A single board has nobody to share with: one latent row. Two boards share, in either order of the nodes."""
    options = ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0)
    negative, positive = tiny.conditioning("sd15", 1, 2), prepared(sd15, captioned("sd15"))
    both = [
        override.register(block(sd15), ConsistentRule(options, "output path")),
        block(override.register(sd15, ConsistentRule(options, "output path"))),
    ]
    alone = drawn(sd15, "sd15", captioned("sd15"))
    assert torch.equal(tiny.sample(both[0], positive, negative, tiny.latent("sd15", 1)), alone)
    outs = [tiny.sample(model, positive, negative, tiny.latent("sd15", 2)) for model in both]
    assert torch.equal(*outs)
    assert apart(outs[0], drawn(sd15, "sd15", captioned("sd15"), start=tiny.latent("sd15", 2))) > 1e-4


def test_nothing_stays_after_a_failed_run(sd15):
    good = drawn(sd15, "sd15", captioned("sd15"))
    broken = sd15.clone()

    def fail(n, context, value, extra):
        raise RuntimeError("somebody else's patch")

    broken.set_model_attn1_patch(fail)
    with pytest.raises(RuntimeError, match="somebody else"):
        drawn(broken, "sd15", captioned("sd15"))
    assert torch.equal(good, drawn(sd15, "sd15", captioned("sd15")))


def test_a_replace_patch_that_answers_the_prompt_itself_is_named(sd15):
    model = sd15.clone()
    model.set_model_attn2_replace(lambda q, k, v, extra: q, "output", 0)
    with pytest.raises(RuntimeError, match="output block 0.0 .cross. is answered by the attn2 replace patch"):
        drawn(model, "sd15", captioned("sd15"))


def refused(model, conditioning, start, sentence, positive=None, **more):
    with pytest.raises(ValueError, match=f"{ID}: {sentence}"):
        tiny.sample(
            block(model), positive or prepared(model, conditioning), tiny.conditioning("sd15", 1, 2), start, **more
        )


def test_a_run_that_does_not_fit_the_board_is_refused_before_the_first_step(sd15):
    conditioning, start = captioned("sd15"), tiny.latent("sd15", 1)
    refused(sd15, conditioning, tiny.latent("sd15", 1, (8, 8)), "the latent is 8 x 8 cells .* 2 x 2 frames 8 x 12")
    refused(sd15, captioned("sd15", boards=2), tiny.latent("sd15", 3), "the latent holds 3 boards .* captions for 2")
    refused(sd15, conditioning, start, "no conditioning of this run carries a board", tiny.conditioning("sd15", 1, 1))
    area = [[text, {**extras, "area": (4, 6, 0, 0)}] for text, extras in prepared(sd15, conditioning)]
    refused(sd15, conditioning, start, "the conditioning has an area", area)
    other = [[text + 1, extras] for text, extras in prepared(sd15, conditioning)]
    refused(sd15, conditioning, start, "the prompt was changed after this node", other)
    known = captioned("sd15", board(targets=(False, True, True, True)))
    refused(sd15, known, known_start("sd15"), "the board has known frames and the latent no mask")


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "zimage"])
def test_joint_models_refuse_a_story_branch_by_name(family):
    model = tiny.build(family)
    found = families.find(model, ID)
    with pytest.raises(
        ValueError, match=f"blend is 0.2 and {found.model_class} reads text and picture in one sequence"
    ):
        check_family(found, model, prepared(model, captioned(family)), 0.2, ID)
    told = prepared(model, captioned(family), tiny.conditioning(family, 1, 3))
    with pytest.raises(ValueError, match=f"summary is connected and {found.model_class} has no story branch"):
        check_family(found, model, told, 0.0, ID)


def test_video_unets_are_refused_by_name():
    model = tiny.build("svd")
    with pytest.raises(ValueError, match="UNetModel with temporal layers takes no captions"):
        check_family(families.find(model, ID), model, prepared(model, captioned("svd")), 0.0, ID)


@pytest.mark.parametrize(("family", "cell", "sentence"), [
    ("sd15", (4, 5), "frames of 40 x 32 pixels are not a multiple of 16, .* tokens of UNetModel; use 32 x 32 or 48 x 32"),
    ("sd15", (3, 5), "frames of 40 x 24 pixels .* use 32 x 16 or 48 x 16 or 32 x 32 or 48 x 32"),
    ("flux", (4, 7), "frames of 56 x 32 pixels are not a multiple of 16, .* tokens of Flux; use 48 x 32 or 64 x 32"),
])  # fmt: skip
def test_borders_inside_tokens_are_refused_with_the_nearest_sizes(family, cell, sentence):
    model = tiny.build(family)
    of = board(cell=cell)
    with pytest.raises(ValueError, match=f"{ID}: {sentence}"):
        check_family(families.find(model, ID), model, prepared(model, captioned(family, of)), 0.0, ID)


def test_a_board_larger_than_sd15_draws_well_is_warned_of(sd15, caplog):
    with caplog.at_level(logging.WARNING):
        check_family(families.find(sd15, ID), sd15, prepared(sd15, captioned("sd15", board(cell=(64, 64)))), 0.0, ID)
        assert not caplog.text
        check_family(families.find(sd15, ID), sd15, prepared(sd15, captioned("sd15", board(cell=(72, 64)))), 0.0, ID)
    assert "the board is 1024 x 1152 pixels" in caplog.text
