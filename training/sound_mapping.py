"""Trains a mapping network: one embedding of a sound, picture or text -> the prompt embeddings of a text encoder.

`python -m training.sound_mapping prepare --pairs FOLDER --encoder FILE --text-encoder FILES` reads a folder of NAME.txt
captions, each with NAME.wav (flac, ogg, mp3) or NAME.png (jpg, webp) or both, and writes their embeddings and the captions'
prompts to one file; `python -m training.sound_mapping train --pairs FILE` trains on it (one process or `accelerate launch`).

A squared loss alone makes the outputs of all inputs alike: the constant part of prompts and their padding already make it
small. Against that stand whitening per position and channel, a mask over padding, and a mutual information term (InfoNCE,
switched on after a warm-up); a cycle term, which finds the embedding again in the output, is there for the asking. Every report
says how far outputs are spread, how well they fit and what they find.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from . import pack  # noqa: F401
from .loop import Loop, Task, add_arguments

from storyweft.metrics.mapping import TAU, collapsed, diagnose, info_nce  # isort: skip
from storyweft.models.sound_mapping import ARCHITECTURES, PromptMapping  # isort: skip

MODALITIES = ("audio", "image", "text")
ALIKE = 0.95  # cosine of two targets from which on they are no negatives of each other
NEGATIVES = 4096  # targets beyond the batch that a prediction is told apart from
SHOWN = (
    "var_ratio", "r2_vs_mean", "mean_offdiag_cos", "retrieval_r1", "retrieval_mean_rank", "mi_lower_bound", "effective_rank",
    "cycle_mi_lower_bound",
)  # fmt: skip


class Pairs:
    """A prepared file: embeddings [N, width] by modality, prompts [P, length, width], which prompt is each example's."""

    def __init__(self, tensors: dict[str, Tensor], about: dict[str, str]):
        self.embeddings = {name: tensors[name].float() for name in MODALITIES if name in tensors}
        self.prompts, self.length = tensors["target"].float(), tensors["length"]
        self.pooled = tensors["pooled"].float() if "pooled" in tensors else None
        self.of, self.about = tensors["target_of"], about
        for name, e in self.embeddings.items():
            if not e.isfinite().all():
                raise ValueError(f"the {name} embeddings hold numbers that are none (NaN)")
        if not self.prompts.isfinite().all():
            raise ValueError("the prompts hold numbers that are none (NaN)")

    @classmethod
    def read(cls, path: str) -> "Pairs":
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        return cls(load_file(path), about)


def pooled_rows(whitened: Tensor, mask: Tensor) -> Tensor:
    """Unit mean over a caption's rows of whitened prompts [n, length, width]."""
    return normalize((whitened * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1), dim=-1)


