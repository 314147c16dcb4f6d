"""Trainers of sound: the mapping's loss on a problem that collapses, its data checks, the demo's data."""

import argparse
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from loading import ROOT
from storyweft.models.sound_mapping import build
from storyweft.training import sound_demo, sound_mapping
from storyweft.training.loop import Loop
from torch.nn.functional import normalize

COUNT, INSIDE, LENGTH, WIDTH = 1200, 48, 12, 24


def problem(seed=0):
    """Prompts of 3 to 8 rows that follow from a noisy embedding; the rest is padding, and three channels are loud noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((COUNT, 16))
    e = hidden @ rng.standard_normal((16, INSIDE)) + 0.5 * rng.standard_normal((COUNT, INSIDE))
    prompts = np.einsum("nh,hlw->nlw", hidden, rng.standard_normal((16, LENGTH, WIDTH))) / 4
    length = rng.integers(3, 9, COUNT)
    padding = np.arange(LENGTH) >= length[:, None]
    prompts[padding] = rng.standard_normal((LENGTH, WIDTH))[np.nonzero(padding)[1]]
    prompts[..., :3] = 80 * rng.standard_normal((COUNT, LENGTH, 3))
    prompts = prompts + 5
    tensors = {"audio": e, "target": prompts, "length": length, "target_of": np.arange(COUNT)}
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}


def options(*more):
    parser = argparse.ArgumentParser()
    sound_mapping.add_training(parser)
    return parser.parse_args(["--pairs", "none", "--hidden", "160", "--held", "200", "--noise", "0", *more])


def trained(steps, *more):
    torch.manual_seed(0)
    task = sound_mapping.MappingTask(sound_mapping.Pairs(problem(), {"target": "T5"}), options(*more))
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], 2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.from_numpy(np.random.default_rng(step).integers(task.examples, size=128))
        loss = task.loss(task.model, index, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task


def test_a_plain_squared_loss_finds_little_and_the_recommended_one_finds_the_goal():
    """Scores leave the three noisy channels out, as nobody can predict them."""
    scores = {}
    for name, more in (("plain", ("--no-whiten", "--no-mask", "--contrast", "0")), ("recommended", ())):
        task = trained(250, *more)
        kept = sound_mapping.Pairs(problem(), {})
        kept.prompts[..., :3] = 0
        judge = sound_mapping.MappingTask(kept, options())
        out = task.mapping(kept.embeddings["audio"][task.held], "audio")[0]
        out[..., :3] = 0
        white = (out - judge.mapping.target_mean) / judge.mapping.target_std
        mask = judge.mask[task.held]
        pairs = [sound_mapping.mean_rows(x, mask)[:, 3:] for x in (white.detach(), judge.white[task.held])]
        scores[name] = sound_mapping.diagnose(*pairs)
    assert scores["plain"]["retrieval_r1"] < 0.2
    assert scores["recommended"]["retrieval_r1"] > 0.9
    assert scores["recommended"]["r2_vs_mean"] > 0.5
    assert 0.5 < scores["recommended"]["var_ratio"] < 1.1
    assert scores["recommended"]["mi_lower_bound"] > scores["plain"]["mi_lower_bound"] + 1


def test_a_contrast_without_warm_up_freezes_a_zero_last_layer():
    """The cosine critic's gradient grows as outputs vanish and takes over the step's size."""
    frozen = trained(60, "--residual", "--contrast", "1", "--warm", "0")
    assert frozen.reports()["audio"]["var_ratio"] < 0.1
    cured = trained(60, "--residual", "--contrast", "0.1", "--warm", "40")
    assert cured.reports()["audio"]["var_ratio"] > 0.5


def test_training_writes_a_mapping_that_the_nodes_load_and_a_log(tmp_path, capsys):
    args = options("--folder", str(tmp_path), "--steps", "6", "--minutes", "0", "--batch", "32", "--cpu")
    task = sound_mapping.MappingTask(sound_mapping.Pairs(problem(), {"target": "T5", "space": "ImageBind"}), args)
    Loop(task, args).run()
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = tmp_path / "sound_mapping.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {key: value.float() for key, value in load_file(path).items()}
    mapping = build(tensors, about, path.name)
    assert mapping.config["space"] == "ImageBind"
    assert mapping(torch.ones(1, INSIDE), "audio")[0].shape == (1, LENGTH, WIDTH)
    means = normalize(problem()["audio"][task.kept].float(), dim=-1).mean(0)
    torch.testing.assert_close(mapping.modality_mean.audio, means, atol=1e-3, rtol=0)
    assert "audio: outputs depend on the input" in capsys.readouterr().out
    torch.nn.init.zeros_(task.mapping.network.last.weight)
    torch.nn.init.zeros_(task.mapping.network.places)
    task.show(task.model)
    assert "audio: COLLAPSED" in capsys.readouterr().out
    assert (tmp_path / "sound_mapping_diagnostics.jsonl").read_text().count("var_ratio") == 2


def test_data_that_is_no_number_is_refused():
    tensors = problem()
    tensors["audio"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="audio embeddings hold numbers that are none"):
        sound_mapping.Pairs(tensors, {})


def test_the_captioner_learns_words_of_all_scenes_and_hears_the_louder_voice():
    assert len(sound_demo.SCENES) == 144
    assert sound_demo.caption(("owl", "beach", "night")) == "an owl on the beach at night"
    assert {"<sos>", "<eos>", "fox", "an", "sunset"} <= set(sound_demo.words())
    waves = np.stack([sound_demo.heard(np.random.default_rng(seed), sound_demo.SCENES[5]) for seed in range(2)])
    found = sound_demo.features(waves)
    assert found.shape == (2, 160, 64) and found.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    covered = sound_demo.masked(found, generator)
    assert not torch.equal(covered, found) and (covered == found).float().mean() > 0.5


def test_the_cycle_term_makes_outputs_tell_their_input_and_is_not_written():
    """On inputs of which the prompt says little: without the term there is nothing to find."""
    with_cycle = trained(120, "--cycle", "1", "--warm", "0", "--contrast", "0")
    bound = with_cycle.reports()["audio"]["cycle_mi_lower_bound"]
    assert bound > 1.0
    assert "cycle_mi_lower_bound" not in trained(2).reports()["audio"]
    assert not any("back" in name for name in with_cycle.tensors())
    build(with_cycle.tensors(), {"config": sound_mapping.json.dumps(with_cycle.config)}, "m")
    back, e = torch.eye(4), torch.eye(4)
    apart = sound_mapping.MappingTask.cycle(back, e, torch.arange(4))
    assert sound_mapping.MappingTask.cycle(back, e, torch.zeros(4, dtype=torch.long)) < apart  # one caption: no negatives


def test_the_loss_runs_through_the_network_it_is_given():
    """Several processes exchange gradients in the forward pass of the network around the model, and nowhere else."""

    class Around(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *given):
            self.calls += 1
            return self.module(*given)

    generator = torch.Generator().manual_seed(0)
    mapping = sound_mapping.MappingTask(sound_mapping.Pairs(problem(), {}), options("--cycle", "0.05"))
    heard = {"features": torch.randn(4, 160, 64), "scene": torch.arange(4)}
    goals = torch.randn(144, 8), torch.randn(144, 2, 8)
    for task in (mapping, sound_demo.CaptionerTask(heard), sound_demo.EncoderTask(heard, *goals)):
        around = Around(task.model)
        task.loss(around, torch.arange(4), generator).backward()
        assert around.calls == 1
        assert not [name for name, value in task.model.named_parameters() if value.requires_grad and value.grad is None]


def test_a_run_that_goes_on_does_not_warm_up_again(tmp_path):
    def run(steps):
        args = options("--folder", str(tmp_path), "--steps", str(steps), "--minutes", "0", "--batch", "32", "--cpu", "--warm", "3")
        task = sound_mapping.MappingTask(sound_mapping.Pairs(problem(), {"target": "T5"}), args)
        task.contrast = lambda *given: counted.append(task.step) or torch.zeros(())
        loop = Loop(task, args)
        task.clock = lambda: loop.step
        loop.run()

    counted = []
    run(5)
    run(8)
    assert counted == [4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    sound_demo.write_folder(str(folder), 6, 0)
    return folder


def preparing(folder, out, *more):
    given = ["prepare", "--pairs", str(folder), "--out", str(out), "--encoder", "demo", "--text-encoder", "demo", *more]
    from storyweft.training.sound_pairs import prepare

    prepare(sound_mapping.arguments(given))


def test_a_folder_of_captions_sounds_and_pictures_is_prepared_and_trained_on(written, tmp_path, capsys):
    out = tmp_path / "new" / "pairs.safetensors"
    preparing(written, out)
    assert "6 examples, 6 prompts of (77, 96)" in capsys.readouterr().out
    pairs = sound_mapping.Pairs.read(str(out))
    assert {name: tuple(e.shape) for name, e in pairs.embeddings.items()} == dict.fromkeys(("audio", "image", "text"), (6, 96))
    assert pairs.about == {"space": "demo", "target": "demo CLIP"}
    captions = [path.read_text().split() for path in sorted(written.glob("*.txt"))]
    assert pairs.length.tolist() == [len(words) + 2 for words in captions]
    unit = {name: normalize(e, dim=-1) for name, e in pairs.embeddings.items()}
    for name in ("audio", "image"):
        assert (unit[name] @ unit["text"].T).diagonal().mean() > (unit[name] @ unit["text"].T).mean() + 0.1
    from storyweft.host import demo

    clip = demo.load_clip(str(demo.WEIGHTS))
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(" ".join(captions[2])))
    torch.testing.assert_close(pairs.prompts[2], encoded[0][0][0])
    args = options("--folder", str(tmp_path), "--steps", "2", "--minutes", "0", "--batch", "4", "--cpu", "--cycle", "0.05")
    args.held = 0
    Loop(sound_mapping.MappingTask(pairs, args), args).train_step()


def test_a_folder_that_cannot_be_prepared_is_refused_by_name(written, tmp_path):
    def spoilt(name, content):
        folder = tmp_path / name.replace(".", "_")
        shutil.copytree(written, folder)
        (folder / name).write_bytes(content)
        return folder

    for folder, words in (
        (tmp_path, "holds no captions"),
        (spoilt("00001.txt", b" \n"), "00001.txt is empty"),
        (spoilt("00002.wav", b"no sound"), "00002.wav holds no sound that can be read"),
        (spoilt("00003.png", b"no picture"), "00003.png is no picture that can be read"),
    ):
        with pytest.raises(ValueError, match=words):
            preparing(folder, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="--text-type is 'x'; choose one of stable_diffusion"):
        preparing(written, tmp_path / "x.safetensors", "--text-encoder", "file", "--text-type", "x")
    with pytest.raises(ValueError, match="prepare needs --encoder and --text-encoder"):
        preparing(written, tmp_path / "x.safetensors", "--encoder", "")
    (tmp_path / "00002_wav" / "00002.wav").unlink()
    preparing(tmp_path / "00002_wav", tmp_path / "x.safetensors")
    assert set(sound_mapping.Pairs.read(str(tmp_path / "x.safetensors")).embeddings) == {"image", "text"}


def test_two_processes_train_one_mapping(tmp_path):
    """Every process sees its half of a batch; what they learn is one model, with the cycle's part in the exchange."""
    from safetensors.torch import load_file, save_file

    save_file(problem(), tmp_path / "pairs.safetensors")
    given = ["--pairs", str(tmp_path / "pairs.safetensors"), "--hidden", "32", "--steps", "4", "--minutes", "0", "--batch", "32"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "training.sound_mapping", "train", *given]
    command += ["--folder", str(tmp_path / "two"), "--cycle", "0.05", "--warm", "2", "--held", "200", "--cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 4 audio:") == 1
    found = load_file(tmp_path / "two" / "sound_mapping.safetensors")
    assert all(value.isfinite().all() for value in found.values())


