"""The demo video model: core's sampler gives it all frames at once, and without temporal mix it is the picture model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from storyweft.host import demo, families

import nodes

FRAMES = 8


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo_video()


@pytest.fixture(scope="module")
def inputs(loaded):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(FRAMES, 4, 16, 16, generator=generator)
    context = nodes.CLIPTextEncode().encode(loaded[1], "an owl in the snow by day")[0][0][0]
    return x, torch.full((FRAMES,), 600.0), context.expand(FRAMES, -1, -1).clone()


def test_text_to_video_runs_through_core_nodes(loaded):
    model, clip, vae, _ = loaded
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a fox in the forest", ""))
    (latent,) = nodes.EmptyLatentImage().generate(128, 128, FRAMES)
    with torch.inference_mode():
        (sampled,) = nodes.KSampler().sample(model, 3, 2, 4.0, "euler", "normal", positive, negative, latent)
        (images,) = nodes.VAEDecode().decode(vae, sampled)
    assert images.shape == (FRAMES, 128, 128, 3) and images.isfinite().all() and images.std() > 0.01


@pytest.mark.parametrize("frames", [8, 5])
def test_sampler_sees_what_the_network_gives_for_one_clip(loaded, frames):
    """Every call of core's sampler equals the network called by hand on one conditioning's frames."""
    model, clip, _, _ = loaded
    seen = []

    def record(apply, arguments):
        result = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        seen.append((arguments["input"], arguments["timestep"], arguments["c"]["c_crossattn"], result))
        return result

    patched = model.clone()
    patched.set_model_unet_function_wrapper(record)
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a bear in the city", ""))
    (latent,) = nodes.EmptyLatentImage().generate(128, 128, frames)
    with torch.inference_mode():
        nodes.KSampler().sample(patched, 3, 2, 4.0, "euler", "normal", positive, negative, latent)
        sampling, network = model.model.model_sampling, model.model.diffusion_model
        assert seen
        for x, sigma, context, result in seen:
            for rows in torch.arange(len(x)).split(frames):
                at, now = x[rows], sigma[rows]
                v = network(
                    sampling.calculate_input(now, at),
                    sampling.timestep(now).float(),
                    context[rows],
                    num_video_frames=frames,
                )
                torch.testing.assert_close(result[rows], sampling.calculate_denoised(now, v, at), rtol=1e-4, atol=1e-4)


def test_noise_of_frames_is_alike_and_of_unit_scale(loaded):
    """What the sampler starts from: frames correlate as the file says, each of them standard normal; one frame is free."""
    sampling = loaded[0].get_model_object("model_sampling")
    with safe_open(demo.WEIGHTS / "video.safetensors", "pt") as file:
        share = float(file.metadata()["noise_share"])
    noise = torch.randn(FRAMES, 20000, generator=torch.Generator().manual_seed(1))
    started = sampling.noise_scaling(torch.tensor(1.0), noise, torch.zeros_like(noise))
    expected = share + (1 - share) * torch.eye(FRAMES)
    torch.testing.assert_close(started @ started.T / noise.shape[1], expected, rtol=0, atol=0.04)
    assert 0 < share < 1
    assert torch.equal(sampling.noise_scaling(torch.tensor(2.0), noise[:1], torch.zeros_like(noise[:1])), 2 * noise[:1])


@torch.inference_mode()
def test_frames_see_each_other(loaded, inputs):
    network, (x, t, context) = loaded[0].model.diffusion_model, inputs
    changed = x.clone()
    changed[-1] += 1
    before, after = (network(one, t, context, num_video_frames=FRAMES) for one in (x, changed))
    assert (before[0] - after[0]).abs().max() > 1e-3
    alone = network(x.roll(1, 0), t, context, num_video_frames=FRAMES).roll(-1, 0)
    assert (before - alone).abs().max() > 1e-3  # a frame's place in the clip counts


@torch.inference_mode()
def test_without_temporal_mix_it_is_the_picture_model(loaded, inputs):
    """To rounding: core lays the video transformer's output out in another memory order before the same convolution."""
    network, (x, t, context) = loaded[0].model.diffusion_model, inputs
    pictures = demo.load_unet(str(demo.WEIGHTS)).model.diffusion_model(x, t, context)
    only = torch.ones(1, FRAMES)
    still = network(x, t, context, num_video_frames=FRAMES, image_only_indicator=only)
    torch.testing.assert_close(still, pictures, rtol=1e-5, atol=1e-5)
    assert (network(x, t, context, num_video_frames=FRAMES) - pictures).abs().max() > 1e-2


def test_weights_the_file_leaves_out_are_zero(loaded):
    """Frame embeddings have a quarter of their hidden width, and a temporal block's input feed-forward adds nothing."""
    weights = loaded[0].model.diffusion_model.state_dict()
    with safe_open(demo.WEIGHTS / "video.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        padded = json.loads(file.metadata()["padded"])
    assert padded and not [name for name in kept if "time_" not in name]
    for name, value in kept.items():
        corner = weights[name][tuple(slice(size) for size in value.shape)]
        assert torch.equal(corner, value) and weights[name].count_nonzero() == value.count_nonzero(), name
    for name in set(padded) - set(kept):
        assert "_in" in name and weights[name].count_nonzero() == 0


def test_blocks_of_the_pack_find_the_spatial_layers(loaded):
    family, pictures = families.find(loaded[0], "Test"), families.find(demo.load_unet(str(demo.WEIGHTS)), "Test")
    assert family.time_layers and family.layers == pictures.layers


def test_reload_factory_gives_the_same_model(loaded):
    factory, arguments = loaded[0].cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded[0].model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["video", "unet"])
@pytest.mark.parametrize("harm, word", [("gone", "missing"), ("short", "truncated"), ("pointer", "Git LFS")])
def test_damaged_file_is_named(tmp_path, name, harm, word):
    shutil.copytree(demo.WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / f"{name}.safetensors"
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[:-100] if harm == "short" else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RuntimeError, match=rf"StoryweftDemoVideoLoader.*{name}\.safetensors.*{word}"):
        demo.load_demo_video(tmp_path / "weights")