class Trained(nn.Module):
    """The mapping and, for the cycle term, what finds its input again; processes share the gradients of this forward pass."""

    def __init__(self, mapping: PromptMapping, cycle: bool):
        super().__init__()
        self.mapping, self.back = mapping, None
        if cycle:
            inside, width, hidden = (mapping.config[key] for key in ("inside", "width", "hidden"))
            self.back = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, inside))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Whitened prompts [n, length, width], whitened pooled vectors, embeddings found again; what is not there is None."""
        out = self.mapping.network(x).float()
        pooled = None if self.mapping.pooled is None else self.mapping.pooled(x).float()
        return out, pooled, None if self.back is None else self.back(mean_rows(out, mask))


class MappingTask(Task):
    """Loss: squared error in whitened, masked space, and the terms that keep outputs apart."""

    name = "sound_mapping"

    def __init__(self, pairs: Pairs, args: argparse.Namespace):
        self.pairs, self.args = pairs, args
        count = len(pairs.of)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
        held = min(args.held, count // 5)
        self.held, self.kept = order[:held], order[held:]
        self.examples = len(self.kept)
        self.names = list(pairs.embeddings)
        length, width = pairs.prompts.shape[1:]
        self.config = {
            "arch": args.arch, "inside": next(iter(pairs.embeddings.values())).shape[1], "length": length, "width": width,
            "hidden": args.hidden, "pooled": 0 if pairs.pooled is None else pairs.pooled.shape[1],
            "residual": args.residual, "modalities": self.names, **pairs.about,
        }  # fmt: skip
        self.mapping = PromptMapping(self.config)
        self.model = Trained(self.mapping, bool(args.cycle))
        seen = pairs.of[self.kept].unique()
        if args.whiten:
            self.mapping.set_statistics(pairs.prompts[seen], None if pairs.pooled is None else pairs.pooled[seen])
        for name, e in pairs.embeddings.items():
            self.mapping.set_modality(name, e[self.kept])
        rows = torch.arange(length)
        self.mask = (rows < pairs.length[:, None]).float()
        if not args.mask:
            self.mask.fill_(1)
        self.white = (pairs.prompts - self.mapping.target_mean) / self.mapping.target_std
        self.goals = pooled_rows(self.white, self.mask)
        self.seen, self.step = seen, 0
        self.clock: Callable[[], int] | None = None  # steps that were made before a run went on

    def check(self) -> list[str]:
        found = {name: tuple(e.shape) for name, e in self.pairs.embeddings.items()}
        return [f"{len(self.pairs.of)} examples, {len(self.pairs.prompts)} prompts {tuple(self.pairs.prompts.shape[1:])}; {found}"]

    def tensors(self) -> dict[str, Tensor]:
        return self.mapping.state_dict()

    def loss(self, network, index, generator):
        args, own = self.args, self.kept[index]
        which = torch.randint(len(self.names), (len(own),), generator=generator)
        clean = torch.stack([normalize(self.pairs.embeddings[name][own], dim=-1) for name in self.names])
        clean = clean[which, torch.arange(len(own))]
        e = clean + (args.noise / clean.shape[1]) ** 0.5 * torch.randn(clean.shape, generator=generator)
        device = self.mapping.target_mean.device
        x = torch.empty_like(e, device=device)
        for number, name in enumerate(self.names):
            x[which == number] = self.mapping.given(e[which == number].to(device), name)
        goal = self.pairs.of[own]
        mask, white = self.mask[goal].to(device), self.white[goal].to(device)
        out, pooled, back = network(x, mask)
        weight = mask[..., None] + args.padding * (1 - mask[..., None])
        loss = ((out - white).square() * weight).sum() / (weight.sum() * out.shape[-1])
        if pooled is not None:
            aim = (self.pairs.pooled[goal].to(device) - self.mapping.pooled_mean) / self.mapping.pooled_std
            loss = loss + (pooled - aim).square().mean()
        warm = max(100, int(0.05 * args.steps)) if args.warm < 0 else args.warm
        self.step = self.step + 1 if self.clock is None else self.clock() + 1
        on = float(self.step > warm)
        if args.contrast and on:
            loss = loss + args.contrast * self.contrast(pooled_rows(out, mask), goal, generator)
        if back is not None:  # in the graph from the first step on, since processes wait for all gradients
            loss = loss + on * args.cycle * self.cycle(back, clean.to(device), goal)
        if args.variance and on:
            loss = loss + args.variance * relu(1 - (out.flatten(1).var(0) + 1e-4).sqrt()).mean()
        return loss

    def contrast(self, a: Tensor, goal: Tensor, generator) -> Tensor:
        """InfoNCE of predictions [n] with their goals among the batch's and further targets; near twins are no negatives."""
        others = self.seen[torch.randperm(len(self.seen), generator=generator)[:NEGATIVES]]
        own, far = self.goals[goal].to(a), self.goals[others].to(a)
        same = own @ torch.cat([own, far]).T > ALIKE
        same[:, : len(a)].fill_diagonal_(False)
        logits = a @ torch.cat([own, far]).T / TAU
        rows = logits.masked_fill(same, -math.inf)
        columns = (logits[:, : len(a)]).T.masked_fill(same[:, : len(a)], -math.inf)
        right = logits.diagonal()
        return ((rows.logsumexp(1) - right).mean() + (columns.logsumexp(1) - right).mean()) / 2

    @staticmethod
    def cycle(back: Tensor, e: Tensor, goal: Tensor) -> Tensor:
        """InfoNCE of the embeddings found again [n, inside] with the unit ones put in; those of one caption are no negatives."""
        goal = goal.to(e.device)
        return info_nce(normalize(back, dim=-1), e, same=(e @ e.T > ALIKE) | (goal[:, None] == goal))

    @torch.no_grad()
    def reports(self, index: Tensor | None = None) -> dict[str, dict[str, float]]:
        """Diagnostics by modality on held-out examples, one for each prompt, in whitened, masked, pooled space.

        With the cycle term also a lower bound of what outputs tell of their input, in nats.
        """
        index = first_of_each(self.pairs.of, self.held if index is None else index)
        goal = self.pairs.of[index]
        found = {}
        for name, e in self.pairs.embeddings.items():
            x = self.mapping.given(e[index].to(self.mapping.target_mean), name)
            out, _, back = self.model(x, self.mask[goal].to(x))
            found[name] = diagnose(*(mean_rows(y, self.mask[goal]) for y in (out.float().cpu(), self.white[goal])))
            if back is not None:
                lost = float(info_nce(normalize(back.cpu(), dim=-1), normalize(e[index], dim=-1)))
                found[name]["cycle_mi_lower_bound"] = math.log(len(index)) - lost
        return found

    def show(self, model):
        """Print the diagnostics and write them to the log, a line of JSON each time."""
        found = self.reports()
        log = Path(self.args.folder) / f"{self.name}_diagnostics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(json.dumps({"step": self.step, **found}) + "\n")
        for name, report in found.items():
            state = "COLLAPSED: outputs hardly depend on the input" if collapsed(report) else "outputs depend on the input"
            numbers = ", ".join(f"{key} {report[key]:.3f}" for key in SHOWN if key in report)
            print(f"step {self.step} {name}: {state}; {numbers}", flush=True)