def test_a_folder_is_prepared_with_the_towers_of_imagebind_that_it_needs(written, tmp_path, monkeypatch):
    from storyweft.models import imagebind
    from storyweft.training import sound_pairs

    size = {"width": 16, "depth": 1, "heads": 2, "out": 8}
    sizes = {"audio": {**size, "tokens": 229, "patch": 16}, "text": {**size, "tokens": 77, "patch": 49408}}
    asked, generator = [], torch.Generator().manual_seed(0)

    def built(state, towers, source):
        asked.append((list(towers), source))
        network = imagebind.ImageBind(sizes)
        for value in network.parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.2
        return network.train(False).requires_grad_(False)

    monkeypatch.setattr(sound_pairs.imagebind, "build", built)
    monkeypatch.setattr(sound_pairs.model_files, "read", lambda path, node_id: {})
    folder = tmp_path / "sounds"
    shutil.copytree(written, folder, ignore=shutil.ignore_patterns("*.png"))
    preparing(folder, tmp_path / "pairs.safetensors", "--encoder", "imagebind_huge.pth", "--target-name", "mine")
    pairs = sound_mapping.Pairs.read(str(tmp_path / "pairs.safetensors"))
    assert asked == [(["text", "audio"], "imagebind_huge.pth")] and pairs.about == {"space": "ImageBind", "target": "mine"}
    assert {name: tuple(e.shape) for name, e in pairs.embeddings.items()} == {"audio": (6, 8), "text": (6, 8)}
