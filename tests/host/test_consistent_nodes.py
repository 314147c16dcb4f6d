"""The consistency nodes as a user meets them: refusals in one sentence, LoRA and ControlNet beside them."""
import logging
import math
from dataclasses import replace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import pytest
import tiny
import torch
from comfy_api.latest._io import HiddenHolder
from comfy_execution.graph import DynamicPrompt
from storyweft.host.story_sampling import rows_of
from storyweft.nodes.consistent import ConsistentSelfAttention, LoadCharacter, RecallCharacter, SaveCharacter
from storyweft.nodes.sampler import StorySamplerNode, is_read, seeds_of
from storyweft.story.script import parse_script

STORY = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits\n[Ana] sleeps", id_count=2)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def block(model, **changes):
    return ConsistentSelfAttention.execute(model, **{"sampling_ratio": 0.5, "draw_seed": 0, "layers": "output path"} | changes).args[0]


def positive(marks=True):
    return tiny.conditioning(
        "sd15", 3, 1, marks={"storyweft_panels": (0, 1, 2), "storyweft_story": STORY} if marks else None
    )


def story(model, **changes):
    settings = {
        "positive": positive(), "negative": tiny.conditioning("sd15", 1, 2), "latent_image": {"samples": tiny.latent("sd15", 1)},
        "seed": 1, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "memory": "bank",
        "keep_panels": False,
    }
    return StorySamplerNode.execute(model, **settings | changes)


@pytest.mark.parametrize("name", ["sampling_ratio", "share_early", "share_late", "start_percent", "end_percent"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_numbers_outside_0_to_1_are_refused(sd15, name, value):
    with pytest.raises(ValueError, match=f"StoryweftConsistentSelfAttention: {name} is {value}; give a number from 0 to 1"):
        block(sd15, **{name: value})


def test_an_empty_range_is_refused(sd15):
    with pytest.raises(ValueError, match=r"start_percent 0.8 lies after end_percent 0.2"):
        block(sd15, start_percent=0.8, end_percent=0.2)


def test_a_window_of_one_is_refused(sd15):
    with pytest.raises(ValueError, match="window is 1"):
        block(sd15, window=1)


def test_a_unet_without_self_attention_is_refused_when_the_block_is_put_on_it(monkeypatch):
    bare = tiny.UNET | {"transformer_depth": [0, 0], "transformer_depth_output": [0, 0, 0, 0], "transformer_depth_middle": -1}
    monkeypatch.setitem(tiny.FAMILIES, "bare", tiny.FAMILIES["sd15"]._replace(settings=bare))
    with pytest.raises(ValueError, match="StoryweftConsistentSelfAttention: .*no self-attention"):
        block(tiny.build("bare"))


def test_a_choice_of_layers_that_a_model_does_not_have_is_refused(monkeypatch):
    bare = tiny.UNET | {"transformer_depth_output": [0, 0, 0, 0]}
    monkeypatch.setitem(tiny.FAMILIES, "bare", tiny.FAMILIES["sd15"]._replace(settings=bare))
    with pytest.raises(ValueError, match="StoryweftConsistentSelfAttention: layers is 'output path'"):
        block(tiny.build("bare"))


@pytest.mark.parametrize(("text", "line"), [
    ("3", "3"), ("0: 5", "0: 5"), ("1: 2\nx: 3", "x: 3"), ("2: -1", "2: -1"), ("2: 1\n2: 3", "2: 3"), (f"1: {2**64}", f"1: {2**64}"),
])
def test_a_wrong_panel_seed_line_is_quoted(text, line):
    with pytest.raises(ValueError, match=f"panel_seeds has the line '{line}'"):
        seeds_of(text)


def test_a_panel_seed_for_a_panel_that_is_not_there_is_refused(sd15):
    with pytest.raises(ValueError, match="panel_seeds names panel 9"):
        story(block(sd15), panel_seeds="9: 1")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"cfg": math.nan}, "cfg is nan"), ({"denoise": 0.0}, "denoise is 0.0"), ({"denoise": math.nan}, "denoise is nan"),
    ({"latent_image": {"samples": torch.zeros(2, 4, 8, 12)}}, "latent_image holds 2 latents and the conditioning 3 panels"),
    ({"positive": tiny.conditioning("sd15", 3, 1)}, "positive is not from StoryweftPanelConditioning"),
])
def test_story_sampler_refusals(sd15, change, sentence):
    with pytest.raises(ValueError, match=f"StoryweftStorySampler: {sentence}"):
        story(block(sd15), **change)


def test_one_picture_alone_is_said_in_the_log(sd15, caplog):
    with caplog.at_level(logging.WARNING):
        tiny.sample(block(sd15), tiny.conditioning("sd15", 1, 1), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 1))
    assert "never acted on this run of UNetModel: the batch holds one picture" in caplog.text


def test_a_story_of_panels_without_character_needs_no_warning(sd15, caplog):
    empty = parse_script("[Ana] a fox", "a tree\na hill\na lake", id_count=0)
    marked = tiny.conditioning("sd15", 3, 1, marks={"storyweft_panels": (0, 1, 2), "storyweft_story": empty})
    with caplog.at_level(logging.WARNING):
        out = tiny.sample(block(sd15), marked, tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3))
    assert "never acted" not in caplog.text
    assert torch.equal(out, tiny.sample(sd15, marked, tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3)))


def test_start_and_end_percent_bound_the_steps(sd15):
    plain = tiny.sample(sd15, positive(), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3), steps=6)
    always = {"share_early": 1.0, "first_step": 0}
    none = block(sd15, start_percent=1.0, end_percent=1.0, **always)
    assert torch.equal(tiny.sample(none, positive(), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3), steps=6), plain)
    inputs = positive(), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3)
    outs = [tiny.sample(block(sd15, end_percent=end, **always), *inputs, steps=6) for end in (0.4, 1.0)]
    assert not torch.equal(outs[0], plain)
    assert not torch.equal(outs[0], outs[1])


