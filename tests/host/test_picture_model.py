"""What trainers take from a checkpoint is what ComfyUI samples with: text, latents, schedule, prediction, SDXL's vector."""

import types

import comfy.sd
import pytest
import tiny
import torch
from storyweft.host.demo import WEIGHTS, load_demo
from storyweft.training import kept
from storyweft.training.picture_model import PictureModel, chosen, chosen_encoder

import nodes


def of(name):
    return PictureModel(name, WEIGHTS / "unet.safetensors", tiny.build(name), None, None)


@pytest.fixture(scope="module")
def demo():
    return PictureModel("demo", WEIGHTS / "unet.safetensors", *load_demo()[:3])


@pytest.mark.parametrize(("name", "v"), [("sd15", False), ("sd2", False), ("sdxl", False), ("demo", True)])
def test_what_is_predicted_gives_back_picture_and_noise(name, v, demo):
    base = demo if name == "demo" else of(name)
    assert base.v is v and base.alphas.shape == (1000,) and (base.alphas.diff() < 0).all()
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a = base.alphas[[10, 500, 990]].view(-1, 1, 1, 1)
    x = a.sqrt() * clean + (1 - a).sqrt() * noise
    guess, rest = base.parts(x, base.wanted(clean, noise, a), a)
    assert torch.allclose(guess, clean, atol=2e-4) and torch.allclose(rest, noise, atol=2e-4)
    # an error of the clean picture counts the same, whatever is predicted: min(SNR, 5)
    made = base.wanted(clean, noise, a) + 0.01
    off = (base.parts(x, made, a)[0] - clean).square().mean((1, 2, 3))
    error = (made - base.wanted(clean, noise, a)).square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    assert torch.allclose(base.weight(a).flatten() * error, snr.clamp(max=5) * off, rtol=2e-2)


@pytest.mark.parametrize("name", ["sd15", "demo"])
def test_sampling_ends_at_the_picture_that_is_predicted(name, demo):
    """A network that always sees the same clean picture; every timestep once, from the noisiest down."""
    base, times = demo if name == "demo" else of(name), []
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(6))

    def predict(x, t):
        times.append(int(t))
        a = base.alphas[t]
        return base.wanted(clean, (x - a.sqrt() * clean) / (1 - a).sqrt(), a)

    assert torch.allclose(base.sampled(noise, 5, predict), clean, atol=1e-3) and times == [999, 799, 599, 400, 200]


def test_captions_are_known_by_rows_of_which_the_first_has_no_words(demo):
    contexts, pooled, rows = demo.told(["a red fox", "", "a blue owl", "a red fox"])
    assert rows.tolist() == [2, 0, 1, 2] and len(contexts) == len(pooled) == 3
    assert torch.allclose(contexts[[2, 0]].float(), demo.text(["a red fox", ""])[0], atol=0.03)


def test_data_of_a_folder_is_made_anew_when_a_file_changes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    first = kept.mark(tmp_path / "a")
    assert first == kept.mark(tmp_path / "a") and first.startswith("a_")
    (tmp_path / "a" / "one.txt").write_text("three")
    assert kept.mark(tmp_path / "a") != first
    made = [kept.kept(tmp_path / "x" / "y.pt", lambda n=n: {"n": n}) for n in (1, 2)]
    assert made == [{"n": 1}, {"n": 1}]


def test_the_encoder_gives_what_cores_node_gives(tmp_path):
    encoder = chosen_encoder(None, WEIGHTS)
    pictures = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(7))
    output = nodes.CLIPVisionEncode().encode(encoder.model, pictures.movedim(1, -1), "center")[0]
    assert torch.equal(encoder(pictures), output["image_embeds"]) and encoder.name == "clip-128x3-96"
    assert torch.equal(encoder(pictures, "hidden"), output["penultimate_hidden_states"])
    assert encoder.blank(encoder(pictures)).shape == (1, 96) and encoder.blank(encoder(pictures, "hidden"), "hidden").any()
    with pytest.raises(ValueError, match="--encoder is .*no.safetensors and there is no CLIP vision model"):
        chosen_encoder(tmp_path / "no.safetensors", WEIGHTS)


def test_the_unet_is_called_as_the_host_calls_it(demo):
    """One evaluation of core's model, which scales by sigma and turns the prediction into a clean picture."""
    clean, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([400])
    a = demo.alphas[t].view(-1, 1, 1, 1)
    sigma = ((1 - a) / a).sqrt()
    (context,) = demo.text(["a red fox in the forest"])[0].split(1)
    with torch.no_grad():
        made = demo.unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, context)
        core = demo.model.model.apply_model(clean + sigma * noise, sigma.flatten(), c_crossattn=context)
    x = a.sqrt() * clean + (1 - a).sqrt() * noise
    assert torch.allclose(demo.parts(x, made, a)[0], core, atol=1e-3)


def test_text_and_latents_are_those_of_cores_nodes(demo):
    text = "a blue owl on the beach at night"
    ((context, extras),) = nodes.CLIPTextEncode().encode(demo.clip, text)[0]
    found, pooled = demo.text([text, ""])
    assert torch.equal(found[:1], context) and torch.equal(pooled[:1], extras["pooled_output"])
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    latents = nodes.VAEEncode().encode(demo.vae, pixels.movedim(1, -1))[0]["samples"]
    assert torch.allclose(demo.encode(pixels), demo.model.model.process_latent_in(latents))
    shown = demo.decode(demo.encode(pixels))
    assert shown.shape == (2, 64, 64, 3) and shown.dtype == torch.uint8


def test_sdxl_gets_pooled_text_and_size_as_in_core():
    base, pooled = of("sdxl"), torch.randn(2, 1280, generator=torch.Generator().manual_seed(3))
    core = base.model.model.extra_conds(
        noise=torch.zeros(2, 4, 8, 16), device="cpu", pooled_output=pooled, width=128, height=64
    )
    assert torch.equal(base.vector(pooled, (8, 16)), core["y"].cond)
    assert of("sd15").vector(pooled, (8, 16)) is None


@pytest.mark.parametrize("name", ["flux", "wan", "svd"])
def test_other_families_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} is a .*; give an SD1.5, SD2 or SDXL checkpoint$"):
        of(name)


def test_a_model_that_takes_pictures_beside_the_noise_is_refused():
    patcher = tiny.build("sd15")
    patcher.model.diffusion_model.in_channels = 9
    with pytest.raises(ValueError, match="^inpaint takes 9 channels, pictures beside the noise; give a checkpoint"):
        PictureModel("inpaint", WEIGHTS / "unet.safetensors", patcher, None, None)


def test_what_a_caption_has_beyond_a_prompt_is_said_to_be_left_out(demo, caplog):
    contexts, _ = demo.text(["a red fox", "a red fox in the forest " * 30])
    assert contexts.shape[1] == 77 and "1 captions are longer than a prompt of 77 tokens" in caplog.text


def test_a_checkpoint_is_chosen_by_the_option_and_must_be_whole(tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"weights")
    trio = load_demo()[:3]
    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", lambda given: (*trio, None))
    args = types.SimpleNamespace(checkpoint=path, weights=WEIGHTS)
    base = chosen(args)
    assert (base.name, base.model, base.source) == ("mine", trio[0], path)
    assert base.hash != chosen(types.SimpleNamespace(checkpoint=None, weights=WEIGHTS)).hash
    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", lambda given: (trio[0], None, trio[2], None))
    with pytest.raises(ValueError, match="mine.safetensors holds no text encoder or no VAE; give a whole checkpoint"):
        chosen(args)
