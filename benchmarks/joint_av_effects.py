"""What one half of a clip tells the other in the demo joint audio-video model.

`python -m benchmarks.joint_av_effects`: the sound of held-out clips of the picture-book world is given and pictures are
drawn, and the other way round, by MM-Diffusion's replacement and gradient guidance; both halves are read by the small
classifiers of weights/joint_facts.safetensors. Finished clips are kept in output/joint_av; --parts shares them out to
processes. Writes docs/joint_av_effects.md. With --ablation FOLDER only models of equal short training in it are compared
(training.joint_unet --name ablation_random, ablation_off --shift off, ablation_full --shift off --windows 16 16) and
docs/joint_av_ablation.md is written.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from . import pack

from storyweft.attention.cross_modal import RandomShifts, no_shift  # isort: skip
from storyweft.metrics import joint_facts as facts  # isort: skip
from storyweft.models.joint_unet import JointUNet, configuration  # isort: skip
from storyweft.sampling.cross_guidance import Known, guided_step  # isort: skip
from storyweft.sampling.ddpm import clean_estimate  # isort: skip
from storyweft.sampling.schedule import linear_betas, spaced_times  # isort: skip
from storyweft.training.joint_data import demo_clips  # isort: skip
from storyweft.training.joint_unet import strip  # isort: skip

ALPHAS = torch.cumprod(1 - linear_betas(), 0)
SEED = 9100  # of the held-out clips: training and the readers use others
GIVEN = {"video": "video -> sound", "audio": "sound -> video", "none": "nothing (both drawn)"}
PUBLISHED = {"video": 16.0, "audio": 123.0}  # strength of the published scripts, per clip and summed error
TIMES = (200, 400, 600, 700, 800)


def loaded(path: Path) -> tuple[JointUNet, dict, dict]:
    """Model, its settings and the metadata of its file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    settings = json.loads(metadata["config"])
    lacking = {name: settings[name] for name in ("windows", "head_channels", "groups")}
    model = JointUNet(**configuration(tensors), **lacking)
    model.load_state_dict(tensors)
    return model.train(False).requires_grad_(False), settings, metadata


