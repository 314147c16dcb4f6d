"""A given picture as style reference, ControlNets after the first picture, and stories with StyleAligned."""

import logging
import math

import blocks
import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from storyweft.host import override
from storyweft.host.style import ReferenceRule, StyleReference
from storyweft.nodes.consistent import ConsistentSelfAttention
from storyweft.nodes.sampler import StorySamplerNode
from storyweft.nodes.style import StyleAligned, StyleReferencePicture
from storyweft.story.script import parse_script

ROWS, STEPS = 3, 4
SETTINGS = {"batch_size": ROWS, "steps": STEPS, "scheduler": "normal", "inversion_cfg": 2.0, "offset": 1}


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def positive():
    return tiny.conditioning("sd15", ROWS, 1)


def negative():
    return tiny.conditioning("sd15", 1, 2)


def picture(rows=1, channels=4):
    return torch.randn(rows, channels, *tiny.SIZE, generator=torch.Generator().manual_seed(8))


def referenced(model, **changes):
    """(MODEL, latents) of the node; `latent` is the picture's tensor."""
    settings = SETTINGS | {"latent": {"samples": picture()}, "positive": positive(), "negative": negative()} | changes
    model, latent = StyleReferencePicture.execute(model, **settings).args
    return model, latent["samples"]


def drawn(model, latent, sampler="euler", **more):
    return tiny.sample(model, positive(), negative(), latent, **{"steps": STEPS, "sampler": sampler} | more)


def spied(model):
    """The model and a list that gets the latents [rows, ...] and sigma of every call of the network."""
    seen = []

    def look(executor, x, t, *args, **kwargs):
        seen.append((x[:ROWS].clone(), float(t.flatten()[0])))
        return executor(x, t, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", look)
    return model, seen


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "lms", "dpmpp_sde"])
def test_the_first_picture_is_the_given_one_and_its_states_are_replayed(sd15, sampler):
    model, latent = referenced(StyleAligned.execute(sd15).args[0])
    assert latent.shape == (ROWS, 4, *tiny.SIZE)
    spy, seen = spied(model)
    out = drawn(spy, latent, sampler)
    assert torch.equal(out[0], picture()[0])
    plain = drawn(StyleAligned.execute(sd15).args[0], latent, sampler)
    assert apart(out[1:], plain[1:]) > 1e-3
    rule = next(rule for rule in model.model_options["transformer_options"]["storyweft_rules"] if hasattr(rule, "reference"))
    states, sigmas = rule.reference.trajectory, rule.reference.sigmas
    for x, sigma in seen:
        step = max(sum(s > sigma * 1.0001 for s in sigmas[:-1]) - 1, 0) if sigma not in sigmas else sigmas.index(sigma)
        at = {0: 1, 1: 2}.get(step, step)  # offset 1: the picture starts a step ahead and waits for the others
        torch.testing.assert_close(x[0], states[at] * math.sqrt(sigma**2 + 1), rtol=1e-5, atol=1e-6)


def test_the_first_step_of_the_inversion_is_the_identity(sd15):
    """On a schedule whose last step starts at the model's least noise, as the authors' does."""
    sampling = sd15.get_model_object("model_sampling")
    sigmas = torch.tensor([10.0, 2.0, float(sampling.sigma_min), 0.0])
    model, _ = referenced(sd15, sigmas=sigmas)
    trajectory = model.model_options["transformer_options"]["storyweft_rules"][0].reference.trajectory
    scaled = sd15.model.process_latent_in(picture())[0]
    assert len(trajectory) == 4
    torch.testing.assert_close(trajectory[3], scaled, rtol=0, atol=0)
    torch.testing.assert_close(trajectory[2], scaled, rtol=0, atol=0)
    assert apart(trajectory[1], scaled) > 1e-3


def test_the_inversion_is_plain_whatever_blocks_the_model_carries(sd15):
    def trajectory(model):
        rules = referenced(model)[0].model_options["transformer_options"]["storyweft_rules"]
        return next(rule for rule in rules if hasattr(rule, "reference")).reference.trajectory

    alone = trajectory(sd15)
    assert torch.equal(trajectory(StyleAligned.execute(sd15, adain_values=True).args[0]), alone)


