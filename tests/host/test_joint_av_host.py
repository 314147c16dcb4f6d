"""The joint audio-video MODEL under core's samplers: the authors' DDIM, exact halves, seeds, refusals, precision."""

import hashlib
import json
import logging
import threading

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from safetensors.torch import save_file
from storyweft.host import joint_av, joint_media
from storyweft.host import joint_sampling as sampling
from storyweft.models.joint_unet import JointUNet
from storyweft.sampling.schedule import linear_betas
from tiny_joint import CONFIG, NETWORK, tiny_joint, tiny_weights

import nodes

ALPHAS = linear_betas().neg().add(1).cumprod(0)


@pytest.fixture(scope="module")
def model():
    return tiny_joint()


@pytest.fixture()
def empty(model):
    return joint_media.empty(model, 2, 0, 0, 0)


def halves(latent):
    return latent["samples"].unbind()


def sampled(model, latent, name="euler", scheduler="normal", steps=3, cfg=1.0, seed=4):
    with torch.inference_mode():
        conditioning = sampling.no_prompt()
        return nodes.KSampler().sample(model, seed, steps, cfg, name, scheduler, conditioning, conditioning, latent)[0]


def run(model, latent, task=sampling.JOINT, seed=4, steps=4, method=sampling.DDPM, guidance=sampling.REPLACEMENT, strength=0.0):
    with torch.inference_mode():
        return sampling.run_joint(model, latent, seed, steps, method, task, guidance, strength)


def given(latent, half):
    """The latent with noise as its video (0) or sound (1), and the other half empty."""
    generator = torch.Generator().manual_seed(9)
    filled = [torch.randn(one.shape, generator=generator).clamp(-1, 1) for one in halves(latent)]
    filled[1 - half] = torch.zeros_like(filled[1 - half])
    return {**latent, "samples": NestedTensor(filled)}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(halves(one), halves(other), strict=True))


def test_levels_are_those_of_the_authors(model):
    sigmas = model.get_model_object("model_sampling").sigmas
    assert ((sigmas.double() ** 2 + 1).reciprocal() - ALPHAS).abs().max() < 1e-6
    assert abs(float(sigmas[-1]) - 157.41) < 0.01 and abs(float(sigmas[0]) - 0.0100005) < 1e-7


@pytest.mark.parametrize("clip", [True, False])
def test_cores_euler_is_the_authors_ddim(model, empty, clip):
    """Against DDIM written out on a network of the same weights, with the same noise and shifts."""
    model = joint_av.with_settings(model, joint_av.OFF, clip)
    got = run(model, empty, method=sampling.DDIM, steps=5)
    network = JointUNet(**NETWORK).train(False)
    network.load_state_dict(tiny_weights())
    generator = torch.manual_seed(4)
    x = [torch.randn(half.shape, generator=generator) for half in halves(empty)]
    times = [800, 600, 400, 200, 0]
    with torch.no_grad():
        for number, t in enumerate(times):
            alpha, after = ALPHAS[t].float(), ALPHAS[times[number + 1]].float() if number < 4 else torch.tensor(1.0)
            noises = network(*x, torch.tensor([t, t]))
            for half in (0, 1):
                clean = (x[half] - (1 - alpha).sqrt() * noises[half]) / alpha.sqrt()
                clean = clean.clamp(-1, 1) if clip else clean
                noise = (x[half] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
                x[half] = after.sqrt() * clean + (1 - after).sqrt() * noise
    for mine, theirs in zip(halves(got), x, strict=True):
        assert (mine - theirs).abs().max() < 2e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", [name for name in comfy.samplers.KSampler.SAMPLERS if name != "dpm_adaptive"])
def test_every_core_sampler_draws_both_halves(model, name):
    empty = joint_media.empty(model, 1, 0, 0, 0)
    out = sampled(model, empty, name, steps=3)
    assert [half.shape for half in halves(out)] == [half.shape for half in halves(empty)]
    assert all(half.isfinite().all() and half.any() for half in halves(out))
    assert out["fps"] == 10.0 and out["sample_rate"] == 200


def test_the_adaptive_sampler_ends_also_when_the_model_breaks(empty):
    out = sampled(tiny_joint(), joint_media.empty(tiny_joint(), 1, 0, 0, 0), "dpm_adaptive", steps=2)
    assert all(half.isfinite().all() for half in halves(out))
    broken = tiny_joint()
    with torch.no_grad():
        broken.model.diffusion_model.video_out[-1].video_conv.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="StoryweftJointAVLoader: the model answers with numbers that are not finite"):
        sampled(broken, empty, "dpm_adaptive")


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ddpm", "uni_pc"])
@pytest.mark.parametrize("half", [0, 1])
def test_a_masked_half_comes_back_bit_for_bit(model, empty, name, half):
    latent = given(empty, half)
    masks = [torch.full_like(one[:, :1], float(number != half)) for number, one in enumerate(halves(latent))]
    out = sampled(model, {**latent, "noise_mask": NestedTensor(masks)}, name)
    assert torch.equal(halves(out)[half], halves(latent)[half])
    assert not torch.equal(halves(out)[1 - half], halves(sampled(model, empty, name))[1 - half])


