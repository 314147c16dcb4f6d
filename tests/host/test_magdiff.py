"""High-fidelity alignment and learned alphas in tiny U-Nets, files, and bad input in one sentence."""

import copy
import math

import comfy.model_patcher
import pytest
import tiny
import torch
from blocks import alignment, apart, pyramid
from safetensors.torch import save_file
from storyweft.host import magdiff as rules
from storyweft.host import override
from storyweft.host.demo import WEIGHTS, load_vae
from storyweft.host.magdiff import HighFidelityRule, LoadedAlignment, check_family, load, with_alphas
from storyweft.models.magdiff import Alignment, beside_noise, widened
from storyweft.nodes.magdiff import HighFidelityAlignment, LoadMagDiff
from test_motion_host import unet_adapter

ID = "StoryweftHighFidelityAlignment"
FRAMES = 3


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(name):
    return tiny.build(name)


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def inputs(name, rows=FRAMES):
    return tiny.conditioning(name, 1, 1), tiny.conditioning(name, 1, 2), tiny.latent(name, rows)


def drawn(patcher, name, *args, rows=FRAMES, loaded=None, **more):
    rule = HighFidelityRule(loaded or alignment(), pyramid(1), pyramid(2), *args, **more)
    return tiny.sample(override.register(patcher, rule), *inputs(name, rows))


def by_hand(patcher, name, loaded, latents, blank, roles=("shown", "shown"), every_frame=False):
    """A U-Net whose conv_in has four more input channels, called with the subject's pyramid beside the noise."""
    network = patcher.model.diffusion_model
    plain = network.input_blocks[0][0]
    wide = copy.deepcopy(plain)
    wide.weight = torch.nn.Parameter(widened(plain.weight, 4).clone(), requires_grad=False)
    wide.weight[:, 4:] = loaded.network.conv_in
    pyramid = loaded.network.pyramid

    def z(shown, rows):
        if not shown:
            return pyramid(blank).expand(rows, -1, -1, -1)
        if every_frame:
            return pyramid(latents).expand(rows, -1, -1, -1)
        return torch.cat([pyramid(latents), pyramid(blank).expand(rows - 1, -1, -1, -1)])

    def call(apply, arguments):
        rows = len(arguments["input"]) // len(arguments["cond_or_uncond"])
        beside = torch.cat([z(roles[number] == "shown", rows) for number in arguments["cond_or_uncond"]])

        class Wide(torch.nn.Module):
            def forward(self, x):
                return wide(beside_noise(x, beside))

        network.input_blocks[0][0] = Wide()
        try:
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            network.input_blocks[0][0] = plain

    model = patcher.clone()
    model.set_model_unet_function_wrapper(call)
    with torch.inference_mode():
        return tiny.sample(model, *inputs(name))


@pytest.mark.parametrize("every_frame", [False, True])
def test_it_is_a_wider_first_convolution(name, patcher, every_frame):
    """MagDiff's guidance: both rows see the subject; of a clip the first frame, or every one."""
    loaded = alignment()
    reference = by_hand(patcher, name, loaded, pyramid(1), pyramid(2), every_frame=every_frame)
    assert apart(drawn(patcher, name, every_frame=every_frame), reference) < 2e-5
    assert apart(reference, tiny.sample(patcher, *inputs(name))) > 1e-3


def test_amplified_guidance_hides_the_subject_from_the_negative(sd15):
    reference = by_hand(sd15, "sd15", alignment(), pyramid(1), pyramid(2), ("shown", "blank"))
    found = drawn(sd15, "sd15", guidance="amplified")
    assert apart(found, reference) < 2e-5 and apart(found, drawn(sd15, "sd15")) > 1e-4


def test_it_starts_at_the_base_model(name, patcher):
    """Untrained, or at strength 0: the plain model bit for bit."""
    plain = tiny.sample(patcher, *inputs(name))
    assert torch.equal(drawn(patcher, name, 0.0), plain)
    assert torch.equal(drawn(patcher, name, loaded=alignment(trained=False)), plain)
    fresh = alignment(trained=False).network
    assert torch.equal(fresh.pyramid(pyramid(1)), pyramid(1)[-1])
    assert fresh.alpha_text.tolist() == [1.0] * 6 and fresh.alpha_image.tolist() == [1.5] * 6


def test_calls_of_their_own_change_nothing_and_it_is_computed_once(sd15, monkeypatch):
    loaded, seen = alignment(), []
    loaded.network.register_forward_hook(lambda *_: seen.append(1))
    together = drawn(sd15, "sd15", loaded=loaded)
    assert len(seen) == 2  # the subject and the blank, of four calls
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
    assert apart(drawn(sd15, "sd15"), together) < 2e-5


