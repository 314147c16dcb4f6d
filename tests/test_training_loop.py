"""The loop of the trainers: going on equals not stopping, averages, metadata, stop, dry run."""

import argparse
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from storyweft.training import loop


class Line(loop.Task):
    """A line through points with noise, behind a frozen layer, with dropout (the global generator)."""

    name, config, metadata, examples = "line", {"width": 4}, {"base": "none"}, 12

    def __init__(self, width: int = 4):
        torch.manual_seed(3)
        self.config = {"width": width}
        self.model = torch.nn.Sequential(
            torch.nn.Linear(2, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
        ).train()
        self.model[0].requires_grad_(False)
        self.x = torch.randn(self.examples, 2)
        self.visited, self.shown = [], 0

    def loss(self, network, index, generator):
        self.visited += index.tolist()
        noise = 0.1 * torch.randn(len(index), 1, generator=generator)
        return (network(self.x[index]) - self.x[index].sum(1, keepdim=True) - noise).square().mean()

    def show(self, model):
        self.shown += 1
        assert not model.training
        return Image.new("RGB", (8, 8))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


def options(folder, **changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    loop.add_arguments(parser, folder=str(folder), minutes=0, steps=6, batch=4, rate=1e-2, precision="no", cpu=True)
    args = parser.parse_args([])
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


def trained(folder, **changes) -> tuple[loop.Loop, Line]:
    task = Line()
    run = loop.Loop(task, options(folder, **changes))
    run.run()
    return run, task


def weights(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "line.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_going_on_equals_not_stopping(tmp_path, precision):
    whole, task = trained(tmp_path / "whole", precision=precision, decay=0)
    trained(tmp_path / "parts", precision=precision, decay=0, steps=2)
    parts, second = trained(tmp_path / "parts", precision=precision, decay=0)
    assert second.visited == task.visited[8:] and parts.step == whole.step == 6
    for one, other in zip(whole.trained + whole.average, parts.trained + parts.average, strict=True):
        assert torch.equal(one, other)
    one, other = (torch.load(tmp_path / name / "line_state.pt", weights_only=True) for name in ("whole", "parts"))
    for name, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][name][key])
    assert all(torch.equal(value, weights(tmp_path / "parts")[name]) for name, value in weights(tmp_path / "whole").items())


def test_every_example_once_an_epoch_in_new_orders(tmp_path):
    _, task = trained(tmp_path)
    first, second = task.visited[:12], task.visited[12:]
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    _, other = trained(tmp_path / "seed", seed=1)
    assert other.visited != task.visited


def test_parts_of_a_step_give_its_gradient(tmp_path):
    """Losses of parts add up to the whole's: with dropout and noise off the steps are the same."""
    runs = []
    for accumulate in (1, 2):
        AcceleratorState._reset_state(True)
        task = Line()
        task.model[1].p = 0.0
        task.loss = lambda network, index, generator, task=task: network(task.x[index]).square().mean()
        runs.append(loop.Loop(task, options(tmp_path / str(accumulate), accumulate=accumulate)))
        runs[-1].run()
    for one, other in zip(runs[0].trained, runs[1].trained, strict=True):
        torch.testing.assert_close(one, other)


def test_average_follows_the_weights(tmp_path):
    task = Line()
    run = loop.Loop(task, options(tmp_path, average=0.2))
    expected = [value.detach().clone() for value in run.trained]
    for step in range(1, 4):
        run.train_step()
        keep = min(0.2, (1 + step) / (10 + step))
        expected = [keep * old + (1 - keep) * new.detach() for old, new in zip(expected, run.trained, strict=True)]
    for one, other in zip(run.average, expected, strict=True):
        torch.testing.assert_close(one, other)
    own = [value.detach().clone() for value in run.trained]
    with run.averaged():
        assert all(torch.equal(one, other) for one, other in zip(run.trained, run.average, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(run.trained, own, strict=True))


def test_file_holds_averaged_trained_weights_and_the_recipe(tmp_path):
    run, task = trained(tmp_path, steps=20)
    stored = weights(tmp_path)
    assert set(stored) == {"2.weight", "2.bias"}  # the frozen layer is not written
    assert torch.equal(stored["2.weight"], run.average[0].half()) and not torch.equal(run.average[0], run.trained[0])
    with safe_open(tmp_path / "line.safetensors", "pt") as file:
        found = file.metadata()
    assert json.loads(found["config"]) == {"width": 4} and found["base"] == "none"
    assert (found["steps"], found["examples_seen"], found["seed"], found["processes"]) == ("20", "80", "0", "1")
    assert float(found["loss"]) > 0 and json.loads(found["options"])["rate"] == 1e-2
    for name in ("line_loss.png", "line_samples.png"):
        assert Image.open(tmp_path / name).size[0] > 0
    assert task.shown == 1


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path):
    task = Line()
    run = loop.Loop(task, options(tmp_path, steps=1000))
    step = run.train_step
    run.train_step = lambda: (run.ask_to_stop() if run.step == 4 else None, step())[1]
    run.run()
    assert run.step == 5
    again, _ = trained(tmp_path, steps=7)
    assert again.step == 7


def test_minutes_stop_too(tmp_path):
    run, _ = trained(tmp_path, steps=0, minutes=0.01)
    assert run.step > 0 and run.seconds >= 0.6


def test_dry_run_writes_nothing_and_predicts(tmp_path, capsys):
    _, task = trained(tmp_path / "out", dry_run=True, steps=500)
    assert not (tmp_path / "out").exists() and task.shown == 0
    told = capsys.readouterr().out
    assert "12 examples" in told and "500 steps" in told and "MiB" in told and "line.safetensors" in told


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="never stop"):
        loop.Loop(Line(), options(tmp_path, steps=0))
    with pytest.raises(ValueError, match="--batch 3 cannot be shared by 1 processes in 2 parts"):
        loop.Loop(Line(), options(tmp_path, batch=3, accumulate=2))
    trained(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        loop.Loop(Line(5), options(tmp_path)).run()
