"""The Semantic Motion Predictor in tiny video models: each way in against the same written by hand, and the house's laws."""

import comfy.context_windows
import comfy.model_patcher
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from blocks import apart
from comfy.ldm.modules.attention import optimized_attention
from storyweft.host import families, motion
from storyweft.host.image_adapter import LoadedAdapter, channels, load_demo
from storyweft.host.motion import Attachment, LoadedPredictor, attach
from storyweft.models.ip_adapter import ImageAdapter, Standard, in_file_order
from storyweft.models.motion_predictor import MotionPredictor
from test_apa_host import guided
from test_demo_video import loaded  # noqa: F401

FRAMES, WIDTH = 3, 24


def embeddings(frames=FRAMES, width=WIDTH, seed=7):
    return torch.randn(frames, width, generator=torch.Generator().manual_seed(seed))


def given(frames=FRAMES, width=WIDTH, **more):
    return Attachment(embeddings(frames, width), 2, frames, **more)


def adapter_of(sizes, width, kind=None):
    network = ImageAdapter(kind or Standard(WIDTH, width, 4), sizes)
    tiny.fill(network, 1)
    return LoadedAdapter("tiny", network.requires_grad_(False))


def projecting(width, tokens=2):
    """A predictor with a projection for prompts `width` wide."""
    network = MotionPredictor(WIDTH, 16, 2, 8, 1)
    network.context_proj = Standard(WIDTH, width, tokens)
    tiny.fill(network, 2)
    return LoadedPredictor("tiny", network.requires_grad_(False))


def unet_adapter(patcher):
    return adapter_of(*channels(families.find(patcher, "test")))


