"""Trains the demo models of sound on the picture-book world: a small ACT captioner and a sound encoder for the demo CLIP.

`python -m training.sound_demo data`, then `captioner`, `encoder` and `pairs`; the last writes what training.sound_mapping
trains the mapping network on. `folder` writes examples as anybody's folder of captions, sounds and pictures has them, for
`training.sound_mapping prepare`. `sounds` renders the example sounds of weights/sounds, which no training hears.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torchaudio
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize

from . import pack  # noqa: F401
from .loop import Loop, Task, add_arguments
from .sounds import AMBIENCES, VOICES, ambience, mixture, voice
from .storybook import KINDS, PLACES, TIMES

from storyweft.metrics.mapping import info_nce  # isort: skip
from storyweft.models import act, act_frontend  # isort: skip
from storyweft.models.sound_encoder import SoundEncoder  # isort: skip

SECONDS, RATE = 3.2, 16000
DATA = "output/training/sound_data.safetensors"
HEADS = (4, 4)
SIZES = {
    "width": 64, "positions": 41, "mels": 64, "patch": 256, "inner": 64, "heads": 4, "feed": 128, "depth": 3, "classes": 64,
    "memory": 64, "decoder_heads": 4, "decoder_feed": 128, "decoder_depth": 2,
}  # fmt: skip
SCENES = [(kind, place, time) for kind in KINDS for place in PLACES for time in TIMES]
TAU = 0.07


def caption(scene: tuple[str, str, str]) -> str:
    """The one wording that captioners learn, so that a word's probability says what was heard and not how it is put."""
    kind, place, time = scene
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} {PLACES[place]} {TIMES[time]}"


def words() -> list[str]:
    return ["<sos>", "<eos>", *dict.fromkeys(word for scene in SCENES for word in caption(scene).split())]


def heard(rng: np.random.Generator, scene: tuple[str, str, str]) -> np.ndarray:
    """A scene's sound [samples]: one voice, or a second, softer one, over the place, at any level."""
    kind, place, time = scene
    loudness = rng.uniform(0.3, 1.0)
    voices = {kind: loudness}
    if rng.random() < 0.25:
        other = rng.choice([name for name in KINDS if name != kind])
        voices[str(other)] = loudness * rng.uniform(0.1, 0.7)
    sound = mixture(rng, voices, place, SECONDS, RATE, time, rng.uniform(0.15, 0.6))
    return sound.waveform * 10 ** rng.uniform(-0.5, 0.1)


def features(waves: np.ndarray) -> torch.Tensor:
    """[n, 160, 64] in dB of sounds [n, samples]."""
    waves = torchaudio.functional.resample(torch.from_numpy(waves).float(), RATE, act_frontend.RATE)
    return act_frontend.log_mel(waves, samples=round(SECONDS * act_frontend.RATE))


def make_data(count: int, seed: int, path: str) -> None:
    """Features of `count` sounds, scenes in turn, and the number of each one's scene."""
    found, labels = [], []
    for start in range(0, count, 64):
        numbers = range(start, min(start + 64, count))
        scenes = [number % len(SCENES) for number in numbers]
        waves = np.stack(
            [
                heard(np.random.default_rng((seed, number)), SCENES[scene])
                for number, scene in zip(numbers, scenes, strict=True)
            ]
        )
        found.append(features(waves).half())
        labels += scenes
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": torch.cat(found), "scene": torch.tensor(labels)}, path)


