"""The loop all trainers of this folder share, on Hugging Face Accelerate.

One process, several GPUs or several machines: `python -m training.X` or `accelerate launch -m training.X`. A trainer
says what is trained and how an example is judged (`Task`); the loop does the rest: mixed precision, averaged weights
(EMA), a state to go on from, the model as safetensors with its recipe in the metadata, a progress bar, the loss curve
and a sheet of samples as pictures, a stop by steps or minutes or at Ctrl-C, and a dry run.

Everything random of a step follows from (seed, step, process): a run that stops and goes on with as many processes
gives the same bits as one that does not stop, where it stops by steps. By minutes the rate follows the clock.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tqdm import tqdm


class Task:
    """What is trained. Parameters of `model` that require no gradient stay as they are and are not written.

    name: stem of the files. config: what is needed to build the model again. metadata: further words about the recipe,
    such as the hash of a base model. examples: how many there are.
    """

    name: str
    model: torch.nn.Module
    config: dict
    metadata: dict[str, str] = {}
    examples: int

    def loss(self, network, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean loss of the examples of `index` [n]; `network` is the model, ready for this device. Called under
        autocast; everything random comes from `generator` (on the CPU)."""
        raise NotImplementedError

    def check(self) -> list[str]:
        """Look at the data without training: lines for the dry run. Raises ValueError for data that cannot do."""
        return [f"{self.examples} examples"]

    def show(self, model) -> Image.Image | None:
        """A sheet of samples; `model` has the averaged weights."""
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is written: weights that are trained, and buffers."""
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name not in frozen}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, for the metadata of what was trained on it."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            found.update(block)
    return found.hexdigest()


def checksums(folder: Path) -> None:
    """Write SHA256SUMS of every weight file of the folder, in the form that sha256sum -c reads."""
    lines = [f"{file_hash(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    part = folder / f"SHA256SUMS.{os.getpid()}.part"
    part.write_text("".join(lines))
    os.replace(part, folder / "SHA256SUMS")


def add_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """The options of the loop; `defaults` replaces those of a trainer."""
    add = parser.add_argument
    add("--folder", default="output/training", help="where model, state and pictures go")
    add("--steps", type=int, default=0, help="stop after this many steps in all (0: by minutes alone)")
    add("--minutes", type=float, default=60, help="stop after this time in all, resumed runs counted (0: by steps)")
    add("--batch", type=int, default=8, help="examples a step, over all processes")
    add("--accumulate", type=int, default=1, help="parts a process's share of a step is computed in, to save memory")
    add("--rate", type=float, default=1e-4, help="learning rate of AdamW")
    add("--warmup", type=int, default=100, help="steps in which the rate rises")
    add("--decay", type=float, default=0.33, help="last part of the run, in which the rate falls to zero")
    add("--average", type=float, default=0.999, help="EMA: what averaged weights keep at a step (lower at the start)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--precision", default="bf16", choices=("no", "bf16", "fp16"), help="mixed precision")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--save-minutes", type=float, default=5, help="time from one checkpoint to the next")
    add("--show-minutes", type=float, default=15, help="time from one sheet of samples to the next")
    add("--cpu", action="store_true", help="train on the CPU although there is a GPU")
    add("--dry-run", action="store_true", help="check data, predict memory and time; train nothing and write no more than prepared data")
    parser.set_defaults(**defaults)


def curve(points: list[tuple[int, float]], size=(640, 320)) -> Image.Image:
    """Loss over steps; the vertical axis is logarithmic."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    steps, losses = (np.array(column, float) for column in zip(*points, strict=True))
    height = np.log(np.maximum(losses, 1e-12))
    low, high = height.min(), max(height.max(), height.min() + 1e-3)
    x = 60 + (size[0] - 80) * steps / max(steps[-1], 1)
    y = 20 + (size[1] - 60) * (high - height) / (high - low)
    draw.rectangle((60, 20, size[0] - 20, size[1] - 40), outline=(200, 200, 200))
    for level in np.linspace(low, high, 5):
        draw.text((6, 14 + (size[1] - 60) * (high - level) / (high - low)), f"{math.exp(level):.4g}", fill="black")
    draw.text((60, size[1] - 30), "step 0", fill="black")
    draw.text((size[0] - 90, size[1] - 30), f"{int(steps[-1])}", fill="black")
    draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=(40, 90, 200), width=2)
    return image