def test_save_load_and_recall_through_the_nodes(sd15):
    drawn = story(block(sd15)).args
    files = SaveCharacter.execute(drawn[1], "test story").args[0].splitlines()
    assert files[0].endswith("test_story_Ana.safetensors")
    loaded = LoadCharacter.execute("test_story_Ana.safetensors").args[0]
    model = RecallCharacter.execute(sd15, loaded).args[0]
    later = story(model, positive=rows_of(positive(), [2], 3)).args[0]["samples"]
    torch.testing.assert_close(later, drawn[0]["samples"][2:], atol=2e-3, rtol=1e-5)


def test_recalling_a_character_twice_or_with_other_layers_is_refused(sd15):
    character = story(block(sd15)).args[1]
    model = RecallCharacter.execute(sd15, character).args[0]
    with pytest.raises(ValueError, match="character 'Ana' is recalled twice"):
        RecallCharacter.execute(model, character)
    with pytest.raises(ValueError, match="was made with layers 'output path' and the model's block has 'all'"):
        RecallCharacter.execute(block(sd15, layers="all"), character)


def test_names_that_would_share_a_file_are_refused(sd15):
    one = story(block(sd15)).args[1][0]
    with pytest.raises(ValueError, match="characters 'A b' and 'A_b' would both be written to x_A_b.safetensors; rename one"):
        SaveCharacter.execute([replace(one, name="A b"), replace(one, name="A_b")], "x")


@pytest.mark.parametrize("act", [
    lambda model: SaveCharacter.execute((), "x"), lambda model: RecallCharacter.execute(model, ()),
], ids=["save", "recall"])
def test_an_empty_character_is_refused_with_the_remedy(sd15, act):
    with pytest.raises(ValueError, match="character is empty, because the Story Sampler that ran made no bank; set its memory to bank"):
        act(sd15)


def test_a_connected_character_output_is_seen():
    graph = {"1": {"inputs": {"seed": 1}}, "2": {"inputs": {"character": ["1", 1], "x": ["1", 0]}}}
    seen = [is_read(HiddenHolder(id_, None, None, DynamicPrompt(graph), None, None), 1) for id_ in ("1", "2")]
    assert seen == [True, False]
    assert not is_read(None, 1)


def test_two_graphs_on_one_model_do_not_touch_each_other(sd15):
    inputs = positive(), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3)
    one, other = block(sd15), block(sd15, sampling_ratio=1.0, layers="all", first_step=0)
    plain, first, second = (tiny.sample(model, *inputs) for model in (sd15, one, other))
    assert not torch.equal(first, second)
    for model, out in ((other, second), (sd15, plain), (one, first)):
        assert torch.equal(tiny.sample(model, *inputs), out)


def test_a_story_with_cond_and_uncond_in_calls_of_their_own_is_the_same(sd15, monkeypatch):
    together = story(block(sd15)).args
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    apart = story(block(sd15)).args
    torch.testing.assert_close(apart[0]["samples"], together[0]["samples"], atol=2e-3, rtol=1e-5)
    assert {key: tensor.shape for key, tensor in apart[1][0].tensors.items()} == {
        key: tensor.shape for key, tensor in together[1][0].tensors.items()
    }


@pytest.mark.parametrize("at", [1, 6])
def test_an_interrupt_stops_before_the_next_step_and_leaves_nothing_behind(sd15, monkeypatch, at):
    whole = story(block(sd15)).args[0]["samples"]
    real, calls = tiny.comfy.model_base.BaseModel.apply_model, []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            comfy.model_management.interrupt_current_processing()
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(tiny.comfy.model_base.BaseModel, "apply_model", counting)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            story(block(sd15))
    assert len(calls) == at
    assert torch.equal(story(block(sd15)).args[0]["samples"], whole)


def test_a_file_name_without_letters_is_refused(sd15):
    with pytest.raises(ValueError, match="filename_prefix '///' holds no letter or digit"):
        SaveCharacter.execute([replace(story(block(sd15)).args[1][0], name="")], "///")


def lora(model):
    patched = model.clone()
    key = "diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_k.weight"
    shape = sd15_weight(model).shape
    patched.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.3,)}, 1.0)
    return patched


def sd15_weight(model):
    return model.model.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn1.to_k.weight


def test_lora_before_or_after_the_block_is_the_same_and_is_seen(sd15):
    inputs = positive(), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 3)
    before, after = tiny.sample(block(lora(sd15)), *inputs), tiny.sample(lora(block(sd15)), *inputs)
    assert torch.equal(before, after)
    assert not torch.equal(before, tiny.sample(block(sd15), *inputs))


def control_net(scale: float):
    config = {key: value for key, value in tiny.UNET.items() if key not in ("out_channels", "transformer_depth_output", "legacy")}
    with torch.inference_mode(False):
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
        tiny.fill(network, 4)
    network.train(False)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    hints = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    return control.set_cond_hint(hints, scale)


def test_a_control_net_acts_beside_the_block_and_hints_follow_their_panels(sd15):
    conditioning = [[text, marks | {"control": control_net(0.5), "control_apply_to_uncond": True}] for text, marks in positive()]
    plain = story(block(sd15)).args[0]["samples"]
    bank = story(block(sd15), positive=conditioning).args[0]["samples"]
    together = story(block(sd15), positive=conditioning, memory="together").args[0]["samples"]
    assert (bank - plain).abs().max() > 1e-3
    torch.testing.assert_close(bank, together, atol=5e-3, rtol=1e-4)