def packed(video: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    return torch.cat([video.flatten(1), audio.flatten(1)], 1)


class Clips:
    """The held-out clips, packed: [n, 3 * F * H * W + L]; pictures are multiplied by the model's `scale`."""

    def __init__(self, count: int, scale: float):
        video, audio = demo_clips(SEED, count).batch(torch.arange(count))
        self.video, self.audio, self.scale = scale * video.transpose(1, 2).contiguous(), audio, scale
        self.sizes = self.video[0].numel(), self.audio[0].numel()

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        video, audio = x.split(self.sizes, 1)
        return video.view(-1, *self.video.shape[1:]), audio.view(-1, *self.audio.shape[1:])

    def seen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [n, F, 3, H, W] in -1..1 and sound [n, 1, L] of packed clips."""
        video, audio = self.halves(x)
        return video.transpose(1, 2) / self.scale, audio


def draw(model, clips: Clips, rows: torch.Tensor, given: str, steps: int, strength: float) -> torch.Tensor:
    """Packed clips drawn with one half of clips `rows` given, or none; everything random follows from the row."""
    clean = packed(clips.video[rows], clips.audio[rows])
    drawn = torch.ones_like(clean)
    if given == "video":
        drawn[:, : clips.sizes[0]] = 0
    if given == "audio":
        drawn[:, clips.sizes[0] :] = 0
    generators = [torch.Generator().manual_seed(int(row)) for row in rows]

    def noise():
        return torch.stack([torch.randn(clean.shape[1], generator=generator) for generator in generators])

    x = noise()
    known, shifts = Known(clean, x, drawn), RandomShifts((steps, int(rows[0])))
    times = spaced_times(1000, str(steps))[::-1]
    for now, after in zip(times, [*times[1:], None], strict=True):
        alpha, later = ALPHAS[now], ALPHAS[after] if after is not None else torch.tensor(1.0, dtype=torch.float64)

        def estimate(state, now=now, alpha=alpha):
            made = model(*clips.halves(state), torch.full((len(rows),), now), shifts=shifts)
            return clean_estimate(state, packed(*made), alpha.float())

        with torch.no_grad():
            x = guided_step(estimate, known, x, alpha, later, noise(), strength).x.float()
    return x * drawn + clean * (1 - drawn)


def cells(args) -> list[tuple[str, int, float]]:
    """(given half, steps, strength) of every row of the tables."""
    plain = [(given, steps, 0.0) for given in ("audio", "video") for steps in args.steps]
    few, *more = sorted(args.steps)
    curve = [("audio", few, strength) for strength in sorted({*args.strengths, PUBLISHED["audio"]})]
    longer = [("audio", steps, PUBLISHED["audio"]) for steps in more]
    return [*plain, ("none", few, 0.0), *curve, *longer, ("video", few, PUBLISHED["video"])]


def made_clips(model, clips: Clips, args, stamp: str) -> dict[tuple, torch.Tensor]:
    """Drawn clips of every cell; those kept in output/joint_av are not drawn again."""
    folder, found = pack.ROOT / "output" / "joint_av", {}
    folder.mkdir(parents=True, exist_ok=True)
    batches = torch.arange(args.clips).split(args.batch)
    for cell in cells(args):
        parts = []
        for number, rows in enumerate(batches):
            kept = folder / f"{stamp}_{'_'.join(map(str, cell))}_{int(rows[0])}_{len(rows)}.pt"
            if not kept.exists() and number % args.parts == args.part:
                torch.save(draw(model, clips, rows, *cell), kept)
                print(*cell, int(rows[0]), flush=True)
            if kept.exists():
                parts.append(torch.load(kept, weights_only=True))
        found[cell] = torch.cat(parts) if parts else torch.empty(0)
    return found


def agreement(seen: list[dict], heard: list[dict]) -> dict[str, float]:
    """Share of clips whose halves are read alike, and of pairs of halves of different clips (chance)."""
    report = {}
    for group in seen[0]:
        same = np.array([[one[group] == other[group] for other in heard] for one in seen], float)
        report[group] = float(np.diag(same).mean())
        report[f"{group}_chance"] = float((same.sum() - np.trace(same)) / (len(same) * (len(same) - 1)))
    return report


def scored(reader, clips: Clips, x: torch.Tensor) -> dict[str, float]:
    video, audio = clips.seen(x)
    report = agreement(facts.read_pictures(reader, video), facts.read_sounds(reader, audio))
    moving, loud = facts.motion(video), facts.loudness(audio, video.shape[1])
    report["correlation"] = float(facts.correlation(moving, loud).mean())
    other = torch.stack([facts.correlation(moving, loud.roll(shift, 0)).mean() for shift in range(1, len(loud))])
    report["correlation_chance"] = float(other.mean())
    return report


def table(rows: list[tuple[str, dict[str, float]]], count: int) -> list[str]:
    lines = [
        "| | kind alike | chance | place alike | chance | loudness with motion | of other clips |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in rows:
        error = {group: (one[group] * (1 - one[group]) / count) ** 0.5 for group in ("kind", "place")}
        lines.append(
            f"| {name} | {one['kind']:.2f} ± {error['kind']:.2f} | {one['kind_chance']:.2f} | {one['place']:.2f} ± "
            f"{error['place']:.2f} | {one['place_chance']:.2f} | {one['correlation']:.2f} | {one['correlation_chance']:.2f} |"
        )
    return lines


@torch.no_grad()
def noise_errors(model, clips: Clips, count: int, shifted: bool) -> dict[int, list[float]]:
    """Mean squared error of the predicted noise at TIMES: of pictures beside their sound, beside that of another clip,
    of sound beside its pictures, beside those of another clip."""
    generator = torch.Generator().manual_seed(1)
    clean = clips.video[:count], clips.audio[:count]
    found = {}
    for t in TIMES:
        noises = [torch.randn(half.shape, generator=generator) for half in clean]
        a = ALPHAS[t].float()
        noisy = [a.sqrt() * half + (1 - a).sqrt() * noise for half, noise in zip(clean, noises, strict=True)]
        errors = []
        # the next clip's half is another one's; its noise is as strong
        for video, audio in ((noisy[0], noisy[1]), (noisy[0], noisy[1].roll(1, 0)), (noisy[0].roll(1, 0), noisy[1])):
            shifts = RandomShifts(t) if shifted else no_shift
            made = [
                model(v, s, torch.full((len(v),), t), shifts=shifts)
                for v, s in zip(video.split(8), audio.split(8), strict=True)
            ]
            errors.append([torch.cat(half) for half in zip(*made, strict=True)])
        pictures = [(errors[i][0] - noises[0]).square().mean().item() for i in (0, 1)]
        sounds = [(errors[i][1] - noises[1]).square().mean().item() for i in (0, 2)]
        found[t] = [*pictures, *sounds]
    return found


def error_lines(name: str, found: dict[int, list[float]]) -> list[str]:
    return [f"| {name} | {t} | " + " | ".join(f"{value:.4f}" for value in row) + " |" for t, row in found.items()]


ERROR_HEAD = [
    "| | t | pictures beside their sound | beside another's | sound beside its pictures | beside another's |",
    "|---|---|---|---|---|---|",
]


@torch.no_grad()
def followed(model, reader, clips: Clips, count: int, t: int) -> dict[tuple[str, str], tuple[float, float]]:
    """By half and group: how often the clean estimate at time t of clips beside another clip's half is read as its own
    clip is, and as the other is; only clips that differ count."""
    generator, a = torch.Generator().manual_seed(2), ALPHAS[t].float()
    clean = clips.video[:count], clips.audio[:count].roll(1, 0)
    noises = [torch.randn(half.shape, generator=generator) for half in clean]
    noisy = [a.sqrt() * half + (1 - a).sqrt() * noise for half, noise in zip(clean, noises, strict=True)]
    parts = [
        model(v, s, torch.full((len(v),), t), shifts=RandomShifts((t, number)))
        for number, (v, s) in enumerate(zip(*(half.split(8) for half in noisy), strict=True))
    ]
    x = clean_estimate(packed(*noisy), packed(*(torch.cat(half) for half in zip(*parts, strict=True))), a)
    (video, audio), (true_video, true_audio) = clips.seen(x), clips.seen(packed(*clean))
    of_pictures, of_sound = facts.read_pictures(reader, true_video), facts.read_sounds(reader, true_audio)
    found = {}
    for half, made in (("pictures", facts.read_pictures(reader, video)), ("sound", facts.read_sounds(reader, audio))):
        own, other = (of_pictures, of_sound) if half == "pictures" else (of_sound, of_pictures)
        for group in reader.labels:
            apart = [n for n in range(count) if own[n][group] != other[n][group]]
            found[half, group] = tuple(
                float(np.mean([made[n][group] == whose[n][group] for n in apart])) for whose in (own, other)
            )
    return found


def followed_lines(model, reader, clips: Clips, count: int) -> list[str]:
    lines = [
        "## Which half follows which",
        "",
        f"{count} clips whose pictures stand beside the sound of another clip, both at one time t. The model's clean estimate of a half",
        "is read by the classifiers: as what the half itself was before the noise / as what the other half was. Only clips of which the",
        "two differ count.",
        "",
        "| t | pictures: kind own / sound's | place own / sound's | sound: kind own / pictures' | place own / pictures' |",
        "|---|---|---|---|---|",
    ]
    for t in (900, 800, 700, 600, 500, 400, 300, 200, 100):
        found = followed(model, reader, clips, count, t)
        shares = [found[half, group] for half in ("pictures", "sound") for group in ("kind", "place")]
        lines.append(f"| {t} | " + " | ".join(f"{own:.2f} / {other:.2f}" for own, other in shares) + " |")
    return [*lines, *FOLLOWING]


FOLLOWING = [
    "",
    "This is why replacement gives the sound of a video and no video of a sound. A picture spreads one colour over thousands of pixels, so "
    "its kind and place can be read at noise (t = 700 and above) in which no sound can be heard: from t = 600 on the sound's estimate is "
    "read as the pictures' clip, and only below 300 as its own. In sampling the pictures are settled before the sound says anything, and "
    "the model has had no reason to learn that way. More training of the same kind would not change it. Pictures drawn smaller against "
    "their noise (`training.joint_unet --video-scale`) would be settled later; at 0.25, 405 steps of 4 clips gone on from the released "
    "file, they did not listen yet (error beside their own sound and another's equal to three digits at every t after 215 steps), so the "
    "released model stays as it was.",
]


ABLATION = [
    "How to read it. Each was trained from nothing at the options of the released model, `python -m training.joint_unet --name "
    "ablation_random --steps 300 --minutes 0 --warmup 30 --clips 1200 --average 0.98 --folder FOLDER`, "
    "`ablation_off` with `--shift off`, `ablation_full` with `--shift off --windows 16 16`. After 1,200 clips windows are ahead of full "
    "attention in both halves and take "
    "less time a step; shift and no shift differ by less than 2 % in opposite directions, and none of the three hears or sees the "
    "other half yet, so **what the random shift is worth is not decided by this**: it takes a training as long as the released model's "
    "(10,956 clips) for each.",
]


def ablation_lines(folder: Path, count: int) -> list[str]:
    lines, recipes = [], []
    for name in ("random", "off", "full"):
        path = folder / f"ablation_{name}.safetensors"
        model, settings, metadata = loaded(path)
        words = {"random": "random shift", "off": "no shift", "full": "full attention"}[name]
        clips = Clips(count, settings["video_scale"])
        lines += error_lines(words, noise_errors(model, clips, count, metadata["shift"] == "random"))
        recipes.append(
            f"{words}: {metadata['steps']} steps, {metadata['examples_seen']} clips, windows {settings['windows']}, "
            f"{metadata['minutes']} minutes"
        )
    return [
        "# Random shift, no shift, full attention in the joint audio-video model",
        "",
        f"`python -m benchmarks.joint_av_effects --ablation FOLDER`: {'; '.join(recipes)}. Columns: docs/joint_av_effects.md, last table.",
        "",
        *ERROR_HEAD,
        *lines,
        "",
        *ABLATION,
    ]


def sheet(clips: Clips, made: dict[tuple, torch.Tensor], args) -> Image.Image:
    """Left the clips, beside them what was drawn to their sound, without and with guidance, and to their pictures."""
    rows = []
    shown = [("audio", max(args.steps), strength) for strength in (0.0, PUBLISHED["audio"])]
    shown.append(("video", max(args.steps), 0.0))
    for row in range(min(6, args.clips)):
        drawn = [packed(clips.video[row : row + 1], clips.audio[row : row + 1])]
        drawn += [made[cell][row : row + 1] for cell in shown]
        strips = []
        for x in drawn:
            video, audio = clips.seen(x)
            strips += [strip(video[0], audio[0], every=3, scale=1), np.full((32, 6, 3), 255, np.uint8)]
        rows.append(np.concatenate(strips[:-1], 1))
    return Image.fromarray(np.concatenate(rows).repeat(2, 0).repeat(2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=pack.ROOT / "weights" / "joint_av.safetensors")
    parser.add_argument("--reader", type=Path, default=pack.ROOT / "weights" / "joint_facts.safetensors")
    parser.add_argument("--ablation", type=Path, help="folder of the models of equal short training")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50])
    parser.add_argument("--strengths", type=float, nargs="+", default=[16.0, 50.0, 250.0, 500.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1, help="processes that share the clips; each writes no report")
    parser.add_argument("--part", type=int, default=0, help="number of this process; run without both afterwards")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.ablation:
        written("joint_av_ablation.md", ablation_lines(args.ablation, 64))
        return
    model, settings, metadata = loaded(args.model)
    with safe_open(args.reader, "pt") as file:
        reader_facts = file.metadata()
        reader = facts.load_joint_reader({name: file.get_tensor(name) for name in file.keys()}, reader_facts)
    clips = Clips(max(args.clips, 64), settings.get("video_scale", 1.0))
    made = made_clips(model, clips, args, hashlib.sha256(args.model.read_bytes()).hexdigest()[:10])
    if args.parts > 1:
        return
    real = scored(reader, clips, packed(clips.video[: args.clips], clips.audio[: args.clips]))
    rows = [("drawn by the generator (most that can be read)", real)]
    for cell, x in made.items():
        given, steps, strength = cell
        how = f"gradient {strength:g}" if strength else "replacement"
        words = f"{GIVEN[given]}, {steps} steps" + (f", {how}" if given != "none" else "")
        rows.append((words, scored(reader, clips, x)))
    sheet(clips, made, args).save(pack.ROOT / "docs" / "joint_av_effects.jpg", quality=70)
    lines = report(args, metadata, reader_facts, rows)
    lines += [*ERROR_HEAD, *error_lines("released model", noise_errors(model, clips, 64, True)), ""]
    lines += followed_lines(model, reader, clips, 48)
    written("joint_av_effects.md", lines)


def written(name: str, lines: list[str]) -> None:
    path = pack.ROOT / "docs" / name
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(path.read_text())


READING = [
    "How to read it. The model hears what it sees and barely sees what it hears (next table): the error of its pictures is the same "
    "beside their own sound and another's. Replacement then gives the sound of a video and no video of a sound. Gradient guidance asks "
    "the other way round, how well the *sound* is predicted from the pictures, which fits with its steering them where replacement does "
    "not. It needs about the published strength; with 16 clips that strength and the larger ones do not differ beyond their errors. The "
    "pictures it makes are rough (see the sheet): right colours and places with bright specks, more of them the larger the strength, and "
    "a classifier can be led by such specks, so read the rates as an upper bound. The grain is the ancestral sampler's at so few steps; "
    "by DDIM the same model draws without it (workflow `joint_av`). Loudness does not follow motion in what is drawn.",
]


def aims(found: dict[str, dict], args) -> list[str]:
    """What was hoped for, reached or missed."""
    steps = min(args.steps)
    plain, guided = (
        found[f"{GIVEN['audio']}, {steps} steps, {how}"] for how in ("replacement", f"gradient {PUBLISHED['audio']:g}")
    )
    heard = found[f"{GIVEN['video']}, {steps} steps, replacement"]
    listed = [
        (heard["kind"] >= 2 * heard["kind_chance"], f"video -> sound: kind twice chance: {heard['kind']:.2f}"),
        (
            plain["kind"] >= 2 * plain["kind_chance"],
            f"sound -> video, replacement: kind twice chance: {plain['kind']:.2f}",
        ),
        (
            guided["kind"] >= 2 * guided["kind_chance"],
            f"sound -> video, gradient: kind twice chance: {guided['kind']:.2f}",
        ),
        (
            heard["correlation"] > heard["correlation_chance"] + 0.1,
            f"video -> sound: loudness follows the motion of its own clip: {heard['correlation']:.2f}, of others "
            f"{heard['correlation_chance']:.2f}",
        ),
    ]
    return [f"- {'reached' if met else 'MISSED'}: {words}" for met, words in listed]


def report(args, metadata: dict, reader_facts: dict, rows) -> list[str]:
    return [
        "# One half of a clip given, the other drawn: the demo joint audio-video model",
        "",
        f"`python -m benchmarks.joint_av_effects`: {args.clips} held-out clips of the "
        f"picture-book world with sound, the model of `weights/joint_av.safetensors` ({metadata['examples_seen']} clips seen in "
        f"{metadata['minutes']} minutes). Ancestral sampling with the paper's variance, steps spread evenly over the 1000; replacement "
        "puts the given half in at every step, gradient guidance g also moves the drawn half by g times the gradient of the summed "
        f"squared error of the given one (the published scripts: {PUBLISHED['audio']:g} for a sound given, {PUBLISHED['video']:g} for "
        "pictures given). Kind (of 4) and place (of 3) of each half are read by small classifiers, right on "
        f"{min(json.loads(reader_facts['held_out']).values()):.0%} of clips held out from them. "
        "Alike: both halves are read as the same; chance: halves of different clips of the same row. Loudness with motion: correlation "
        "over the 16 frames of a clip; of other clips: the same between clips.",
        "",
        *table(rows, args.clips),
        "",
        "![clips, pictures drawn to their sound, sound drawn to their pictures](joint_av_effects.jpg)",
        "",
        "From left to right: the held-out clip; pictures drawn to its sound by replacement, and with gradient guidance of the published",
        f"strength; sound drawn to its pictures by replacement ({max(args.steps)} steps; every third frame and the spectrogram).",
        "",
        *aims(dict(rows), args),
        "",
        *READING,
        "",
        "## What the other half is worth",
        "",
        "Mean squared error of the predicted noise of 64 held-out clips with both halves at one time t, beside the own other half and",
        "beside that of another clip. A model that listens errs less beside the own one.",
        "",
    ]


if __name__ == "__main__":
    main()