def inputs(name, rows=FRAMES):
    return tiny.conditioning(name, 1, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


def drawn(name, patcher, attachment, rows=FRAMES, **more):
    positive, negative, start = inputs(name, rows)
    model, positive, negative = attach(patcher, positive, negative, attachment)
    return tiny.sample(model, positive, negative, start, **more)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


@pytest.fixture(scope="module")
def svd():
    return tiny.build("svd")


@pytest.fixture(scope="module")
def wan():
    return tiny.build("wan")


def prompt_rows_by_hand(patcher, attachment, frames=FRAMES):
    """The paper's form without a patch: rows put into the conditioning itself, those of zeros into the negative."""
    projection = attachment.predictor.network.context_proj
    positive, negative, start = inputs("sd15", frames)
    text, extras = positive[0]
    shown = torch.cat([text.expand(frames, -1, -1), projection(attachment.embeddings)], 1)
    blank = torch.cat([negative[0][0], projection(torch.zeros(1, WIDTH))], 1)
    return [[shown, extras]], [[blank, negative[0][1]]], start


def test_rows_of_the_prompt_are_the_papers_one_context(sd15):
    attachment = given(predictor=projecting(16))
    reference = tiny.sample(sd15, *prompt_rows_by_hand(sd15, attachment))
    assert apart(drawn("sd15", sd15, attachment), reference) < 2e-5
    assert apart(drawn("sd15", sd15, attachment), tiny.sample(sd15, *inputs("sd15"))) > 1e-3


def adapter_by_hand(patcher, attachment, strength):
    model, network = patcher.clone(), attachment.adapter.network
    family = families.find(patcher, "test")
    tokens = (network.image_proj(attachment.embeddings), network.image_proj(torch.zeros(1, WIDTH)))
    for index, layer in enumerate(in_file_order(family.cross_layers)):

        def patch(q, k, v, extra, index=index):
            rows = len(q) // len(extra["cond_or_uncond"])
            seen = torch.cat([tokens[number].expand(rows, -1, -1) for number in extra["cond_or_uncond"]])
            own = network.project(index, seen)
            return optimized_attention(q, k, v, extra["n_heads"]) + strength * optimized_attention(
                q, *own, extra["n_heads"]
            )

        model.set_model_attn2_replace(patch, layer.path, layer.block, layer.depth)
    return model


def test_an_adapter_answers_each_frame_by_its_embedding(sd15):
    attachment = given(adapter=unet_adapter(sd15), strength=0.8)
    reference = tiny.sample(adapter_by_hand(sd15, attachment, 0.8), *inputs("sd15"))
    assert apart(drawn("sd15", sd15, attachment), reference) < 2e-5


@pytest.mark.parametrize("form", ["adapter", "rows"])
def test_frames_without_temporal_layers_are_independent(sd15, form):
    """Another embedding of frame 2 changes frame 2 and nothing else."""
    more = {"adapter": unet_adapter(sd15)} if form == "adapter" else {"predictor": projecting(16)}
    first, other = given(**more), given(**more)
    other.embeddings[2] += 1
    a, b = (drawn("sd15", sd15, one) for one in (first, other))
    assert torch.equal(a[:2], b[:2])
    assert apart(a[2], b[2]) > 1e-4


@pytest.mark.parametrize("name", ["sd15", "svd", "wan"])
def test_strength_zero_is_the_model_without_the_block(name, request):
    patcher = request.getfixturevalue(name)
    frames = 5 if name == "wan" else FRAMES
    more = {"adapter": wan_adapter(patcher)} if name == "wan" else {"adapter": unet_adapter(patcher)}
    attachment = given(frames, 16, strength=0.0) if name == "svd" else given(frames, strength=0.0, **more)
    rows = 1 if name == "wan" else FRAMES
    assert torch.equal(drawn(name, patcher, attachment, rows), tiny.sample(patcher, *inputs(name, rows)))


@pytest.mark.parametrize("form", ["adapter", "rows"])
def test_calls_of_their_own_and_other_guiders_change_nothing(sd15, form, monkeypatch):
    attachment = given(**({"adapter": unet_adapter(sd15)} if form == "adapter" else {"predictor": projecting(16)}))
    together = drawn("sd15", sd15, attachment)
    positive, negative, start = inputs("sd15")
    model, *_ = attach(sd15, positive, negative, attachment)
    dual = custom.Guider_DualCFG(model)
    dual.set_conds(positive, positive, negative)
    dual.set_cfg(3.0, 3.0)
    assert apart(guided(dual, model, start), together) < 2e-5
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(drawn("sd15", sd15, attachment), together) < 2e-5


def test_keys_of_the_rows_are_projected_once_a_run(sd15, monkeypatch):
    attachment, calls = given(predictor=projecting(16)), []
    family = families.find(sd15, "test")
    project = type(family).project
    monkeypatch.setattr(
        type(family), "project", lambda self, layer, tokens: calls.append(layer) or project(self, layer, tokens)
    )
    drawn("sd15", sd15, attachment, steps=3)
    assert sorted(map(str, calls)) == sorted([*map(str, family.cross_layers)] * 2)  # for the pictures and for none


def test_context_windows_move_over_the_film(sd15):
    """Core's windows slice the conditioning of the reference; the rule follows the window by itself."""
    attachment = given(8, predictor=projecting(16))

    def windowed(model):
        model = model.clone()
        model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=4,
            context_overlap=2,
            dim=0,
        )
        comfy.context_windows.create_prepare_sampling_wrapper(model)
        return model

    positive, negative, start = prompt_rows_by_hand(sd15, attachment, 8)
    reference = tiny.sample(windowed(sd15), positive, negative, start)
    model, *_ = attach(sd15, *inputs("sd15", 8)[:2], attachment)
    assert apart(tiny.sample(windowed(model), *inputs("sd15", 8)), reference) < 2e-5


def test_svd_reads_one_row_a_frame_and_zeros_in_the_negative(svd):
    attachment = given(width=16)
    positive, negative, start = inputs("svd")
    model, shown, blank = attach(svd, positive, negative, attachment)
    assert shown[0][0].shape == (FRAMES, 1, 16) and torch.equal(shown[0][0][:, 0], attachment.embeddings)
    assert blank[0][0].shape == (1, 1, 16) and not blank[0][0].any()
    assert shown[0][1]["concat_latent_image"] is positive[0][1]["concat_latent_image"]
    assert positive[0][0].shape == (1, 1, 16)  # the caller's own is left alone
    contexts = []

    def record(apply, arguments):
        contexts.append(arguments["c"]["c_crossattn"])
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(record)
    tiny.sample(model, shown, blank, start)
    halves = contexts[0].chunk(2)
    shown_half = next(half for half in halves if half.any())
    assert torch.equal(shown_half[:, 0], attachment.embeddings)
    assert sum(bool(half.any()) for half in halves) == 1