class Loop:
    """Trains a task with the options of `add_arguments`. Raises ValueError, one sentence, for a state that is not of
    this task or a run that would never stop."""

    def __init__(self, task: Task, args: argparse.Namespace):
        if not args.steps and not args.minutes:
            raise ValueError("neither --steps nor --minutes is set: the training would never stop")
        self.task, self.args = task, args
        self.accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if args.batch % (self.world * args.accumulate):
            raise ValueError(
                f"--batch {args.batch} cannot be shared by {self.world} processes in {args.accumulate} parts"
            )
        self.trained = [value for value in task.model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.network, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self.average = [value.detach().clone() for value in self.trained]
        self.step, self.seen, self.seconds, self.points, self.losses = 0, 0, 0.0, [], []
        self.stop = False
        self.path = Path(args.folder) / f"{task.name}.safetensors"
        self.state = self.path.with_name(f"{task.name}_state.pt")

    def order(self) -> torch.Tensor:
        """Numbers of this step's examples, this process's share: every example once an epoch, in a new order."""
        place = np.arange(self.seen, self.seen + self.args.batch)
        size = self.task.examples
        shuffled = {
            epoch: np.random.default_rng((self.args.seed, epoch)).permutation(size)
            for epoch in np.unique(place // size).tolist()
        }
        chosen = np.array([shuffled[at // size][at % size] for at in place.tolist()])
        return torch.from_numpy(chosen[self.rank :: self.world])

    def generator(self) -> torch.Generator:
        """This step's source of chance; the global one is set alike, for dropout."""
        words = np.random.SeedSequence((self.args.seed, self.step, self.rank)).generate_state(2, np.uint32)
        seed = int(words[0]) << 31 | int(words[1]) >> 1
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        parts = (self.step / self.args.steps if self.args.steps else 0.0,
                 self.seconds / 60 / self.args.minutes if self.args.minutes else 0.0)  # fmt: skip
        return min(1.0, max(parts))

    def train_step(self) -> torch.Tensor:
        """One step of the optimiser; the loss, on this process's examples, stays on the device."""
        args, generator, total = self.args, self.generator(), 0.0
        warm = min(1.0, (self.step + 1) / max(args.warmup, 1))
        fall = min(1.0, (1 - self.progress()) / args.decay + 0.01) if args.decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = args.rate * warm * fall
        parts = self.order().chunk(args.accumulate)
        for part in parts:
            last = part is parts[-1] or self.world == 1  # processes exchange gradients once a step
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.network, part, generator) / args.accumulate
                self.accelerator.backward(loss)
            total = total + loss.detach()
        self.accelerator.clip_grad_norm_(self.trained, args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + args.batch
        keep = min(args.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.trained, 1 - keep)
        return total

    @contextmanager
    def averaged(self):
        """The model with the averaged weights."""
        own = [value.detach().clone() for value in self.trained]
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, own)

    def save(self) -> None:
        """Model and state; each is written beside its place and then moved there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scaler = self.accelerator.scaler
        state = {
            "config": json.dumps(self.task.config), "seed": self.args.seed, "world": self.world, "step": self.step,
            "seen": self.seen, "seconds": self.seconds, "points": self.points, "losses": self.losses,
            "model": [value.detach().cpu() for value in self.trained], "average": [value.cpu() for value in self.average],
            "optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {},
        }  # fmt: skip
        part = self.state.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.state)
        with self.averaged():
            tensors = {
                name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
                for name, value in self.task.tensors().items()
            }
        recent = [loss for _, loss in self.points[-5:]]
        metadata = {
            "config": json.dumps(self.task.config), "steps": str(self.step), "examples_seen": str(self.seen),
            "minutes": f"{self.seconds / 60:.1f}", "processes": str(self.world), "seed": str(self.args.seed),
            "loss": f"{np.mean(recent):.4f}" if recent else "", "options": json.dumps(vars(self.args), default=str),
            **self.task.metadata,
        }  # fmt: skip
        part = self.path.with_suffix(".part")
        save_file(tensors, part, metadata)
        os.replace(part, self.path)
        if self.points:
            curve(self.points).save(self.path.with_name(f"{self.task.name}_loss.png"))

    def resume(self) -> None:
        state = torch.load(self.state, weights_only=True, map_location="cpu")
        if state["config"] != json.dumps(self.task.config):
            raise ValueError(f"{self.state} is of another model: remove it or choose another --folder")
        if state["world"] != self.world:
            print(f"{self.state} was written by {state['world']} processes: what follows differs in its bits", flush=True)
        with torch.no_grad():
            torch._foreach_copy_(self.trained, [value.to(self.trained[0].device) for value in state["model"]])
            torch._foreach_copy_(self.average, [value.to(self.average[0].device) for value in state["average"]])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]
        self.points, self.losses = [tuple(point) for point in state["points"]], state["losses"]

    def show(self) -> None:
        with self.averaged(), torch.no_grad():
            self.task.model.train(False)
            sheet = self.task.show(self.task.model)
            self.task.model.train(True)
        if sheet is not None:
            sheet.save(self.path.with_name(f"{self.task.name}_samples.png"))

    def clock(self, seconds: float) -> None:
        """The first process's time and anyone's wish to stop, so that all stop at the same step."""
        told = torch.tensor([seconds if self.rank == 0 else 0.0, float(self.stop)], device=self.accelerator.device)
        self.seconds, stop = self.accelerator.reduce(told, "sum").tolist() if self.world > 1 else told.tolist()
        self.stop = stop > 0

    def note(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))
        if self.step % 20 == 0 or self.progress() >= 1:
            self.points.append((self.step, float(np.mean(self.losses))))
            self.losses = []

    def run(self) -> None:
        """Train to the end of the run, going on from the state if there is one."""
        if self.args.dry_run:
            self.dry_run()
            return
        if self.state.exists():
            self.resume()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask_to_stop)
        first, before = self.rank == 0, self.seconds
        start = saved = shown = time.time()
        bar = tqdm(total=self.args.steps or None, initial=self.step, unit="step", disable=not first, mininterval=2)
        while self.progress() < 1 and not self.stop:
            loss = self.train_step()
            self.clock(before + time.time() - start)
            self.note(loss)
            bar.update()
            if self.points:
                bar.set_postfix(loss=f"{self.points[-1][1]:.4f}", examples=self.seen, minutes=f"{self.seconds / 60:.1f}", refresh=False)
            if first and time.time() - saved > 60 * self.args.save_minutes:
                self.save()
                saved = time.time()
            if first and time.time() - shown > 60 * self.args.show_minutes:
                self.show()
                shown = time.time()
        bar.close()
        if first:
            self.save()
            self.show()
        self.accelerator.wait_for_everyone()

    def ask_to_stop(self, *_) -> None:
        self.stop = True

    def dry_run(self, steps: int = 3) -> dict[str, float]:
        """Check the data, take a few steps, say what training will need; write nothing. The loop is used up by it."""
        lines = self.task.check()
        device = self.accelerator.device
        weights = sum(value.nbytes for value in self.task.model.parameters())
        trained = sum(value.nbytes for value in self.trained)
        times = []
        for _ in range(steps):
            start = time.time()
            float(self.train_step())
            times.append(time.time() - start)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = min(times)
        budget = self.args.minutes * 60 or math.inf
        planned = min(self.args.steps or math.inf, max(1.0, budget / seconds))
        found = {
            "weights": weights / 2**20, "states": 3 * trained / 2**20, "peak": peak / 2**20, "seconds": seconds,
            "steps": planned, "minutes": planned * seconds / 60, "file": trained / 2 / 2**20,
        }  # fmt: skip
        lines += [
            f"{sum(value.numel() for value in self.trained) / 1e6:.2f} M trained parameters, model {found['weights']:.1f} "
            f"MiB, optimiser and averaged weights {found['states']:.1f} MiB, peak of the process on {device.type} "
            f"{found['peak']:.0f} MiB",
            f"{seconds:.2f} s a step of {self.args.batch} examples on {self.world} processes: {planned:.0f} steps in "
            f"{found['minutes']:.0f} minutes, {planned * self.args.batch / self.task.examples:.1f} times every example",
            f"would write {self.path} of {found['file']:.1f} MiB",
        ]
        if self.rank == 0:
            print("\n".join(lines), flush=True)
        return found