def mean_rows(whitened: Tensor, mask: Tensor) -> Tensor:
    return (whitened * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def first_of_each(of: Tensor, index: Tensor) -> Tensor:
    """The examples of `index` whose prompt has not come before."""
    seen: set[int] = set()
    return torch.tensor([i for i in index.tolist() if not (int(of[i]) in seen or seen.add(int(of[i])))])


def add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", required=True, help="prepared file (train), or the folder of captions with sounds and pictures (prepare)")
    add("--arch", default="factored", choices=ARCHITECTURES)
    add("--hidden", type=int, default=1024, help="width inside the network")
    add("--residual", action="store_true", help="last layer begins at zero: step 0 gives the mean prompt")
    add("--contrast", type=float, default=0.1, help="weight of the mutual information term")
    add("--cycle", type=float, default=0.0, help="weight of finding the embedding again in the output (published plan: 0.05)")
    add("--variance", type=float, default=0.0, help="weight of a floor under the spread of outputs (VICReg), 1 to 25")
    add("--warm", type=int, default=-1, help="steps before those terms (-1: a twentieth of --steps, at least 100)")
    add("--padding", type=float, default=0.05, help="weight of rows beyond a caption's end in the squared error")
    add("--noise", type=float, default=0.016, help="variance of the noise on each unit embedding")
    add("--held", type=int, default=1000, help="examples kept for the reports")
    add("--no-whiten", dest="whiten", action="store_false", help="squared error on prompts as they are (collapses)")
    add("--no-mask", dest="mask", action="store_false", help="padding counts like words (collapses)")
    add_arguments(parser, batch=512, rate=3e-4, warmup=1000, precision="no")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "train"))
    add_training(parser)
    parser.add_argument("--encoder", default="", help="prepare: imagebind_huge.pth, or demo")
    parser.add_argument("--text-encoder", nargs="+", default=[], help="prepare: the files core's CLIP loader takes, or demo")
    parser.add_argument("--text-type", default="stable_diffusion", help="prepare: their type in core's CLIP loader")
    parser.add_argument("--target-name", default="", help="prepare: what the text encoder is called in the mapping's file")
    parser.add_argument("--out", default="output/training/sound_pairs.safetensors", help="prepare: file to write")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    try:
        if args.what == "prepare":
            from .sound_pairs import prepare  # ComfyUI is needed here alone

            prepare(args)
        else:
            task = MappingTask(Pairs.read(args.pairs), args)
            loop = Loop(task, args)
            task.clock = lambda: loop.step
            loop.run()
    except ValueError as error:
        sys.exit(f"training.sound_mapping: {error}")


if __name__ == "__main__":
    main()