def test_the_inversion_uses_the_first_prompt_and_no_control_net(sd15):
    def trajectory(prompts):
        rules = referenced(sd15, positive=prompts)[0].model_options["transformer_options"]["storyweft_rules"]
        return rules[0].reference.trajectory

    base = trajectory(positive())
    others = [[positive()[0][0].clone(), {}]]
    others[0][0][1:] += 1
    assert torch.equal(trajectory(others), base)
    others[0][0][0] += 1
    assert apart(trajectory(others), base) > 1e-4
    assert torch.equal(trajectory(controlled(positive())), base)


def test_either_order_of_the_two_nodes(sd15):
    one, latent = referenced(StyleAligned.execute(sd15).args[0])
    other = StyleAligned.execute(referenced(sd15)[0]).args[0]
    assert torch.equal(drawn(one, latent), drawn(other, latent))


def test_cond_and_uncond_in_calls_of_their_own_change_nothing(sd15, monkeypatch):
    model, latent = referenced(StyleAligned.execute(sd15).args[0])
    together = drawn(model, latent)
    monkeypatch.setattr(type(sd15), "get_free_memory", lambda self, device: 1)
    assert apart(drawn(model, latent), together) < 2e-5


def test_sampler_custom_with_the_same_sigmas(sd15):
    sigmas = custom.BasicScheduler.execute(sd15, "karras", 3, 1.0).args[0]
    model, latent = referenced(StyleAligned.execute(sd15).args[0], sigmas=sigmas)
    out = custom.SamplerCustom.execute(
        model, True, 1, 3.0, positive(), negative(), comfy.samplers.sampler_object("euler"), sigmas, {"samples": latent}
    ).args[0]
    assert torch.equal(out["samples"][0], picture()[0])


def test_a_reference_nobody_looks_at_is_said_in_the_log(sd15, caplog):
    model, latent = referenced(sd15)
    with caplog.at_level(logging.WARNING):
        out = drawn(model, latent)
    assert "no other Storyweft block on this model looks at the reference; add StoryweftStyleAligned" in caplog.text
    plain = drawn(sd15, latent)
    assert torch.equal(out[0], picture()[0])
    assert apart(out[1:], plain[1:]) < 2e-5


def test_everything_under_inference_mode_as_the_host_runs_it(sd15):
    outside = drawn(*referenced(StyleAligned.execute(sd15).args[0]))
    with torch.inference_mode():
        inside = drawn(*referenced(StyleAligned.execute(sd15).args[0]))
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


def test_progress_is_shown_and_an_interrupt_stops_the_inversion(sd15, monkeypatch):
    shown = []
    update = comfy.utils.ProgressBar.update_absolute

    def seen(bar, value, *args, **kwargs):
        shown.append(value)  # the hook behind it leaves out steps that follow each other too fast
        return update(bar, value, *args, **kwargs)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", seen)
    referenced(sd15)
    assert shown == [1, 2, 3, 4]
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        referenced(sd15)
    referenced(sd15)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 6}, "the picture was inverted with 4 steps and the sampler takes 6"),
        ({"denoise": 0.5}, "the picture was inverted at sigma"),
        ({"scheduler": "karras"}, "the picture was inverted at sigma .* use the same scheduler"),
    ],
)
def test_a_sampler_on_another_schedule_is_refused(sd15, change, sentence):
    model, latent = referenced(StyleAligned.execute(sd15).args[0])
    with pytest.raises(ValueError, match=f"StoryweftStyleReference: {sentence}"):
        drawn(model, latent, **change)


def test_latents_of_another_size_are_refused(sd15):
    model, _ = referenced(StyleAligned.execute(sd15).args[0])
    with pytest.raises(ValueError, match="the latent to sample is 4 x 8 x 8 and the reference 4 x 8 x 12"):
        drawn(model, torch.zeros(ROWS, 4, 8, 8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latent": {"samples": picture(2)}}, r"latent is \(2, 4, 8, 12\); give one encoded picture"),
        ({"offset": STEPS}, "offset is 4 of 4 steps; give fewer than the steps"),
        ({"inversion_cfg": math.nan}, "inversion_cfg is nan"),
        ({"inversion_cfg": -1.0}, "inversion_cfg is -1.0"),
        ({"sigmas": torch.tensor([5.0, 1.0])}, r"sigmas are \[5.0, 1.0\]; give falling ones that end in 0"),
        ({"sigmas": torch.tensor([1.0, 5.0, 0.0])}, r"sigmas are \[1.0, 5.0, 0.0\]"),
        ({"sigmas": torch.tensor([0.0])}, r"sigmas are \[0.0\]"),
    ],
)
def test_bad_input_is_refused(sd15, change, sentence):
    with pytest.raises(ValueError, match=f"StoryweftStyleReference: {sentence}"):
        referenced(sd15, **change)


