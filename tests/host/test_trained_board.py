"""A trained board in ComfyUI: against the module that trainers put into the U-Net, and the laws of the house."""

import comfy.model_patcher
import pytest
import tiny
import torch
from blocks import trained_module
from comfy.ldm.modules.attention import BasicTransformerBlock
from safetensors.torch import save_file
from storyweft.host import families, override
from storyweft.host.board import MARK
from storyweft.host.trained_board import LoadedBoard, TrainedBoardRule, check, load, negative_board
from storyweft.models.story_board import ContextExtractor, prior_board
from storyweft.models.trained_board import BoardModule, SiteAttention
from storyweft.nodes.trained_board import TrainedBoardBlock
from test_board_host import apart, block, board, captioned, known_start, prepared

NAMES = ("sd15", "sd2", "sdxl")
ID = "StoryweftTrainedBoard"


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def inputs(patcher, name, of=None, **more):
    positive = prepared(patcher, captioned(name, of, **more))
    return positive, negative_board(tiny.conditioning(name, 1, 2), positive)


def drawn(patcher, name, loaded, start=None, of=None, strength=1.0, clean=True, **more):
    rule = TrainedBoardRule(families.find(patcher, "test"), loaded, strength, clean)
    start = tiny.latent(name, 1) if start is None else start
    return tiny.sample(override.register(patcher, rule), *inputs(patcher, name, of), start, **more)


def by_hand(patcher, loaded, positive, negative):
    """The trainer's own attention in a copy of the U-Net, called for one chunk at a time."""
    copy = comfy.model_patcher.CoreModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)
    network, shared = patcher.model.diffusion_model, {}
    blocks = [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
    marks = (positive[0][1][MARK], negative[0][1][MARK])
    found = []
    for mark in marks:
        frames = mark.board.shape.frames
        words = mark.captions.unflatten(1, (frames, -1))
        found.append((words, loaded.network.ctx(words, torch.tensor(mark.board.targets)[None])))

    def call(apply, arguments):
        outs = []
        for x, t, number in zip(
            arguments["input"].chunk(2), arguments["timestep"].chunk(2), arguments["cond_or_uncond"], strict=True
        ):
            words, context = found[number]
            shared.update(captions=words, story=context.story, grid=marks[0].board.grid, size=marks[0].board.size)
            rest = {
                key: value.chunk(2)[len(outs)] if torch.is_tensor(value) and len(value) == 2 else value
                for key, value in arguments["c"].items()
            }
            prior = prior_board(context.prior, marks[0].board.grid, marks[0].board.cell)
            handle = network.register_forward_pre_hook(lambda m, a, prior=prior: (a[0] + prior, *a[1:]))
            outs.append(apply(x, t, **rest))
            handle.remove()
        return torch.cat(outs)

    copy.set_model_unet_function_wrapper(call)
    return copy, blocks, shared


def test_it_is_what_the_trainer_trains(name, patcher):
    """Frame and story branch with LoRA, gates and prior, of conditional and unconditional rows."""
    loaded = trained_module(patcher)
    found = drawn(patcher, name, loaded)
    positive, negative = inputs(patcher, name)
    with torch.inference_mode():
        copy, blocks, shared = by_hand(patcher, loaded, positive, negative)
    plain = [one.attn2 for one in blocks]
    family = families.find(patcher, "test")
    order = [family.modules[layer] for layer in family.cross_layers]
    try:
        for one in blocks:
            one.attn2 = SiteAttention(one.attn2, loaded.network.sites[order.index(one.attn2)], shared)
        reference = tiny.sample(copy, positive, negative, tiny.latent(name, 1))
    finally:
        for one, attention in zip(blocks, plain, strict=True):
            one.attn2 = attention
    assert apart(found, reference) < 2e-5
    assert apart(found, drawn(patcher, name, loaded, strength=0.0)) > 1e-3


def test_strength_zero_is_the_frame_branch_alone(name, patcher):
    free = tiny.sample(block(patcher, clean=True), *inputs(patcher, name), tiny.latent(name, 1))
    assert torch.equal(drawn(patcher, name, trained_module(patcher), strength=0.0), free)


def test_a_module_that_was_not_trained_starts_at_the_frame_branch(sd15):
    family = families.find(sd15, "test")
    layers = [family.modules[layer].to_k for layer in family.cross_layers]
    fresh = BoardModule(
        ContextExtractor(16, 2, 1, 1, 3, 5, 6, 12, (4, 4)), [x.out_features for x in layers], 16, 2, 2.0
    )
    free = tiny.sample(block(sd15, clean=True), *inputs(sd15, "sd15"), tiny.latent("sd15", 1))
    assert apart(drawn(sd15, "sd15", LoadedBoard("fresh", fresh.requires_grad_(False))), free) < 1e-6


def test_each_trained_part_matters(sd15):
    """Without the prior, the gates, or the LoRA of either branch the result is another."""
    whole = drawn(sd15, "sd15", trained_module(sd15))
    for part in ("ctx.prior_mlp.2", "gate", "lora_frame", "lora_story", "to_out.up", "to_q.up"):
        less = trained_module(sd15)
        for key, value in less.network.named_parameters():
            if part in key:
                value.zero_()
        assert apart(drawn(sd15, "sd15", less), whole) > 1e-5, part


def test_known_frames_stay_and_are_seen(sd15):
    of, start = board(targets=(False, True, True, False)), known_start("sd15")
    loaded, known = trained_module(sd15), of.mask() == 0
    found = drawn(sd15, "sd15", loaded, start, of, noise_mask=of.mask()[None])
    assert torch.equal(found[..., known], start[..., known]) and not torch.equal(found[..., ~known], start[..., ~known])
    all_targets = drawn(sd15, "sd15", loaded, start, noise_mask=of.mask()[None])
    assert apart(found, all_targets) > 1e-4  # the extractor and the clean cells see which frames are known


def test_calls_of_their_own_change_nothing(sd15, monkeypatch):
    loaded = trained_module(sd15)
    together = drawn(sd15, "sd15", loaded)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(drawn(sd15, "sd15", loaded), together) < 2e-5


def test_extractor_and_keys_are_computed_once_a_run(sd15, monkeypatch):
    loaded, calls = trained_module(sd15), []
    family = families.find(sd15, "test")
    project = type(family).project
    monkeypatch.setattr(
        type(family), "project", lambda self, layer, tokens: calls.append(layer) or project(self, layer, tokens)
    )
    seen = []
    loaded.network.ctx.register_forward_hook(lambda *_: seen.append(1))
    drawn(sd15, "sd15", loaded, steps=4)
    assert len(seen) == 2  # positive and negative
    assert len(calls) == 4 * len(family.cross_layers)  # captions and story of both


def test_files_are_read_back_and_named_when_wrong(tmp_path, sd15):
    loaded = trained_module(sd15)
    state, told = loaded.network.state_dict(), loaded.network.metadata()
    save_file(state, tmp_path / "board.safetensors", told)
    again = load(str(tmp_path / "board.safetensors"), "Test")
    assert torch.equal(drawn(sd15, "sd15", again), drawn(sd15, "sd15", loaded))
    for change, metadata, words in (
        ({}, {}, "odd.safetensors is no trained board: its format is None"),
        ({"sites.0.gate": None}, told, "odd.safetensors: "),
        ({"ctx.story_ln.bias": None}, told, "ctx.story_ln.bias is missing"),
        ({"more": torch.zeros(1)}, told, "the tensor more is not known"),
    ):
        tensors = {key: value for key, value in (state | change).items() if value is not None}
        save_file(tensors, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / "odd.safetensors"), "Test")


