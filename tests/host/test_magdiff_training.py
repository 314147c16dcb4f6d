"""The trainer of MagDiff's parts: against the nodes' rules on the model it trains for, and its folders of subjects."""

import av
import numpy as np
import one_step
import pytest
import tiny
import torch
from PIL import Image
from storyweft.host import override
from storyweft.host.apa import AdaptivePromptRule, layer_alphas
from storyweft.host.demo import WEIGHTS, load_clip_vision, load_demo
from storyweft.host.magdiff import HighFidelityRule, LoadedAlignment, encode_scales, with_alphas
from storyweft.models.ip_adapter import ImageAdapter, Standard
from storyweft.models.magdiff import Alignment, cut_out
from storyweft.training import adapted, magdiff
from storyweft.training.picture_model import PictureEncoder, PictureModel
from storyweft.training.subject_data import Subject, SubjectFolder
from test_motion_host import unet_adapter

SIZES, EVEN = ((12, 18), (10, 15), tiny.SIZE), dict.fromkeys(("input", "middle", "output"), 1.0)


def random_data(frames, width, seed=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    found = {"clean": draw(2, frames, 4, *tiny.SIZE), "embedding": draw(4, width), "texts": draw(3, 7, 16)}
    found |= {"pooled": draw(3, 1280), "rows": torch.tensor([1, 2]), "blank": torch.zeros(1, width), "held": 0, "left_out": []}
    for number, size in enumerate(SIZES):
        found |= {f"scale{number}": draw(4, 4, *size), f"blank{number}": draw(4, *size)}
    return found


def by_the_nodes(task, loaded, x, sigma, seen, index):
    """Core's prediction with Adaptive Prompt Alignment and High-Fidelity Alignment, MagDiff's guidance, learned alphas."""
    patcher, data = task.base.model, task.data
    alignment = LoadedAlignment("trained", task.model.alignment)
    loaded = with_alphas(loaded, alignment, "test")
    tokens = loaded.network.image_proj(seen[:1])
    alphas = layer_alphas(patcher, loaded, EVEN, EVEN)
    subject = [data[f"scale{number}"][index] for number in range(3)]
    blank = [data[f"blank{number}"][None] for number in range(3)]
    model = override.register(patcher, AdaptivePromptRule(loaded, tokens, tokens, alphas, guidance="MagDiff"))
    model = override.register(model, HighFidelityRule(alignment, subject, blank))
    text = [[data["texts"][data["rows"][index // 2]], {"pooled_output": data["pooled"][data["rows"][index // 2]]}]]
    return one_step.clean(model, x, sigma, text, text)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_loss_is_that_of_core_with_the_nodes_rules(name, frames):
    """Alphas, image tokens in every frame, the subject's latents beside the first frame's noise and black beside the rest's."""
    base = PictureModel(name, WEIGHTS / "unet.safetensors", tiny.build(name), None, None)
    loaded = unet_adapter(base.model)
    alignment = Alignment(len(loaded.network.channels), 32)
    tiny.fill(alignment, 4)
    alignment.conv_in.data.mul_(5)
    data, index, seen = random_data(frames, loaded.network.image_proj.clip), torch.tensor([3]), {}
    task = magdiff.Subjects(magdiff.Aligned(alignment, loaded.network, base.unet), base, data, "test", {}, False)

    def network(x, t, context, embedding, scales, **more):
        out = task.model(x, t, context, embedding, scales, **more)
        seen.update(x=x, t=t, context=context, embedding=embedding, out=out)
        return out

    with torch.no_grad():
        loss = task.loss(network, index, torch.Generator().manual_seed(1))
        a = base.alphas[seen["t"][0]]
        core = by_the_nodes(task, loaded, seen["x"] / a.sqrt(), ((1 - a) / a).sqrt().item(), seen["embedding"], index)
    assert torch.equal(seen["context"][0], data["texts"][2]) and torch.equal(seen["embedding"][0], data["embedding"][3])
    assert len(seen["x"]) == frames and len(set(seen["t"].tolist())) == 1

    def predicted(clean):
        return base.wanted(clean, (seen["x"] - a.sqrt() * clean) / (1 - a).sqrt(), a)

    assert torch.isclose(loss, (predicted(core) - predicted(data["clean"][1])).square().mean(), rtol=1e-3)
    assert torch.allclose(seen["out"], predicted(core), atol=1e-3)
    with torch.no_grad():
        bare = base.unet(seen["x"], seen["t"], seen["context"], y=base.vector(data["pooled"][[2] * frames], tiny.SIZE))
    assert not torch.allclose(bare, predicted(core), atol=1e-2)


def test_alphas_pyramid_and_channels_get_gradients_and_the_rest_stays():
    base = PictureModel("sd15", WEIGHTS / "unet.safetensors", tiny.build("sd15"), None, None)
    loaded = unet_adapter(base.model)
    alignment = Alignment(len(loaded.network.channels), 32)
    model = magdiff.Aligned(alignment, loaded.network, base.unet)
    task = magdiff.Subjects(model, base, random_data(1, 24), "test", {}, False)
    task.loss(model, torch.arange(4), torch.Generator().manual_seed(1)).backward()
    assert alignment.alpha_image.grad.all() and alignment.alpha_text.grad.all() and alignment.conv_in.grad.any()
    assert all(value.grad is None for value in [*base.unet.parameters(), *loaded.network.parameters()])


def film(path, frames):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            picture = np.full((64, 96, 3), 30 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def left_half(size=(96, 64)):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def folder(tmp_path):
    """cat has a mask beside it and dog in its alpha channel; the others lack something. walk is a video, short another."""
    red = Image.new("RGB", (96, 64), (200, 10, 0))
    for name in ("cat", "nameless", "bare", "empty"):
        red.save(tmp_path / f"{name}.png")
    clear = red.copy()
    clear.putalpha(left_half())
    clear.save(tmp_path / "dog.png")
    for name in ("cat", "nameless", "walk", "short"):
        left_half().save(tmp_path / f"{name}.mask.png")
    Image.new("L", (96, 64)).save(tmp_path / "empty.mask.png")
    film(tmp_path / "walk.mp4", 6)
    film(tmp_path / "short.mp4", 2)
    for name in ("cat", "dog", "bare", "empty", "walk", "short"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n")
    return tmp_path


def test_pictures_with_masks_and_captions(folder):
    found = SubjectFolder(folder, 64)
    cat, dog = found
    assert [cat.caption, dog.caption] == ["a cat", "a dog"] and len(found) == 2
    assert cat.pixels.shape == (1, 3, 64, 64) and torch.equal(cat.mask, dog.mask)
    assert cat.mask[:, :30].min() == 1 and cat.mask[:, 34:].max() == 0  # the middle square keeps the edge in its middle
    assert (cat.pixels[0, 0] * 255).round().unique().tolist() == [200]
    told = "\n".join(found.left_out)
    assert "bare.png: it has no bare.mask.png and no alpha channel" in told and "nameless.png: it has no nameless.txt" in told
    assert "empty.png: its mask keeps nothing" in told and len(found.left_out) == 3


def test_videos_with_the_mask_of_their_first_frame(folder):
    found = SubjectFolder(folder, 64, frames=4)
    (walk,) = found
    assert walk.pixels.shape == (4, 3, 64, 64) and walk.caption == "a walk"
    levels = (walk.pixels.mean((1, 2, 3)) * 255).round()
    assert (levels.diff() > 20).all() and levels[0] < 10
    assert found.left_out == [f"{folder / 'short.mp4'}: it has 2 frames at 8.0 a second, fewer than 4"]
    with pytest.raises(ValueError, match="no video of 9 frames with mask and caption in .*it has 2 frames at 8.0 a second"):
        SubjectFolder(folder, 64, frames=9)


def test_cut_outs_are_encoded_as_the_nodes_encode_them():
    base = PictureModel("demo", WEIGHTS / "unet.safetensors", *load_demo()[:3])
    encoder = PictureEncoder(load_clip_vision(str(WEIGHTS)), WEIGHTS / "clip.safetensors")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(64, 64)
    mask[8:40, 10:50] = 1
    found = magdiff.data([Subject(pixels, mask, "a red fox")], base, encoder, "pooled")
    cuts = [cut_out(pixels[:1], kept[None], 0.0) for kept in (mask, 1 - mask)]
    into = base.model.model.process_latent_in
    for number in range(3):
        for kept, cut in enumerate(cuts):
            latents = encode_scales(LoadedAlignment("fresh", Alignment(7, 64)), base.vae, cut.movedim(1, -1))[number]
            assert torch.allclose(found[f"scale{number}"][kept].float(), into(latents)[0], atol=0.05)
        assert found[f"blank{number}"].shape == found[f"scale{number}"].shape[1:]
    assert found["clean"].shape == (1, 2, 4, 8, 8) and found["rows"].tolist() == [1] and not found["blank"].any()
    close = torch.nn.functional.interpolate(cuts[0][..., 2:46, 8:52], (128, 128), mode="bicubic").clamp(0, 1)
    assert torch.allclose(found["embedding"][0], encoder(close)[0], atol=0.05)


def test_adapters_of_another_family_are_refused_by_name(tmp_path, monkeypatch):
    base = PictureModel("sd15", WEIGHTS / "unet.safetensors", tiny.build("sd15"), None, None)
    path = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match="^--adapter-file is .* and there is no such file"):
        adapted.read_adapter(path, base)
    network = ImageAdapter(Standard(24, 1024, 4), [8, 8])
    tiny.fill(network, 1)
    torch_file = {key: value.contiguous() for key, value in network.state_dict().items()}
    monkeypatch.setattr(adapted, "read", lambda path, option: torch_file)
    path.touch()
    with pytest.raises(ValueError, match="--adapter-file: other.safetensors was made for SD2 .*load the adapter of its family"):
        adapted.read_adapter(path, base)
