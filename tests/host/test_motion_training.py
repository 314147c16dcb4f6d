"""Stage two of the motion trainer: against the node's own way into the demo video model and SVD, and what it refuses."""

import sys

import one_step
import pytest
import tiny
import torch
from storyweft.host import motion
from storyweft.host.demo import WEIGHTS, load_demo_video
from storyweft.host.image_adapter import LoadedAdapter
from storyweft.host.motion import Attachment, LoadedPredictor, attach
from storyweft.models.motion_predictor import MotionPredictor
from storyweft.training import motion_predictor, motion_tasks
from storyweft.training.adapted import read_adapter
from storyweft.training.picture_model import PictureModel

CLIPS, FRAMES, PATH = 4, 3, WEIGHTS / "video.safetensors"


def drawn(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictor_of(dim):
    network = MotionPredictor(dim, 16, 2, 8, 1)
    tiny.fill(network, 3)
    return network


@pytest.fixture(scope="module")
def svd():
    return motion_tasks.VideoModel("svd", PATH, tiny.build("svd"), None, None)


def recorded(task, index, generator):
    """The loss of one clip and what the network was called with."""
    seen = {}

    def network(x, t, context, ends, shown, **more):
        seen.update(x=x, t=t, context=context, ends=ends, shown=shown, **more)
        return task.model(x, t, context, ends, shown, **more)

    with torch.no_grad():
        return task.loss(network, index, generator), seen


def error(base, x, a, core, clean):
    """Of the prediction that core's clean latents stand for."""

    def predicted(clean):
        return base.wanted(clean, (x - a.sqrt() * clean) / (1 - a).sqrt(), a)

    return (predicted(core) - predicted(clean)).square().mean()


def test_svd_is_trained_as_the_node_runs_it(svd):
    """Predicted embeddings one a frame, first picture beside the noise, motion and frames a second, continuous noise levels."""
    predictor, found, latents = predictor_of(16), drawn(CLIPS, FRAMES, 16), drawn(CLIPS, FRAMES, 4, *tiny.SIZE)
    task = motion_tasks.ImageToFilm(
        motion_tasks.Filmed(predictor, None, svd.unet, True), svd, found, latents, "enc", True, "test", fps=8.0
    )
    for seed in (0, 1, 2):
        loss, seen = recorded(task, torch.tensor([1]), torch.Generator().manual_seed(seed))
        back = not torch.equal(seen["ends"][0], found[1][[0, -1]])
        clean = latents[1].flip(0) if back else latents[1]
        sigma = (4 * seen["t"][0]).exp()
        x = seen["x"][:, :4]
        given = Attachment(
            motion.predict(LoadedPredictor("tiny", predictor), seen["ends"][0], FRAMES, True, "test"), 2, FRAMES
        )
        beside = svd.model.model.process_latent_out(clean[:1])
        extras = {"concat_latent_image": beside, "fps": 8, "motion_bucket_id": 127, "augmentation_level": 0.0}
        positive = [[torch.zeros(1, 1, 16), extras]]
        model, positive, negative = attach(svd.model, positive, positive, given)
        a = 1 / (1 + sigma**2)
        core = one_step.clean(model, x / a.sqrt(), sigma.item(), positive, negative)
        assert torch.isclose(loss, error(svd, x, a, core, clean), rtol=2e-3)
        plain = one_step.clean(svd.model, x / a.sqrt(), sigma.item(), [[torch.zeros(1, 1, 16), extras]], negative)
        assert not torch.allclose(plain, core, atol=1e-3)


def test_of_svd_the_predictor_alone_is_trained(svd):
    predictor = predictor_of(16)
    model = motion_tasks.Filmed(predictor, None, svd.unet, True)
    task = motion_tasks.ImageToFilm(
        model, svd, drawn(CLIPS, FRAMES, 16), drawn(CLIPS, FRAMES, 4, *tiny.SIZE), "enc", True, "test", fps=8.0
    )
    task.loss(model, torch.tensor([0, 2]), torch.Generator().manual_seed(0)).backward()
    assert predictor.out_proj.weight.grad.any() and all(value.grad is None for value in svd.unet.parameters())
    assert set(task.tensors()) == set(predictor.state_dict())
    shown = task.drawn(model, torch.tensor([0]), steps=2)
    assert shown.shape == (FRAMES, 4, *tiny.SIZE) and shown.isfinite().all()


def test_the_demo_video_model_is_trained_as_the_node_runs_it():
    """Text and the demo adapter's tokens of every frame's predicted embedding; noise that the frames share."""
    base = PictureModel("demo", PATH, *load_demo_video()[:3])
    adapter = read_adapter(WEIGHTS / "adapter.safetensors", base)
    predictor, found, latents = predictor_of(96), drawn(CLIPS, FRAMES, 96), drawn(CLIPS, FRAMES, 4, *tiny.SIZE)
    task = motion_tasks.Film(
        motion_tasks.Filmed(predictor, adapter, base.unet, True), base, found, latents, "enc", True, "test"
    ).told(["a red fox", "a blue owl", "", "a red fox"])
    seeds = (s for s in range(99) if torch.rand(2, generator=torch.Generator().manual_seed(s))[1] >= 0.15)
    loss, seen = recorded(task, torch.tensor([1]), torch.Generator().manual_seed(next(seeds)))
    back = not torch.equal(seen["ends"][0], found[1][[0, -1]])
    clean, a = latents[1].flip(0) if back else latents[1], base.alphas[seen["t"][0]]
    assert seen["shown"].tolist() == [1.0]
    embeddings = motion.predict(LoadedPredictor("tiny", predictor), seen["ends"][0], FRAMES, True, "test")
    given = Attachment(embeddings, 2, FRAMES, adapter=LoadedAdapter("demo", adapter))
    text = [[base.text(["a blue owl"])[0], {}]]
    model, positive, negative = attach(base.model, text, text, given)
    core = one_step.clean(model, seen["x"] / a.sqrt(), ((1 - a) / a).sqrt().item(), positive, negative)
    assert torch.isclose(loss, error(base, seen["x"], a, core, clean), rtol=5e-3)
    noise = task.noise((4000 * FRAMES, 1), FRAMES, torch.Generator().manual_seed(0)).view(-1, FRAMES)
    assert abs(noise.T.corrcoef()[0, 1] - 0.8) < 0.02 and abs(noise.std() - 1) < 0.02


def test_other_models_are_refused_by_name():
    for name, kind in (("wan", "WAN21"), ("sd15", "BaseModel")):
        with pytest.raises(ValueError, match=f"^{name} is a {kind}; give an SVD checkpoint, ComfyUI's one video model"):
            motion_tasks.VideoModel(name, PATH, tiny.build(name), None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "x"], "--checkpoint needs --stage video and --videos"),
        (["--checkpoint", "x", "--stage", "video"], "--checkpoint needs --stage video and --videos"),
        (["--stage", "video", "--encoder", "x"], "reads the demo encoder: leave --encoder out"),
        (["--side", "128"], "--side is 128; give a multiple of 64, in stage two"),
        (["--frames", "2"], "--frames is 2; a clip needs a frame between its ends"),
    ],
)
def test_options_that_do_not_go_together(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", *options])
    with pytest.raises(SystemExit):
        motion_predictor.arguments()
    assert words in capsys.readouterr().err