def test_what_does_not_fit_is_refused(sd15):
    loaded = trained_module(sd15)
    sdxl, wan = tiny.build("sdxl"), tiny.build("wan")
    positive = prepared(sd15, captioned("sd15"))
    with pytest.raises(ValueError, match=f"{ID}: WanModel is no U-Net"):
        check(loaded, families.find(wan, "test"), positive)
    other = trained_module(sd15)
    other.network.channels = other.network.channels[:-1]
    with pytest.raises(
        ValueError, match="tiny was trained for 6 cross-attention layers over text 16 wide and the model has 7"
    ):
        check(other, families.find(sdxl, "test"), positive)
    with pytest.raises(ValueError, match="the board has 4 frames and tiny knows 3 at most"):
        check(trained_module(sd15, frames=3), families.find(sd15, "test"), positive)
    with pytest.raises(ValueError, match="strength is 2"):
        TrainedBoardBlock.execute(sd15, loaded, captioned("sd15"), tiny.conditioning("sd15", 1, 2), 2.0, "clean")
    with pytest.raises(ValueError, match="negative is empty"):
        TrainedBoardBlock.execute(sd15, loaded, captioned("sd15"), [], 1.0, "clean")
    rule = TrainedBoardRule(families.find(sd15, "test"), loaded)
    both = override.register(block(sd15), rule)
    with pytest.raises(ValueError, match="cannot act beside StoryweftFrameStoryCrossAttention on one model"):
        tiny.sample(both, *inputs(sd15, "sd15"), tiny.latent("sd15", 1))


def test_the_node_makes_what_the_sampler_needs(sd15):
    loaded = trained_module(sd15)
    model, positive, negative = TrainedBoardBlock.execute(
        sd15, loaded, captioned("sd15"), tiny.conditioning("sd15", 1, 2), 1.0, "clean"
    ).args
    found = tiny.sample(model, positive, negative, tiny.latent("sd15", 1))
    assert torch.equal(found, drawn(sd15, "sd15", loaded))
