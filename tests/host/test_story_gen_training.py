"""The trainer of StoryGen's image attention: against the nodes' own patches on the model it trains for, its data, its file."""

import sys
import types

import pytest
import tiny
import torch
from PIL import Image
from storyweft.host import story_gen_weights as weights
from storyweft.host.demo import WEIGHTS, load_demo
from storyweft.host.reference_pass import Capture
from storyweft.host.story_gen import ImagePatches
from storyweft.training import story_gen
from storyweft.training.picture_model import PictureModel
from training_runs import outputs

STORIES, TOKENS = 3, 7


def tiny_base(name="sd15"):
    return PictureModel(name, WEIGHTS / "unet.safetensors", tiny.build(name), None, None)


@pytest.fixture(scope="module")
def demo():
    return PictureModel("demo", WEIGHTS / "unet.safetensors", *load_demo()[:3])


def task_of(base, model, pages=4, **more):
    """Ordered stories of random latents; of four pages the last is always the one to be drawn."""
    generator = torch.Generator().manual_seed(4)
    latents, shown = torch.randn(2, STORIES, pages, 4, 8, 8, generator=generator)
    width = model.blocks[0][1].attn2.to_k.in_features
    found = {
        "latents": latents, "shown": shown, "texts": torch.randn(6, TOKENS, width, generator=generator), "held": 1,
        "rows": torch.arange(STORIES * pages).view(STORIES, pages) % 6, "prompts": torch.tensor([2]), "ordered": True,
        "weights": torch.ones(STORIES, pages, 1, 1, 1), "grey": torch.full((1, 4, 8, 8), 0.3),
    }  # fmt: skip
    return story_gen.StoryTask(model, base, found | more, "test", "0 1", 0.0)


def by_the_nodes(task, x, t, words, shown, steps, e, captions):
    """The clean pictures that core makes of x (as the U-Net gets it) with the task's file beside it and the nodes' patches."""
    base, network, options = task.base, task.base.model.model, {}
    model = weights.add(base.model, {k: v.clone() for k, v in task.tensors().items()}, task.metadata, "trained", "test")
    own, sigmas, found = weights.weights_of(model, "test"), network.model_sampling.sigmas, []
    for place in range(shown.shape[1]):
        capture, sigma = Capture(), sigmas[steps[:, place]]
        noisy, reference = shown[:, place] + sigma.view(-1, 1, 1, 1) * e, {"patches": {"middle_patch": [capture]}}
        network.apply_model(noisy, sigma, c_crossattn=captions[:, place], transformer_options=reference)
        found.append(capture.features)

    def joined(site):
        return torch.cat([one[site] for one in found], 1)

    patches = ImagePatches(own.sites.modules(network.diffusion_model), own.sites, [(slice(0, len(x)), joined)], 1.0)
    patches.add_to(options)
    a = base.alphas[t].view(-1, 1, 1, 1)
    return network.apply_model(x / a.sqrt(), sigmas[t], c_crossattn=words, transformer_options=options)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("name", ["sd15", "demo"])
def test_the_loss_is_that_of_core_with_the_nodes_patches(name, twice, demo):
    """Two references, the older noisier: one evaluation of model, file and patches gives the trainer's loss."""
    base = demo if name == "demo" else tiny_base()
    model = story_gen.StoryGen(base, 32 if name == "demo" else 0, twice)
    tiny.fill(model.sites, 6)
    for site in model.sites:
        site.attn3.to_out[0].weight.data.mul_(20)
    task, seen, made = task_of(base, model), {}, []

    def features(shown, steps, e, words):
        seen.update(shown=shown, steps=steps, e=e, captions=words)
        return story_gen.StoryTask.features(task, shown, steps, e, words)

    def network(x, t, words, joined):
        seen.update(x=x, t=t, words=words)
        made.append(model(x, t, words, joined))
        return made[0]

    task.features = features
    seed = next(s for s in range(99) if 0.3 <= torch.rand((), generator=torch.Generator().manual_seed(s)) < 0.6)
    with torch.no_grad():
        loss = task.loss(network, torch.tensor([0, 1]), torch.Generator().manual_seed(seed))
        core = by_the_nodes(task, **seen)
        plain = base.model.model.apply_model(seen["x"] / base.alphas[seen["t"]].view(-1, 1, 1, 1).sqrt(),
                                             base.model.model.model_sampling.sigmas[seen["t"]], c_crossattn=seen["words"])  # fmt: skip
    part = seen["t"] // 10
    assert seen["steps"].tolist() == torch.stack([2 * part, part], 1).tolist()
    assert torch.equal(seen["shown"], task.shown[:2, 1:3]) and not torch.allclose(core, plain, atol=1e-2)
    a = base.alphas[seen["t"]].view(-1, 1, 1, 1)

    def predicted(clean):
        return base.wanted(clean, (seen["x"] - a.sqrt() * clean) / (1 - a).sqrt(), a)

    assert torch.allclose(made[0], predicted(core), atol=2e-5)
    assert torch.isclose(loss, (predicted(core) - predicted(task.latents[:2, 3])).square().mean(), rtol=1e-3)