def test_svds_temporal_layers_read_the_first_frames_embedding(svd):
    """Another first row reaches every frame, another third row mostly its own: why the first must stay as it is."""
    network = svd.model.diffusion_model
    x = torch.randn(FRAMES, 8, *tiny.SIZE, generator=torch.Generator().manual_seed(1))
    arguments = {"timesteps": torch.full((FRAMES,), 1.0), "y": torch.zeros(FRAMES, 768)}

    def changed(row):
        rows = embeddings(width=16)[:, None].clone()
        rows[row] += 2
        return network(x, context=rows, num_video_frames=FRAMES, **arguments)

    with torch.inference_mode():
        plain = network(x, context=embeddings(width=16)[:, None], num_video_frames=FRAMES, **arguments)
        first, third = ((changed(row) - plain).abs().amax((1, 2, 3)) for row in (0, 2))
    assert first[1:].min() > 1e-4
    assert third[2] > 2 * third[:2].max()


def test_one_token_adds_the_same_to_every_place(svd):
    """With one row the softmax is 1: an SVD layer answers W_out(W_v P)."""
    attention = families.find(svd, "test").modules[families.find(svd, "test").cross_layers[0]]
    x = torch.randn(1, 6, attention.to_q.in_features)
    row = embeddings(1, 16)[:, None]
    with torch.inference_mode():
        found = attention(x, context=row)
        torch.testing.assert_close(found, attention.to_out(attention.to_v(row)).expand_as(found), rtol=0, atol=1e-6)


def wan_adapter(patcher):
    family = families.find(patcher, "test")
    return adapter_of([family.width] * len(family.cross_layers), 20)


def wan_by_hand(patcher, attachment, means):
    """Each block's cross-attention with the answer of its latent frame's rows added before the output projection."""
    network, handles = attachment.adapter.network, []
    tokens = network.image_proj(means)
    for index, block in enumerate(patcher.model.diffusion_model.blocks):

        def hook(attention, arguments, out, index=index):
            q = attention.norm_q(attention.q(arguments[0]))
            parts = [
                optimized_attention(part, *network.project(index, tokens[f : f + 1]), attention.num_heads)
                for f, part in enumerate(q.chunk(len(tokens), 1))
            ]
            return out + torch.nn.functional.linear(torch.cat(parts, 1), attention.o.weight)

        handles.append(block.cross_attn.register_forward_hook(hook))
    return handles


def test_wan_reads_the_mean_of_each_latent_frame(wan):
    attachment = given(5, adapter=wan_adapter(wan))
    found = drawn("wan", wan, attachment, 1, cfg=1.0)
    means = torch.stack([attachment.embeddings[0], attachment.embeddings[1:].mean(0)])
    with torch.inference_mode():
        handles = wan_by_hand(wan, attachment, means)
    reference = tiny.sample(wan, *inputs("wan", 1), cfg=1.0)
    for handle in handles:
        handle.remove()
    assert apart(found, reference) < 2e-5
    assert apart(found, tiny.sample(wan, *inputs("wan", 1), cfg=1.0)) > 1e-3
    guided_by = drawn("wan", wan, attachment, 1, cfg=3.0)
    assert guided_by.isfinite().all() and apart(guided_by, found) > 1e-3


@pytest.mark.parametrize("name", ["flux", "ltxv", "qwen_image", "hunyuan_video"])
def test_models_without_such_attention_are_refused_with_the_reason(name):
    with pytest.raises(
        ValueError, match=rf"{motion.NODE_ID}: \w+ has no cross-attention over embeddings.*nodes of its own"
    ):
        drawn(name, tiny.build(name), given())