def masked(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A band of time and one of pitch of each example set to its floor."""
    x = x.clone()
    for axis, widest in ((1, 24), (2, 8)):
        for one in x:
            width = int(torch.randint(widest, (), generator=generator))
            start = int(torch.randint(one.shape[axis - 1] - width, (), generator=generator))
            one.narrow(axis - 1, start, width).fill_(float(one.min()))
    return x


class CaptionerTask(Task):
    name = "captioner"

    def __init__(self, data: dict[str, torch.Tensor]):
        self.features, self.scene = data["features"], data["scene"]
        self.examples = len(self.scene)
        self.config = {"words": words(), "heads": HEADS, "seconds": SECONDS}
        self.model = act.ActCaptioner(SIZES, words())
        start(self.model)
        row = {word: index for index, word in enumerate(words())}
        texts = [[row[word] for word in f"<sos> {caption(scene)} <eos>".split()] for scene in SCENES]
        self.tokens = torch.tensor(texts)

    def loss(self, network, index, generator):
        x = masked(self.features[index].float(), generator)
        tokens = self.tokens[self.scene[index]]
        scores = network(x, tokens[:, :-1])
        return cross_entropy(scores.float().flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.05)


class EncoderTask(Task):
    """Sounds against the demo CLIP's texts and pictures of all scenes."""

    name = "sound_encoder"

    def __init__(self, data: dict[str, torch.Tensor], texts: torch.Tensor, pictures: torch.Tensor):
        self.features, self.scene, self.texts, self.pictures = data["features"], data["scene"], texts, pictures
        self.examples = len(self.scene)
        sizes = {**SIZES, "classes": texts.shape[1]}
        self.config = {"sizes": sizes, "seconds": SECONDS}
        self.model = SoundEncoder(sizes)
        start(self.model)

    def loss(self, network, index, generator):
        found = normalize(network(masked(self.features[index].float(), generator)).float(), dim=-1)
        which = int(torch.randint(self.pictures.shape[1], (), generator=generator))
        scene = self.scene[index]
        return sum(
            cross_entropy(found @ targets.T / TAU, scene) for targets in (self.texts, self.pictures[:, which])
        )


def start(model: torch.nn.Module) -> None:
    """Seeded weights of unit gain for tensors that have none."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if name.endswith(("pos_embedding", "cls_token")):
            torch.nn.init.normal_(value, std=0.02)
        elif name.endswith("in_proj_weight"):
            torch.nn.init.normal_(value, std=value.shape[1] ** -0.5)
        elif name.endswith("in_proj_bias"):
            torch.nn.init.zeros_(value)
        elif name.endswith("word_emb.weight"):
            torch.nn.init.normal_(value, std=value.shape[1] ** -0.5)


@torch.no_grad()
def clip_targets(count: int = 4, seed: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every scene in the demo CLIP: text [144, 96] and pictures [144, count, 96], unit, and prompts [144, 77, 96]."""
    from .clip import LENGTH, MEAN, STD, Encoders, Vocabulary
    from .storybook import sample

    state = load_file("weights/clip.safetensors")
    vocabulary = Vocabulary()
    model = Encoders(len(vocabulary.ids) + 1)
    kept = {key: value.float() for key, value in state.items() if value.is_floating_point()}
    kept["rows"] = kept.pop("text.rows")
    model.load_state_dict(kept, strict=False)
    model.train(False)
    rows = torch.tensor([vocabulary.rows(caption(scene)) for scene in SCENES])
    texts = normalize(model.encode_text(rows[:, :LENGTH]), dim=-1)
    position = model.text.text_model.embeddings.position_embedding.weight
    bias = torch.full((rows.shape[1],) * 2, -1e9).triu_(1)
    hidden, _ = model.text.text_model.encoder(model.rows[rows] + position, mask=bias)
    prompts = model.text.text_model.final_layer_norm(hidden)
    pictures = []
    for number, (kind, place, time) in enumerate(SCENES):
        pages = [
            sample(np.random.default_rng((seed, number, index)), "one", kind=kind, place=place, time=time)
            for index in range(count)
        ]
        images = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
        pictures.append(model.vision(pixel_values=(images.float() / 255 - MEAN) / STD)[2])
    return texts, normalize(torch.stack(pictures), dim=-1), prompts


@torch.no_grad()
def write_pairs(data: dict[str, torch.Tensor], encoder: str, path: str) -> None:
    """Embeddings of sounds, pictures and texts and the prompt of each one's scene, for training.sound_mapping."""
    texts, pictures, prompts = clip_targets()
    model = SoundEncoder({**SIZES, "classes": texts.shape[1]})
    model.load_state_dict({key: value.float() for key, value in load_file(encoder).items()}, strict=False)
    model.train(False)
    sounds = torch.cat([model(part.float()) for part in data["features"].split(256)])
    scene = data["scene"]
    length = torch.tensor([len(caption(one).split()) + 2 for one in SCENES])
    which = torch.arange(len(scene)) // len(SCENES) % pictures.shape[1]
    save_file(
        {
            "audio": sounds, "image": pictures[scene, which].contiguous(), "text": texts[scene].contiguous(),
            "target": prompts.contiguous(), "target_of": scene, "length": length,
        },
        path,
        {"space": "demo", "target": "demo CLIP"},
    )  # fmt: skip


def write_folder(folder: str, count: int, seed: int) -> None:
    """`count` examples as NAME.txt, NAME.png and NAME.wav (16 bits), scenes in turn."""
    import wave

    from .storybook import sample

    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng((seed, 3, number))
        kind, place, time = scene = SCENES[number * 37 % len(SCENES)]
        path = Path(folder) / f"{number:05d}.txt"
        path.write_text(caption(scene) + "\n")
        Image.fromarray(sample(rng, "one", kind=kind, place=place, time=time).image).save(path.with_suffix(".png"))
        with wave.open(str(path.with_suffix(".wav")), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((heard(rng, scene).clip(-1, 1) * 32767).astype("<i2").tobytes())


def render(folder: str, seed: int, seconds: float = SECONDS) -> None:
    """Voices and ambiences as Opus files."""
    import av

    Path(folder).mkdir(parents=True, exist_ok=True)
    made = {f"voice_{kind}": voice(kind, np.random.default_rng((seed, 1)), seconds, RATE)[0] for kind in VOICES}
    made |= {f"place_{place}": ambience(place, np.random.default_rng((seed, 2)), seconds, RATE) for place in AMBIENCES}
    for name, wave in made.items():
        with av.open(str(Path(folder) / f"{name}.opus"), "w", format="opus") as file:
            stream = file.add_stream("libopus", rate=48000, layout="mono")
            stream.bit_rate = 24000
            full = torchaudio.functional.resample(torch.from_numpy(wave).float().clamp(-1, 1), RATE, 48000).numpy()
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(full[None]), "flt", "mono")
            block.sample_rate, block.pts = 48000, 0
            for part in (block, None):
                file.mux(stream.encode(part))


def score(data: dict[str, torch.Tensor], texts: torch.Tensor, model) -> dict[str, float]:
    """How often a sound encoder finds kind, place and the whole scene among all scenes' texts, and its InfoNCE."""
    with torch.no_grad():
        found = normalize(torch.cat([model(part.float()) for part in data["features"].split(256)]), dim=-1)
    best = (found @ texts.T).argmax(1)
    own = data["scene"]
    hits = {
        name: np.mean([SCENES[a][axis] == SCENES[b][axis] for a, b in zip(best.tolist(), own.tolist(), strict=True)])
        for axis, name in enumerate(("kind", "place", "time"))
    }
    return {**hits, "infonce": float(info_nce(found[:144], texts[own[:144]]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("data", "captioner", "encoder", "pairs", "folder", "sounds"))
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--count", type=int, default=5760, help="sounds of the data")
    parser.add_argument("--encoder", default="output/training/sound_encoder.safetensors")
    parser.add_argument("--pairs", default="output/training/sound_pairs.safetensors")
    parser.add_argument("--examples", default="output/training/sound_folder", help="where `folder` writes")
    parser.add_argument("--sounds", default="weights/sounds")
    add_arguments(parser, batch=96, rate=2e-3, precision="no", minutes=5.0, average=0.995)
    args = parser.parse_args()
    if args.what == "data":
        make_data(args.count, args.seed, args.data)
    elif args.what == "sounds":
        render(args.sounds, args.seed)
    elif args.what == "folder":
        write_folder(args.examples, args.count, args.seed)
    elif args.what == "pairs":
        write_pairs(load_file(args.data), args.encoder, args.pairs)
    else:
        data = load_file(args.data)
        task = CaptionerTask(data) if args.what == "captioner" else EncoderTask(data, *clip_targets()[:2])
        try:
            Loop(task, args).run()
        except ValueError as error:
            sys.exit(f"training.sound_demo: {error}")


if __name__ == "__main__":
    main()