def test_it_begins_where_the_authors_do_and_trains_what_they_train():
    """attn3 and norm4 are attn1 and norm1; norm4 stays; at strength 0 it is the model itself."""
    base = tiny_base()
    task = task_of(base, story_gen.StoryGen(base))
    task.start(copied=True)
    for site, (_, block) in zip(task.model.sites, task.model.blocks, strict=True):
        assert torch.equal(site.attn3.to_out[0].bias, block.attn1.to_out[0].bias)
        assert torch.equal(site.norm4.weight, block.norm1.weight) and not site.norm4.weight.requires_grad
    trained = [name for name, value in task.model.named_parameters() if value.requires_grad]
    assert len(trained) == 5 * len(task.model.sites) and all(".attn3." in name for name in trained)
    assert len(task.tensors()) == 7 * len(task.model.sites)
    assert "mid_block.attentions.0.transformer_blocks.0.norm4.weight" in task.tensors()
    assert task.metadata["residual"] == "twice" and task.metadata["prediction"] == "EPS"


def test_references_are_the_pages_before_oldest_first():
    base = tiny_base()
    task = task_of(base, story_gen.StoryGen(base), pages=6)
    found = task.pages(200, 2, torch.Generator().manual_seed(0))
    assert set(found[:, 0].tolist()) == {3, 4, 5}
    assert torch.equal(found[:, 1], found[:, 0] - 2) and torch.equal(found[:, 2], found[:, 0] - 1)


def stories(folder, count, pages=4):
    for story in range(count):
        place = folder / f"{story}"
        place.mkdir(parents=True)
        for page in range(pages):
            Image.new("RGB", (80, 64), (40 * story, 60 * page, 90)).save(place / f"{page}.png")
        (place / "captions.txt").write_text("".join(f"page {page} of {story}\n" for page in range(pages)))
    return folder


def test_a_folder_of_stories_in_both_pixel_ranges(demo, tmp_path):
    args = types.SimpleNamespace(stories=str(stories(tmp_path / "s", 2)), layout="folder", frames=4, side=64)
    found, plain = (story_gen.data(args, demo, span) for span in ((0.0, 1.0), (-1.0, 1.0)))
    pixels = torch.tensor([40, 120, 90]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    assert torch.equal(plain["shown"], plain["latents"]) and torch.equal(found["latents"], plain["latents"])
    assert torch.allclose(found["latents"][1, 2].float(), demo.encode(pixels)[0], atol=0.03)
    assert torch.allclose(found["shown"][1, 2].float(), demo.encode((pixels + 1) / 2)[0], atol=0.03)
    assert torch.allclose(found["texts"][found["rows"][1, 2]].float(), demo.text(["page 2 of 1"])[0][0], atol=0.03)
    assert found["ordered"] and found["held"] == 1
    with pytest.raises(ValueError, match="holds one story of 4 pictures; give at least two"):
        args.stories = str(stories(tmp_path / "one", 1))
        story_gen.data(args, demo, (0.0, 1.0))


def test_other_families_are_refused_by_name():
    with pytest.raises(ValueError, match="^sdxl is SDXL and StoryGen's image attention is made for SD1.5's U-Net; give an"):
        story_gen.StoryGen(tiny_base("sdxl"))


def test_defaults_are_the_authors_with_a_checkpoint_and_the_demos_without(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--checkpoint", "some.safetensors", "--stories", "folder"])
    real = story_gen.arguments()
    assert (real.residual, real.pixel_range, real.unordered, real.cpu) == ("twice", "0 1", 0.0, False)
    monkeypatch.setattr(sys, "argv", ["", "--stories", "1200"])
    own = story_gen.arguments()
    assert (own.residual, own.pixel_range, own.unordered, own.cpu) == ("once", "-1 1", 0.33, True)
    monkeypatch.setattr(sys, "argv", ["", "--frames", "3"])
    with pytest.raises(SystemExit):
        story_gen.arguments()
    assert "--frames 3; give a multiple of 64 and at least 4" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storygen")
    base = ["--folder", str(folder), "--steps", "2", "--minutes", "0", "--batch", "2", "--precision", "no"]
    own = [*base, "--stories", str(stories(folder / "own", 3)), "--side", "64", "--name", "own"]
    options = {"own": own, "demo": [*base, "--stories", "2", "--name", "demo", "--dry-run"]}
    return dict(zip(options, outputs("training.story_gen", list(options.values())), strict=True)), folder


def test_what_the_trainer_writes_goes_onto_the_demo_unet(runs, demo):
    told, folder = runs
    assert told["own"].endswith("done"), told
    state, metadata = weights.read(str(folder / "own.safetensors"), "test")
    own = weights.weights_of(weights.add(demo.model, state, metadata, "trained", "test"), "test")
    assert own.pixel_range == (-1.0, 1.0) and not own.sites.twice
    assert metadata["steps"] == "2" and metadata["examples_seen"] == "4" and metadata["base"] == demo.hash
    assert metadata["prediction"] == "V_PREDICTION" and metadata["residual"] == "once"
    assert {"own_samples.png", "own_loss.png", "own_state.pt"} <= {path.name for path in folder.iterdir()}
    assert "2 stories of 4 pages, 8 more for samples" in told["demo"] and not (folder / "demo.safetensors").exists()
