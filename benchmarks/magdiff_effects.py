"""MagDiff's ablation on the demo model: what cut-out, learned alphas and the latents beside the noise each add.

`python -m benchmarks.magdiff_effects`. Subjects are pages that no trainer saw; all are drawn in one batch, each row with its own
picture and a prompt that names its kind and another place and time. Then editing: everything but the character is kept and
the prompt names another kind. Writes docs/magdiff.md and docs/magdiff_sheet.jpg.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from training.storybook import COLOURS, HATS, KINDS, PLACES, TIMES
from training.subjects import page

from . import pack
from .effects import compared, interval

import nodes  # isort: skip
from storyweft.host import magdiff as rules  # isort: skip
from storyweft.host.demo import load_demo, read_weights  # isort: skip
from storyweft.host.image_adapter import load_demo as demo_adapter  # isort: skip
from storyweft.metrics.facts import load_reader, read  # isort: skip
from storyweft.nodes.apa import AdaptivePromptAlignment, Subject  # isort: skip
from storyweft.nodes.magdiff import HighFidelityAlignment  # isort: skip

TEXT, WHOLE, CUT, LEARNED, ALL = "text alone", "whole picture", "+ SDA (cut-out)", "+ APA (learned alphas)", "+ HFA"
SETTINGS = (TEXT, WHOLE, CUT, LEARNED, ALL)
EDITS = ("text alone", "APA", "APA + HFA")
COLUMNS = ("identity", "colour", "hat", "text", "kind", "place", "time", "moved")
SHOWN = 6


class Studio:
    def __init__(self, args):
        self.args = args
        self.model, clip, self.vae, self.vision = load_demo()
        self.reader = load_reader(*read_weights("facts"))
        self.trained, self.adapter = rules.load_demo(), demo_adapter()
        self.learned = rules.with_alphas(self.adapter, self.trained, "benchmark")
        self.shown, self.wanted, self.other, pixels = [], [], [], []
        for index in range(args.subjects):
            rng = np.random.default_rng((2029, index))
            kind, other = (list(KINDS)[i] for i in rng.permutation(len(KINDS))[:2])
            place, elsewhere = (list(PLACES)[i] for i in rng.permutation(len(PLACES))[:2])
            now, then = (list(TIMES)[i] for i in rng.permutation(len(TIMES))[:2])
            colour, hat = list(COLOURS)[index % len(COLOURS)], HATS[index // 2 % len(HATS)]
            pixels.append(np.array(page(rng, kind, colour, hat, place, now)))
            self.shown.append({"colour": colour, "hat": hat, "kind": kind, "place": place, "time": now})
            self.wanted.append({"kind": kind, "place": elsewhere, "time": then, "colour": colour, "hat": hat})
            self.other.append({"kind": other, "place": place, "time": now, "colour": colour, "hat": hat})
        whole = torch.from_numpy(np.stack(pixels)).float() / 255
        self.pages, self.masks = whole[..., :3], whole[..., 3]
        self.encode = lambda facts: self.prompts(clip, facts)
        self.negative = nodes.CLIPTextEncode().encode(clip, "")[0]

    @staticmethod
    def prompts(clip, facts: list[dict]) -> list:
        rows = [
            nodes.CLIPTextEncode().encode(clip, f"a {f['kind']} {PLACES[f['place']]} {TIMES[f['time']]}")[0][0]
            for f in facts
        ]
        return [
            [
                torch.cat([row[0] for row in rows]),
                {"pooled_output": torch.cat([row[1]["pooled_output"] for row in rows])},
            ]
        ]

    def subjects(self, masks: torch.Tensor, crop: bool) -> torch.Tensor:
        """Every page's cut-out, 128 x 128, by the Subject node."""
        found = []
        for picture, mask in zip(self.pages, masks, strict=True):
            cut = (
                Subject.execute(picture[None], mask[None], "black", crop, vae_size=128)
                .args[0 if crop else 1]
                .movedim(-1, 1)
            )
            found.append(
                torch.nn.functional.interpolate(cut, (128, 128), mode="bilinear", antialias=True).movedim(1, -1)
            )
        return torch.cat(found)

    @torch.inference_mode()
    def draw(self, facts: list[dict], seen=None, adapter=None, beside=None) -> torch.Tensor:
        """Pictures [subjects, 128, 128, 3]: `seen` goes into CLIP vision, `beside` next to the noise."""
        model = self.model
        if beside is not None:
            model = HighFidelityAlignment.execute(model, self.trained, self.vae, beside, 1.0, "MagDiff").args[0]
        if seen is not None:
            model = AdaptivePromptAlignment.execute(model, adapter, self.vision, seen, 1.0, 1.0, "MagDiff").args[0]
        latent = {"samples": torch.zeros(self.args.subjects, 4, 16, 16)}
        arguments = (self.args.seed, self.args.steps, self.args.cfg, "dpmpp_2m", "karras")
        done = nodes.KSampler().sample(model, *arguments, self.encode(facts), self.negative, latent)
        return self.vae.decode(done[0]["samples"])

    def judge(self, pictures: torch.Tensor, wanted: list[dict]) -> dict[str, list[float]]:
        readings = read(self.reader, pictures.float().clone())
        names = ("colour", "hat", "kind", "place", "time")
        found = {
            name: [float(own.labels[name] == want[name]) for own, want in zip(readings, wanted, strict=True)]
            for name in names
        }
        found["identity"] = [a * b for a, b in zip(found["colour"], found["hat"], strict=True)]
        found["text"] = [min(found[name][row] for name in ("kind", "place", "time")) for row in range(len(readings))]
        places = [np.argwhere(mask.numpy() > 0.5).mean(0)[::-1] / 128 for mask in self.masks]
        centres = [np.array([one.box[0] + one.box[2], one.box[1] + one.box[3]]) / 2 for one in readings]
        found["moved"] = [float(np.linalg.norm(a - b)) for a, b in zip(places, centres, strict=True)]
        return found