@pytest.mark.parametrize(
    ("method", "guidance"),
    [(sampling.DPM, sampling.REPLACEMENT), (sampling.DDIM, sampling.REPLACEMENT), (sampling.DDPM, sampling.REPLACEMENT),
     (sampling.DDPM, sampling.GRADIENT)],
)  # fmt: skip
@pytest.mark.parametrize("task", [sampling.TO_SOUND, sampling.TO_VIDEO])
def test_what_is_given_returns_exactly_and_the_rest_follows_it(model, empty, task, method, guidance):
    half = 0 if task == sampling.TO_SOUND else 1
    latent = {**given(empty, half), "storyweft_extra": "kept"}
    out = run(model, latent, task, method=method, guidance=guidance, strength=0.01)
    assert torch.equal(halves(out)[half], halves(latent)[half]) and out["storyweft_extra"] == "kept"
    other = given(empty, half)
    other["samples"] = NestedTensor([one.flip(-1) for one in halves(other)])
    answer = halves(run(model, other, task, method=method, guidance=guidance, strength=0.01))[1 - half]
    assert answer.isfinite().all() and not torch.equal(answer, halves(out)[1 - half])


def test_replacement_shows_the_network_the_given_half_with_one_noise(model, empty):
    """At every step sqrt(a) y + sqrt(1 - a) n with the noise the run began with."""
    seen, latent = [], given(empty, 0)
    watched = model.clone()

    def watch(executor, x, t, *args, **kwargs):
        seen.append((x[0].clone(), int(t[0])))
        return executor(x, t, *args, **kwargs)

    watched.add_wrapper(joint_av.WrappersMP.DIFFUSION_MODEL, watch)
    for method in (sampling.DDPM, sampling.DDIM):
        run(watched, latent, sampling.TO_SOUND, method=method)
    noise = torch.randn(halves(latent)[0].shape, generator=torch.manual_seed(4))
    assert len(seen) == 8
    for video, t in seen:
        expected = ALPHAS[t].sqrt() * halves(latent)[0] + (1 - ALPHAS[t]).sqrt() * noise
        assert (video - expected).abs().max() < 1e-5


def test_gradient_guidance_without_strength_is_replacement_and_with_it_is_not(model, empty):
    latent = given(empty, 0)
    plain = run(model, latent, sampling.TO_SOUND)
    assert same(plain, run(model, latent, sampling.TO_SOUND, guidance=sampling.GRADIENT, strength=0.0))
    assert not same(plain, run(model, latent, sampling.TO_SOUND, guidance=sampling.GRADIENT, strength=1.0))


def test_guidance_also_serves_parts_of_a_half(model, empty):
    latent = joint_media.time_mask(given(empty, 0), "sound", 0.2, 0)
    out = run(model, latent, guidance=sampling.GRADIENT, strength=0.5)
    assert torch.equal(halves(out)[0], halves(latent)[0])
    assert torch.equal(halves(out)[1][..., :40], halves(latent)[1][..., :40]) and halves(out)[1][..., 40:].any()


def test_gradients_without_room_are_computed_in_parts_and_are_the_same(empty, monkeypatch):
    model, latent = tiny_joint(), given(empty, 0)
    kept = []
    for free in (1e12, 0):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, free=free: free)
        sizes = {}

        def keep(x, sizes=sizes):
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            parts = run(model, latent, sampling.TO_SOUND, guidance=sampling.GRADIENT, strength=1.0, steps=2)
        kept.append(sum(sizes.values()))
        assert model.model.diffusion_model.lean == (free == 0)
    assert kept[1] < kept[0] / 2
    monkeypatch.undo()
    assert same(parts, run(model, latent, sampling.TO_SOUND, guidance=sampling.GRADIENT, strength=1.0, steps=2))


