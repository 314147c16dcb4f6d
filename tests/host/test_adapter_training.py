"""The trainer of image adapters: against the node's rule on the model it trains for, its data, its start, what it refuses."""

import sys
import types

import one_step
import pytest
import tiny
import torch
from PIL import Image
from storyweft.host import families, override
from storyweft.host.apa import AdaptivePromptRule, layer_alphas
from storyweft.host.demo import WEIGHTS, load_clip_vision, load_demo
from storyweft.host.image_adapter import LoadedAdapter
from storyweft.models.ip_adapter import in_file_order
from storyweft.training import adapter
from storyweft.training.picture_model import PictureEncoder, PictureModel

EVEN = dict.fromkeys(("input", "middle", "output"), 1.0)
WIDTH = 24


def tiny_base(name):
    return PictureModel(name, WEIGHTS / "unet.safetensors", tiny.build(name), None, None)


def task_of(base, network):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    data = {
        "latents": draw(3, 4, *tiny.SIZE), "seen": draw(3, WIDTH), "texts": draw(3, 7, 16), "pooled": draw(3, 1280),
        "rows": torch.tensor([1, 2, 1]), "weights": torch.ones(3, 1, 1, 1), "blank": torch.zeros(1, WIDTH), "examples": 3,
        "left_out": ["x.png: it has no x.txt"],
    }  # fmt: skip
    return adapter.Pictures(adapter.Reading(base.unet, network), base, data, "test", {})


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_loss_is_that_of_core_with_the_nodes_rule(name):
    base = tiny_base(name)
    network = adapter.new_adapter(base, WIDTH, 0, copied=True)
    for layer in network.ip_adapter.values():
        layer.to_v_ip.weight.data.mul_(20)
    task, seen, index = task_of(base, network), {}, torch.tensor([1])

    def called(x, t, context, embedding, **more):
        seen.update(x=x, t=t, out=task.model(x, t, context, embedding, **more))
        return seen["out"]

    seed = next(s for s in range(99) if torch.rand(1, generator=torch.Generator().manual_seed(s)) >= 0.15)
    with torch.no_grad():
        loss = task.loss(called, index, torch.Generator().manual_seed(seed))
        tokens = network.image_proj(task.data["seen"][index])
    loaded = LoadedAdapter("trained", network)
    rule = AdaptivePromptRule(loaded, tokens, tokens, layer_alphas(base.model, loaded, EVEN, EVEN))
    a = base.alphas[seen["t"][0]]
    text = [[task.data["texts"][[2]], {"pooled_output": task.data["pooled"][[2]]}]]
    x, sigma = seen["x"] / a.sqrt(), ((1 - a) / a).sqrt().item()
    core, plain = (one_step.clean(model, x, sigma, text, text) for model in (override.register(base.model, rule), base.model))

    def predicted(clean):
        return base.wanted(clean, (seen["x"] - a.sqrt() * clean) / (1 - a).sqrt(), a)

    clean = task.data["latents"][index]
    assert torch.isclose(loss, (predicted(core) - predicted(clean)).square().mean(), rtol=1e-3)
    assert torch.allclose(seen["out"], predicted(core), atol=1e-3)
    assert not torch.allclose(predicted(core), predicted(plain), atol=1e-2)
    assert task.check() == ["3 pictures with captions", "left out:", "x.png: it has no x.txt"]


def test_it_begins_at_the_texts_keys_or_without_a_picture():
    base = tiny_base("sd15")
    family = families.find(base.model, "test")
    copied, fresh = (adapter.new_adapter(base, WIDTH, 0, start) for start in (True, False))
    for layer, other, place in zip(
        copied.ip_adapter.values(), fresh.ip_adapter.values(), in_file_order(family.cross_layers), strict=True
    ):
        assert torch.equal(layer.to_k_ip.weight, family.modules[place].to_k.weight) and layer.to_k_ip.weight.requires_grad
        assert torch.equal(layer.to_v_ip.weight, family.modules[place].to_v.weight) and not other.to_v_ip.weight.any()
    task = task_of(base, fresh)
    task.loss(task.model, torch.arange(3), torch.Generator().manual_seed(0)).backward()
    assert fresh.ip_adapter["1"].to_v_ip.weight.grad.any() and all(p.grad is None for p in base.unet.parameters())


def test_a_folder_of_pictures_with_captions(tmp_path):
    base = PictureModel("demo", WEIGHTS / "unet.safetensors", *load_demo()[:3])
    encoder = PictureEncoder(load_clip_vision(str(WEIGHTS)), WEIGHTS / "clip.safetensors")
    for name, level in (("a", 40), ("b", 120), ("c", 200)):
        Image.new("RGB", (90, 64), (level, 30, 60)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n")
    Image.new("L", (90, 64)).save(tmp_path / "a.mask.png")
    Image.new("RGB", (90, 64)).save(tmp_path / "bare.png")
    args = types.SimpleNamespace(pictures=tmp_path, side=64)
    found = adapter.folder_data(args, base, encoder, "pooled")
    pixels = torch.tensor([120, 30, 60]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    assert torch.allclose(found["latents"][1].float(), base.encode(pixels)[0], atol=0.03)
    assert torch.allclose(found["seen"][1].float(), encoder(pixels)[0], atol=0.03)
    assert torch.allclose(found["texts"][found["rows"][1]].float(), base.text(["a b"])[0][0], atol=0.03)
    assert found["examples"] == 2 and found["left_out"] == [f"{tmp_path / 'bare.png'}: it has no bare.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture with a caption in .*: no picture at all"):
        adapter.folder_data(types.SimpleNamespace(pictures=tmp_path / "empty", side=64), base, encoder, "pooled")


def test_a_checkpoint_needs_an_encoder_and_pictures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--checkpoint", "x"])
    with pytest.raises(SystemExit):
        adapter.arguments()
    assert "--checkpoint needs --encoder, the CLIP vision the adapter is to read, and --pictures" in capsys.readouterr().err
