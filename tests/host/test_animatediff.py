"""Masks in AnimateDiff-Evolved's motion modules, with a stand-in that is called as that pack calls its own.

What the stand-in keeps of commit-time facts: modules sit behind the blocks' layers, a handler in
forward_timestep_embed_patch calls `layer(x, context, transformer_options=...)`, the module folds (rows·frames) into
places, hands attention_mask to both temporal attentions and never passes transformer_options to attention.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from comfy.ldm.modules.attention import optimized_attention
from storyweft.attention.labels import BoxRegions
from storyweft.host import override
from storyweft.host.masked import MaskedOptions, MaskedRule

FRAMES = 4


class VanillaTemporalModule(torch.nn.Module):
    def __init__(self, channels, block_type, seed):
        super().__init__()
        self.block_type, self.video_length, self.view_options = block_type, FRAMES, None
        self.attentions = torch.nn.ModuleList(torch.nn.Linear(channels, 4 * channels, bias=False) for _ in range(2))
        tiny.fill(self, seed)
        self.masks, self.outputs = [], []

    def forward(self, input_tensor, encoder_hidden_states=None, attention_mask=None, transformer_options=None):
        self.masks.append(attention_mask)
        rows, _, height, width = input_tensor.shape
        places = height * width
        x = input_tensor.flatten(2).transpose(1, 2)  # [rows·frames, places, C]
        for attention in self.attentions:
            z = x.unflatten(0, (-1, self.video_length)).transpose(1, 2).flatten(0, 1)
            q, k, v, o = attention(z).chunk(4, 2)
            out = optimized_attention(q, k, v, 4, mask=attention_mask) + 0.1 * o
            self.outputs.append(out)
            x = x + out.unflatten(0, (-1, places)).transpose(1, 2).flatten(0, 1)
        return x.transpose(1, 2).unflatten(2, (height, width))


def forward_timestep_embed_patch_ade(layer, x, emb, context, transformer_options, output_shape, time_context, frames, only, *args):
    return layer(x, context, transformer_options=transformer_options)


@pytest.fixture
def animated():
    """(patcher, modules by block type); the modules stand behind the last layer of a block, as injected ones do."""
    patcher = tiny.build("sd15")
    network = patcher.model.diffusion_model
    modules = {}
    for kind, block, channels in (
        ("down", network.input_blocks[1], 32),
        ("mid", network.middle_block, 64),
        ("up", network.output_blocks[-1], 32),
    ):
        modules[kind] = VanillaTemporalModule(channels, kind, len(modules))
        block.append(modules[kind])
    patcher.set_model_forward_timestep_embed_patch((VanillaTemporalModule, forward_timestep_embed_patch_ade))
    return patcher, modules


def boxes(still=False):
    shift = 0.0 if still else 0.12
    return BoxRegions(torch.tensor([[(shift * f, 0.0, shift * f + 0.5, 1.0) for f in range(FRAMES)]]).double())


def run(patcher, regions=None, steps=2, **options):
    if regions is not None:
        settings = {"steps": 1, "cross": False} | options
        patcher = override.register(patcher, MaskedRule(regions, MaskedOptions(**settings)))
    positive, negative = tiny.conditioning("sd15", 1, 1), tiny.conditioning("sd15", 1, 2)
    return tiny.sample(patcher, positive, negative, tiny.latent("sd15", FRAMES), steps=steps)


def test_masks_reach_middle_and_output_modules_in_the_masked_steps_only(animated):
    patcher, modules = animated
    plain = run(patcher)
    for module in modules.values():
        module.masks.clear()
    out = run(patcher, boxes())
    assert (out - plain).abs().max() > 1e-4
    assert [mask is not None for mask in modules["mid"].masks] == [True, False]
    assert [mask is not None for mask in modules["up"].masks] == [True, False]
    assert not any(mask is not None for mask in modules["down"].masks)
    mask = modules["up"].masks[0]
    assert mask.shape == (2 * 8 * 12, FRAMES, FRAMES) and mask.dtype == torch.float32
    labels = boxes().labels([[f] for f in range(FRAMES)], 8, 12).T
    same = labels[:, :, None] == labels[:, None]
    assert torch.equal(mask == 0, same.repeat(2, 1, 1)) and mask.isfinite().all()


def test_all_layers_and_no_temporal_mask(animated):
    patcher, modules = animated
    run(patcher, boxes(), layers="all")
    assert modules["down"].masks[0] is not None
    modules["up"].masks.clear()
    run(patcher, boxes(), temporal=False)
    assert not any(mask is not None for mask in modules["up"].masks)


def test_frames_of_other_labels_never_reach_a_frame(animated):
    """A place that lies in the box in frames 0 and 1 only: its frames 2 and 3 take nothing from 0 and 1."""
    patcher, modules = animated
    run(patcher, BoxRegions(torch.tensor([[(0, 0, 1, 1)] * 2 + [(float("nan"),) * 4] * 2]).double()), steps=1)
    module = modules["up"]
    x = torch.randn(FRAMES, 32, 8, 12, generator=torch.Generator().manual_seed(0))
    mask = module.masks[-1][: 8 * 12]
    other = x.clone()
    other[:2] += 3
    assert torch.equal(module(x, attention_mask=mask)[2:], module(other, attention_mask=mask)[2:])
    assert not torch.equal(module(x)[2:], module(other)[2:])


def test_boxes_that_stand_still_leave_the_modules_alone_and_the_list_is_not_changed(animated):
    patcher, modules = animated
    handlers = patcher.model_options["transformer_options"]["patches"]["forward_timestep_embed_patch"]
    before = list(handlers)
    run(patcher, boxes(still=True))
    assert not any(mask is not None for mask in modules["mid"].masks)
    assert handlers == before


def test_the_frames_of_the_packs_own_windows(animated, monkeypatch):
    """ad_params.sub_idxs names the frames of a call."""
    patcher, modules = animated
    model = patcher.clone()
    model.model_options["transformer_options"]["ad_params"] = {"sub_idxs": [3, 2, 1, 0], "full_length": FRAMES}
    run(model, boxes())
    labels = boxes().labels([[f] for f in (3, 2, 1, 0)], 8, 12).T
    assert torch.equal(modules["up"].masks[0] == 0, (labels[:, :, None] == labels[:, None]).repeat(2, 1, 1))


def test_view_options_are_refused(animated):
    patcher, modules = animated
    modules["up"].view_options = SimpleNamespace(context_length=2)
    with pytest.raises(ValueError, match="StoryweftMaskedAttention: AnimateDiff-Evolved's view options .2 frames."):
        run(patcher, boxes())
    modules["up"].view_options = SimpleNamespace(context_length=16)  # longer than the video: the pack ignores it
    run(patcher, boxes())