@pytest.mark.parametrize("lean", (False, True))
def test_the_gradient_is_that_of_the_network_under_its_own_shifts(empty, lean):
    """Finite differences through core's whole model call, in float64 weights: a shift drawn anew would show."""
    double = tiny_joint()
    double.model.manual_cast_dtype = torch.float64
    network = double.model.diffusion_model.double()
    network.dtype, network.lean = torch.float64, lean
    sampling_settings = double.get_model_object("model_sampling")
    sampling_settings.double()
    shapes = [half[:1].shape for half in halves(empty)]
    x = torch.randn(1, 1, sum(shape.numel() for shape in shapes), generator=torch.manual_seed(1), dtype=torch.float64)
    options = {"transformer_options": {}, "seed": 3, "latent_shapes": shapes}
    sigma = sampling_settings.sigmas[[500]]
    known = shapes[0].numel()

    def loss(x):
        network_out = network(
            [part.view(shape) for part, shape in zip(x[0, 0].split([known, x.shape[-1] - known]), shapes, strict=True)],
            sampling_settings.timestep(sigma).double(), transformer_options=options["transformer_options"], seed=3,
        )  # fmt: skip
        return network_out[0].square().sum()

    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start), start)
    with torch.no_grad():
        for place in (0, known + 3, known + 70):
            step = torch.zeros_like(x)
            step[0, 0, place] = 1e-5
            wanted = (loss(x + step) - loss(x - step)) / 2e-5
            assert abs(float(gradient[0, 0, place] - wanted)) < 1e-5 * max(1, abs(float(wanted)))


def test_weights_made_in_inference_mode_can_be_guided(empty):
    with torch.inference_mode():
        model = tiny_joint()
        network = model.model.diffusion_model
        for module in network.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(value.clone(), requires_grad=False)
    assert all(value.is_inference() for value in network.parameters())
    out = run(model, given(empty, 1), sampling.TO_VIDEO, guidance=sampling.GRADIENT, strength=1.0)
    assert halves(out)[0].isfinite().all()