def run(args) -> tuple[dict, dict, dict[str, str]]:
    studio = Studio(args)
    cut, placed = studio.subjects(studio.masks, True), studio.subjects(studio.masks, False)
    rest = (studio.masks == 0).float()
    kept, around = studio.subjects(rest, True), studio.subjects(rest, False)
    given = {
        TEXT: {},
        WHOLE: {"seen": studio.pages, "adapter": studio.adapter},
        CUT: {"seen": cut, "adapter": studio.adapter},
        LEARNED: {"seen": cut, "adapter": studio.learned},
        ALL: {"seen": cut, "adapter": studio.learned, "beside": placed},
    }
    edits = dict(
        zip(
            EDITS,
            (
                {},
                {"seen": kept, "adapter": studio.learned},
                {"seen": kept, "adapter": studio.learned, "beside": around},
            ),
            strict=True,
        )
    )
    strips, results, edited = [studio.pages[:SHOWN]], {}, {}
    for name, more in given.items():
        pictures = studio.draw(studio.wanted, **more)
        results[name] = studio.judge(pictures, studio.wanted)
        strips.append(pictures[:SHOWN])
        print(name, {key: round(float(np.mean(value)), 2) for key, value in results[name].items()}, flush=True)
    for name, more in edits.items():
        pictures = studio.draw(studio.other, **more)
        found = studio.judge(pictures, studio.other)
        change = (pictures - studio.pages).abs().mean(-1) * 255
        found["kept"] = [(one * mask).sum().item() / mask.sum().item() for one, mask in zip(change, rest, strict=True)]
        edited[name] = found
        strips.append(pictures[:SHOWN])
        print(name, {key: round(float(np.mean(value)), 2) for key, value in found.items()}, flush=True)
    rows = [np.concatenate(list(one.mul(255).round().clamp(0, 255).byte().numpy()), 1) for one in strips]
    Image.fromarray(np.concatenate(rows)).save(pack.ROOT / "docs" / "magdiff_sheet.jpg", **pack.JPEG)
    return results, edited, studio.trained.metadata


def table(results: dict, columns) -> list[str]:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, found in results.items():
        lines.append(f"| {name} | " + " | ".join(interval(found[column]) for column in columns) + " |")
    return lines


def report(args, results: dict, edited: dict, metadata: dict) -> list[str]:
    def mean(found, name, key):
        return float(np.mean(found[name][key]))

    identity, colour = ([results[name][key] for name in SETTINGS] for key in ("identity", "colour"))
    kept = [mean(edited, name, "kept") for name in EDITS]
    order = [
        compared(f"{words}, {name}", found[place], found[place + 1])
        for place, words in enumerate(
            ("the cut-out keeps more than the whole picture", "learned alphas add to it", "latents beside the noise add to it"), 1
        )
        for name, found in (("identity", identity), ("colour", colour))
    ]
    aims = (
        (mean(results, ALL, "text") >= 0.8, f"the text still holds with all three: {mean(results, ALL, 'text'):.2f}"),
        (kept[2] < 0.7 * kept[0], f"editing: what is kept changes less (grey levels): {kept[0]:.1f} -> {kept[2]:.1f}"),
        (
            mean(edited, EDITS[2], "kind") >= 0.8,
            f"editing: the new character is drawn: {mean(edited, EDITS[2], 'kind'):.2f}",
        ),
    )
    return [
        "# MagDiff's three alignments on the demo model",
        "",
        f"`python -m benchmarks.magdiff_effects`: {args.subjects} subjects, {args.steps} steps of dpmpp_2m karras, CFG {args.cfg:g},",
        "MagDiff's guidance (the negative sees the picture too). The prompt names the kind the picture shows and another place and",
        "time. Colour, hat and identity (both) count what is as in the picture; text (kind, place and time) what is as in the prompt.",
        "Moved: how far the character stands from where the picture has it, in picture widths. In brackets: 95 % bootstrap interval.",
        f"Training: {metadata['minutes']} minutes, {metadata['steps']} steps, {metadata['examples_seen']} examples, "
        f"loss {metadata['loss']}.",
        "",
        *table(results, COLUMNS),
        "",
        "Editing: everything but the character is kept, the prompt names another kind in the same place. Kept: mean change of the",
        "kept part in grey levels of 255.",
        "",
        *table(edited, ("kept", "kind", "place", "time")),
        "",
        *order,
        *[f"- {'reached' if met else 'MISSED'}: {words}" for met, words in aims],
        "",
        "Rows of the sheet: the pictures, then the settings of both tables in their order.",
        "",
        "![subjects](magdiff_sheet.jpg)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=36)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = report(args, *run(args))
    (pack.ROOT / "docs" / "magdiff.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
