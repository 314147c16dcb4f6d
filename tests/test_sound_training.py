"""Trainers of sound: the mapping's loss on a problem that collapses, its data checks, the demo's data."""

import argparse

import numpy as np
import pytest
import torch
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
        out = task.model(kept.embeddings["audio"][task.held], "audio")[0]
        out[..., :3] = 0
        white = (out - judge.model.target_mean) / judge.model.target_std
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
    assert frozen.reports(frozen.model)["audio"]["var_ratio"] < 0.1
    cured = trained(60, "--residual", "--contrast", "0.1", "--warm", "40")
    assert cured.reports(cured.model)["audio"]["var_ratio"] > 0.5


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
    torch.nn.init.zeros_(task.model.network.last.weight)
    torch.nn.init.zeros_(task.model.network.places)
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