@pytest.mark.parametrize("method", sampling.METHODS)
def test_the_same_seed_gives_the_same_clip_also_after_an_interrupt(model, empty, method):
    first = run(model, empty, method=method)
    stopped = model.clone()

    def stop(executor, *args, **kwargs):
        comfy.model_management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    stopped.add_wrapper(joint_av.WrappersMP.DIFFUSION_MODEL, stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(stopped, empty, method=method)
    assert same(first, run(model, empty, method=method))
    assert not same(first, run(model, empty, method=method, seed=5))


def test_clips_of_a_batch_are_drawn_apart(model, empty):
    one, both = joint_media.empty(model, 1, 0, 0, 0), sampled(model, empty)
    first = {**one, "samples": NestedTensor([half.clone() for half in halves(one)])}
    assert [len(half) for half in halves(both)] == [2, 2]
    assert not torch.equal(*halves(both)[0])
    assert [half.shape[0] for half in halves(sampled(model, first))] == [1, 1]


@pytest.mark.parametrize("shift", joint_av.SHIFTS)
def test_shifts_follow_the_setting(model, empty, shift, monkeypatch):
    drawn = []

    class Watched(joint_av.RandomShifts):
        def __call__(self, frames, window):
            drawn.append(super().__call__(frames, window))
            return drawn[-1]

    monkeypatch.setattr(joint_av, "RandomShifts", Watched)
    run(joint_av.with_settings(model, shift, True), empty, steps=12, method=sampling.DPM)
    blocks = 4  # input, middle (always 0), two of the output path
    calls = [tuple(drawn[start : start + blocks]) for start in range(0, len(drawn), blocks)]
    if shift == joint_av.OFF:
        assert not drawn
    else:
        assert len(calls) == 12 and (len(set(calls)) == 1) == (shift == joint_av.FIXED)


def test_the_run_does_not_touch_pythons_generator(model, empty):
    import random

    state = random.getstate()
    sampled(model, empty)
    assert random.getstate() == state


def test_the_solver_ends_where_the_authors_end_and_does_not_clip(model, empty):
    seen, watched = [], model.clone()

    def watch(executor, x, t, *args, **kwargs):
        seen.append(int(t[0]))
        return executor(x, t, *args, **kwargs)

    watched.add_wrapper(joint_av.WrappersMP.DIFFUSION_MODEL, watch)
    out = run(watched, empty, method=sampling.DPM, steps=20)
    assert seen == [999, 949, 898, 843, 784, 721, 652, 576, 492, 399, 302, 211, 138, 85, 51, 30, 16, 8, 3, 1]
    unclipped = run(joint_av.with_settings(model, joint_av.RANDOM, False), empty, method=sampling.DPM, steps=20)
    assert same(out, unclipped)


def test_precision_and_cast(empty):
    """float16 weights: norms and time stay in float32, and the result is near."""
    weights, media = tiny_weights(), joint_av.Media(4, 8, 8, 80, 200, 10.0)
    settings = {"windows": [2], "head_channels": 16}
    for dtype in (torch.float16, torch.bfloat16):
        with torch.inference_mode(False):
            half = joint_av.build(dict(weights), "tiny", media, dtype, **settings)
        kinds = {name: value.dtype for name, value in half.model.diffusion_model.named_parameters()}
        assert all((kind == torch.float32) == ("GroupNorm" in name or "emb" in name) for name, kind in kinds.items())
        full, out = run(tiny_joint(), empty, steps=2), run(half, empty, steps=2)
        assert max((a - b).abs().mean().item() for a, b in zip(halves(full), halves(out), strict=True)) < 0.05


def test_memory_is_asked_for_what_the_network_needs(model):
    packed = model.model.memory_required([1, 1, 222208])
    assert packed == 2 * model.model.memory_required([1, 1, 111104])
    published = packed / 32 * 128
    assert 0.5e9 < published < 4e9


def test_previews_and_progress_come_at_every_step(model, empty):
    previewer = __import__("latent_preview").Latent2RGBPreviewer(model.model.latent_format.latent_rgb_factors)
    shown = previewer.decode_latent_to_preview(torch.full((1, 3, 4, 8, 8), 1.0))
    assert shown.size == (8, 8) and shown.getpixel((0, 0)) == (255, 255, 255)
    told = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(sampling.no_prompt(), sampling.no_prompt())
    noise = NestedTensor([torch.randn(half.shape) for half in halves(empty)])
    sampler = comfy.samplers.KSAMPLER(sampling.sample_ddpm)
    guider.sample(
        noise, empty["samples"], sampler, sampling.respaced_sigmas(model, "3"),
        callback=lambda step, x0, x, total: told.append((step, x0.is_nested, total)), seed=1, disable_pbar=True,
    )  # fmt: skip
    assert told == [(0, True, 3), (1, True, 3), (2, True, 3)]


BAD = [
    ("plain", lambda latent: {"samples": halves(latent)[0]}, "is not a joint latent"),
    ("swapped", lambda latent: {"samples": NestedTensor(halves(latent)[::-1])}, "is not a joint latent"),
    ("rank", lambda latent: {"samples": NestedTensor([halves(latent)[0][:, :, 0], halves(latent)[1]])}, "is not a joint latent"),
    ("height", lambda latent: {"samples": NestedTensor([halves(latent)[0][..., :7, :], halves(latent)[1]])}, "multiples of 2"),
    ("length", lambda latent: {"samples": NestedTensor([halves(latent)[0], halves(latent)[1][..., :70]])}, "multiple of 4"),
    ("short", lambda latent: {"samples": NestedTensor([halves(latent)[0], halves(latent)[1][..., :12]])}, "too few for 4"),
    ("window", lambda latent: {"samples": NestedTensor([halves(latent)[0][:, :, :1], halves(latent)[1]])}, "do not fit"),
    ("nan", lambda latent: {"samples": NestedTensor([halves(latent)[0] * torch.nan, halves(latent)[1]])}, "not finite"),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_latents_that_do_not_fit_are_refused_before_sampling(model, empty, change, says):
    calls, watched = [], model.clone()
    watched.add_wrapper(joint_av.WrappersMP.APPLY_MODEL, lambda executor, *args, **kwargs: calls.append(1))
    with pytest.raises(ValueError, match=says) as found:
        sampled(watched, change(empty))
    assert "StoryweftJointAVLoader" in str(found.value) and "latent_image" in str(found.value) and not calls


def test_cfg_prompts_and_empty_conditioning(model, empty, caplog):
    with pytest.raises(ValueError, match="cfg 4 must be 1"):
        sampled(model, empty, cfg=4.0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([], [])
    noise = NestedTensor([torch.randn(half.shape) for half in halves(empty)])
    with pytest.raises(ValueError, match="positive is empty"):
        guider.sample(noise, empty["samples"], comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.0]), seed=1)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        prompt = [[torch.zeros(1, 77, 8), {}]]
        nodes.KSampler().sample(model, 1, 1, 1.0, "euler", "normal", prompt, prompt, empty)
    assert "reads no prompt" in caplog.text


def test_other_sizes_are_drawn_with_a_warning(model, caplog):
    with caplog.at_level(logging.WARNING):
        out = run(model, joint_media.empty(model, 1, 6, 16, 8), method=sampling.DPM, steps=2)
    assert [tuple(half.shape) for half in halves(out)] == [(1, 3, 6, 8, 16), (1, 1, 120)]
    assert "6 frames and 120 samples, the model was trained on 4 and 80" in caplog.text


@pytest.mark.parametrize(
    ("drop", "says"),
    [("middle_blocks.0.video_in_layers.2.video_conv_spatial.weight", "is missing"),
     ("middle_blocks.2.audio_in_layers.2.audio_conv.bias", "does not fit"), ("time_embed.0.weight", "is missing")],
)  # fmt: skip
def test_files_that_lack_tensors_are_refused_by_name(tmp_path, drop, says):
    weights = tiny_weights()
    del weights[drop]
    torch.save(weights, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="StoryweftJointAVLoader: broken.pt.*") as found:
        joint_av.load_joint_av(str(tmp_path / "broken.pt"), {"windows": [2], "head_channels": 16})
    assert says in str(found.value)


def test_a_pt_file_loads_and_may_hold_nothing_but_tensors(tmp_path, empty, model):
    torch.save(tiny_weights(), tmp_path / "good.pt")
    loaded = joint_av.load_joint_av(str(tmp_path / "good.pt"), {"windows": [2], "head_channels": 16}, "fp32")
    assert same(sampled(loaded, empty), sampled(model, empty))
    torch.save({"weights": tiny_weights(), "step": 3}, tmp_path / "wrapped.pt")
    with pytest.raises(ValueError, match="flat table of tensors"):
        joint_av.load_joint_av(str(tmp_path / "wrapped.pt"), {"windows": [2], "head_channels": 16})
    torch.save({"weights": threading.Thread}, tmp_path / "code.pt")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|global"):
        joint_av.load_joint_av(str(tmp_path / "code.pt"), {})


def test_channels_and_windows_must_fit(tmp_path):
    torch.save(tiny_weights(), tmp_path / "tiny.pt")
    for settings, says in (
        ({"windows": [2], "head_channels": 24}, "head_channels 24 does not divide"),
        ({"windows": [1, 4, 8], "head_channels": 16}, "windows .* must be as many"),
    ):
        with pytest.raises(ValueError, match=f"StoryweftJointAVLoader: tiny.pt: {says}"):
            joint_av.load_joint_av(str(tmp_path / "tiny.pt"), settings)


def test_metadata_of_a_trained_file_sets_sizes(model):
    assert model.model.media == joint_av.Media(4, 8, 8, 80, 200, 10.0)
    assert CONFIG["windows"] == list(model.model.diffusion_model.windows.values())


def test_the_demo_loader_reads_a_released_file_and_its_settings(tmp_path, model, empty):
    path = tmp_path / "joint_av.safetensors"
    save_file({key: value.half() for key, value in tiny_weights().items()}, path, {"config": json.dumps(CONFIG)})
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    loaded = joint_av.load_demo_joint_av(tmp_path)
    assert loaded.model.media == model.model.media and loaded.model.get_dtype() == torch.float32
    one, other = sampled(loaded, empty), sampled(model, empty)
    assert max((a - b).abs().max() for a, b in zip(halves(one), halves(other), strict=True)) < 0.1
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="StoryweftDemoJointAVLoader: .*joint_av.safetensors .* truncated or changed"):
        joint_av.load_demo_joint_av(tmp_path)