def test_learned_alphas_join_the_adapter(sd15):
    loaded, adapter = alignment(layers=6), unet_adapter(sd15)
    layers = len(adapter.network.channels)
    loaded = alignment(layers=layers)
    found = with_alphas(adapter, loaded, "Test")
    assert found.network is adapter.network and adapter.alphas is None
    assert found.alphas[2] == (loaded.network.alpha_text[2].item(), loaded.network.alpha_image[2].item())
    with pytest.raises(ValueError, match=f"tiny has alphas of {layers + 1} layers and tiny has {layers}"):
        with_alphas(adapter, alignment(layers=layers + 1), "Test")
    with pytest.raises(ValueError, match="tiny holds no image adapter"):
        with_alphas(None, loaded, "Test")


def test_files_are_read_back_and_named_when_wrong(tmp_path, sd15):
    loaded, adapter = alignment(), unet_adapter(sd15)
    state, told = loaded.network.state_dict(), loaded.network.metadata()
    save_file(state, tmp_path / "alone.safetensors", told)
    again = load(str(tmp_path / "alone.safetensors"), "Test")
    assert again.adapter is None and torch.equal(again.network(pyramid(1)), loaded.network(pyramid(1)))
    save_file(state | adapter.network.state_dict(), tmp_path / "both.safetensors", told)
    both = load(str(tmp_path / "both.safetensors"), "Test")
    assert torch.equal(
        both.adapter.network.state_dict()["image_proj.proj.weight"], adapter.network.image_proj.proj.weight
    )
    bad = state["pyramid.conv.bias"].clone()
    bad[0] = math.inf
    for change, metadata, words in (
        ({}, {}, "odd.safetensors is no MagDiff alignment: its format is None"),
        ({"alpha_image": None}, told, "the tensor alpha_image is missing"),
        ({"more": torch.zeros(1)}, told, "the tensor more is not known"),
        ({"pyramid.conv.bias": bad}, told, "pyramid.conv.bias holds numbers that are not finite"),
    ):
        tensors = {key: value for key, value in (state | change).items() if value is not None}
        save_file(tensors, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / "odd.safetensors"), "Test")


def test_what_does_not_fit_is_refused(sd15):
    with pytest.raises(ValueError, match=f"{ID}: WanModel is no U-Net"):
        check_family(alignment(), tiny.build("wan"))
    other = LoadedAlignment("other", Alignment(6, 40))
    with pytest.raises(
        ValueError, match="other was trained for a first convolution of 4 to 40 channels and the model's has 4 to 32"
    ):
        check_family(other, sd15)
    small = [z[..., :4] for z in pyramid(1)]
    with pytest.raises(ValueError, match=f"{ID}: image is 32 x 64 and the latent 96 x 64 pixels"):
        tiny.sample(override.register(sd15, HighFidelityRule(alignment(), small, small)), *inputs("sd15"))
    two = pyramid(1, 2)
    with pytest.raises(ValueError, match=f"{ID}: image holds 2 pictures and the latent 3 rows"):
        tiny.sample(override.register(sd15, HighFidelityRule(alignment(), two, pyramid(2))), *inputs("sd15"))
    area = tiny.conditioning("sd15", 1, 1, marks={"area": (4, 4, 0, 0), "strength": 1.0})
    rule = HighFidelityRule(alignment(), pyramid(1), pyramid(2))
    with pytest.raises(ValueError, match=f"{ID}: a conditioning has an area"):
        tiny.sample(override.register(sd15, rule), area, *inputs("sd15")[1:])


def test_the_node_encodes_three_sizes_of_the_picture(sd15):
    vae, picture = load_vae(str(WEIGHTS)), torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    loaded = alignment()
    sizes = [tuple(z.shape) for z in rules.encode_scales(loaded, vae, picture)]
    assert sizes == [(1, 4, 12, 18), (1, 4, 10, 15), (1, 4, 8, 12)]
    model = HighFidelityAlignment.execute(sd15, loaded, vae, picture, 1.0, "MagDiff").args[0]
    (rule,) = override.rules_of(model)
    into = sd15.model.process_latent_in
    torch.testing.assert_close(rule.subject[2], into(vae.encode(picture)))
    torch.testing.assert_close(rule.blank[2], into(vae.encode(torch.zeros_like(picture))))
    assert tiny.sample(model, *inputs("sd15")).isfinite().all()
    with pytest.raises(ValueError, match=f"{ID}: strength is nan"):
        HighFidelityAlignment.execute(sd15, loaded, vae, picture, math.nan, "MagDiff")


def test_the_loader_names_what_it_needs():
    assert [entry.id for entry in LoadMagDiff.GET_SCHEMA().inputs] == ["file", "image_adapter"]