def test_wan_without_weights_names_what_core_has(wan):
    with pytest.raises(ValueError, match="no weights are published.*WanFirstLastFrameToVideo"):
        drawn("wan", wan, given(5))
    with pytest.raises(ValueError, match="film has 6 frames.*set frames_per_transition to 5 or 9, not 6"):
        drawn("wan", wan, given(6, adapter=wan_adapter(wan)))
    with pytest.raises(ValueError, match="film has 3 latent frames .9 pictures. and the latent 2"):
        drawn("wan", wan, given(9, adapter=wan_adapter(wan)), 1)
    with pytest.raises(ValueError, match="tiny has 2 layers 10 wide and the model 4 blocks 96 wide"):
        drawn("wan", wan, given(5, adapter=adapter_of([10, 10], 20)))


def test_what_does_not_fit_a_unet_is_refused(sd15, svd):
    for attachment, words in (
        (given(), "connect an image_adapter of its family"),
        (given(how="image adapter"), "attach is image adapter and image_adapter is not connected"),
        (given(predictor=projecting(10)), "rows are 10 wide and the model's prompt 16"),
        (given(how="rows of the prompt"), "rows are 24 wide and the model's prompt 16"),
        (given(predictor=projecting(16), strength=0.5), "strength is 0.5 and rows of the prompt share its softmax"),
        (given(adapter=adapter_of([8, 8], 16)), "was made for"),
        (given(width=30, adapter=unet_adapter(sd15)), "24 wide and clip_vision gives 30"),
    ):
        with pytest.raises(ValueError, match=rf"{motion.NODE_ID}.*{words}"):
            drawn("sd15", sd15, attachment)
    for attachment, words in (
        (given(), "embeddings 16 wide and clip_vision gives 24"),
        (given(width=16, strength=0.5), "SVD reads the embeddings by itself.*0.5"),
    ):
        with pytest.raises(ValueError, match=rf"{motion.NODE_ID}.*{words}"):
            drawn("svd", svd, attachment)


@pytest.mark.parametrize("form", ["adapter", "rows", "svd"])
def test_a_latent_of_another_length_is_refused_before_the_model_is_called(sd15, svd, form):
    patcher, name = (svd, "svd") if form == "svd" else (sd15, "sd15")
    more = {"adapter": {"adapter": unet_adapter(sd15)}, "rows": {"predictor": projecting(16)}, "svd": {"width": 16}}[
        form
    ]
    calls = []
    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(lambda apply, arguments: calls.append(1))
    with pytest.raises(ValueError, match="film has 3 frames and the latent 5"):
        drawn(name, patcher, given(**more), 5)
    assert not calls


def test_a_conditioning_of_other_rows_is_not_cycled(sd15):
    model, *_ = attach(sd15, *inputs("sd15")[:2], given(adapter=unet_adapter(sd15)))
    two = tiny.conditioning("sd15", 2, 1)
    with pytest.raises(ValueError, match="positive conditioning has 2 rows and the film 3 frames"):
        tiny.sample(model, two, *inputs("sd15")[1:])


def test_the_demo_video_model_sees_its_frames(loaded):  # noqa: F811
    """Temporal layers carry a frame's embedding to the others, and every cross-attention layer is reached."""
    patcher = loaded[0]
    attachment = Attachment(embeddings(8, 96), 2, 8, None, load_demo())
    positive = [[torch.randn(1, 77, 96, generator=torch.Generator().manual_seed(3)), {}]]
    start = torch.zeros(8, 4, 16, 16)
    model, *_ = attach(patcher, positive, positive, attachment)
    plain, shown = (tiny.sample(one, positive, positive, start, steps=2) for one in (patcher, model))
    assert apart(shown, plain) > 1e-3


def test_prompts_of_the_pictures_are_spread_over_the_frames_between(sd15):
    """One row for each picture becomes one for each frame, and marks of a story's panels follow."""
    positive = tiny.conditioning("sd15", 3, 1, marks={"storyweft_panels": (4, 5, 6), "note": "kept"})
    attachment = Attachment(embeddings(7), 3, 4, None, unet_adapter(sd15))
    _, shown, blank = attach(sd15, positive, tiny.conditioning("sd15", 1, 2), attachment)
    near = [0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(shown[0][0], positive[0][0][near]) and blank[0][0].shape[0] == 1
    assert shown[0][1]["storyweft_panels"] == (4, 4, 5, 5, 5, 6, 6) and shown[0][1]["note"] == "kept"
    assert positive[0][0].shape[0] == 3