def test_flow_models_are_refused():
    flux = tiny.build("flux")
    with pytest.raises(ValueError, match="StoryweftStyleReference: Flux predicts neither noise nor v"):
        referenced(flux, latent={"samples": picture(channels=16)})


def controlled(conditioning, scale=0.5):
    unused = ("out_channels", "transformer_depth_output", "legacy")
    config = {key: value for key, value in tiny.UNET.items() if key not in unused}
    with torch.inference_mode(False):
        network = comfy.cldm.cldm.ControlNet(
            hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config
        )
        tiny.fill(network, 4)
    network.train(False)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    hints = torch.rand(ROWS, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    control.set_cond_hint(hints, scale)
    return [[text, marks | {"control": control, "control_apply_to_uncond": True}] for text, marks in conditioning]


def test_a_control_net_steers_only_the_pictures_after_the_first(sd15):
    start = tiny.latent("sd15", ROWS)
    free = tiny.sample(sd15, positive(), negative(), start)
    steered = tiny.sample(sd15, controlled(positive()), negative(), start)
    out = tiny.sample(StyleAligned.execute(sd15).args[0], controlled(positive()), negative(), start)
    uncontrolled = tiny.sample(StyleAligned.execute(sd15).args[0], positive(), negative(), start)
    assert apart(steered[:1], free[:1]) > 1e-3
    assert apart(out[:1], free[:1]) < 2e-5
    assert all(apart(out[row], uncontrolled[row]) > 1e-3 for row in range(1, ROWS))


def test_a_control_net_may_steer_the_first_picture_too(sd15):
    start = tiny.latent("sd15", ROWS)
    steered = tiny.sample(sd15, controlled(positive()), negative(), start)
    both = StyleAligned.execute(sd15, control_first_picture=True).args[0]
    assert apart(tiny.sample(both, controlled(positive()), negative(), start)[:1], steered[:1]) < 2e-5


STORY = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits\n[Ana] sleeps", id_count=2)


def story(model, memory):
    marks = {"storyweft_panels": (0, 1, 2), "storyweft_story": STORY}
    return StorySamplerNode.execute(
        model,
        tiny.conditioning("sd15", 3, 1, marks=marks),
        negative(),
        {"samples": tiny.latent("sd15", 1)},
        seed=1,
        steps=3,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        memory=memory,
        keep_panels=False,
    ).args


def test_a_story_with_style_is_drawn_as_one_batch(sd15):
    model = ConsistentSelfAttention.execute(sd15, 0.5, 0, "output path").args[0]
    styled = StyleAligned.execute(model).args[0]
    latent, _, report = story(styled, "auto")
    assert "StoryweftStyleAligned needs all panels in one batch" in report
    assert torch.equal(latent["samples"], story(styled, "together")[0]["samples"])
    with pytest.raises(ValueError, match="memory is bank, which draws a story in parts, and StoryweftStyleAligned needs"):
        story(styled, "bank")


def test_rules_that_count_the_rows_of_a_story_are_not_drawn_in_parts(sd15):
    """In parts the reference picture would take the first row of each, and boxes and pictures of other panels too."""
    shape = (4, *tiny.SIZE)
    reference = StyleReference(torch.zeros(4, *shape), (3.0, 2.0, 1.0, 0.0), 1.0, torch.zeros(1, *shape))
    model = ConsistentSelfAttention.execute(sd15, 0.5, 0, "output path").args[0]
    subject = blocks.subject(sd15, mask=torch.ones(3, *tiny.SIZE))
    for rule in (ReferenceRule(reference, 0), blocks.masked(sd15, frames=3, cross=False), subject):
        with pytest.raises(ValueError, match=f"{rule.node_id} needs all panels in one batch"):
            story(override.register(model, rule), "bank")
    assert not blocks.masked(sd15, frames=1).whole_batch and not blocks.subject(sd15).whole_batch
