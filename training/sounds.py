"""The sounds of the picture-book world by synthesis: every kind has a voice, every place an ambience.

Voices differ in pitch, spectrum and rhythm and stay below 1.9 kHz, so that a waveform of 4 kHz carries them; at higher
rates they get their upper harmonics. Everything follows from the generator that is handed in. Single sounds
(`call`, `voice`, `ambience`, `sample_sound`, `mixture`) take any rate; `sample_clip` draws moving pictures with their
sound, in which loudness follows motion. `python -m training.sounds --folder FOLDER` writes examples as videos.
"""

import argparse
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from .storybook import KINDS, PLACES, SIZE, TIMES, WIDE, Facts, _choose, backdrop, phrase, sprite

# kind -> seconds of a call, pitch at its start and end (Hz), strengths of the harmonics, share of breath (noise around
# the pitch), tremolo (Hz), seconds from call to call
VOICES = {
    "fox": (0.20, (1250, 650), (1.0, 0.3), 0.0, 0, (0.26, 0.45)),
    "bear": (0.60, (75, 62), (1.0, 0.9, 0.7, 0.5, 0.3, 0.2), 0.3, 22, (0.85,)),
    "rabbit": (0.05, (1500, 1800), (1.0,), 0.0, 0, (0.10, 0.10, 0.45)),
    "robot": (0.12, (700, 700), (1.0, 0.0, 0.33, 0.0, 0.2), 0.0, 0, (0.20,)),
    "owl": (0.30, (430, 390), (1.0, 0.06), 0.0, 0, (0.55, 0.38)),
    "elephant": (0.45, (190, 270), (0.7, 0.9, 1.0, 0.8, 0.6, 0.4, 0.25), 0.08, 0, (0.62,)),
    "snail": (0.09, (180, 560), (1.0,), 0.0, 0, (0.16, 0.60)),
    "dinosaur": (0.70, (150, 120), (0.4, 0.4, 0.3), 1.0, 14, (0.95,)),
}
# What the joint demo model knows: kinds, each with one body colour, and places. It is night there, and voices and
# ambiences are loud: both halves have noise of one strength, and a picture in daylight would be settled at strengths at
# which no sound can be heard yet. Then no sound could ever say what is seen.
SUBSETS = {
    "kinds": {"elephant": "blue", "fox": "red", "owl": "purple", "robot": "yellow"},
    "places": ("beach", "forest", "city"),
}
FRAMES, FPS, PIXELS, RATE = 16, 10, 32, 4000  # of a joint clip: 1.6 s, 400 samples a frame
MOTIONS = ("right", "left", "hop")
QUIET = 0.2  # loudness of a voice whose character stands still, of that of one in full motion
MOONLIGHT = (0.55, 0.58, 0.75)  # on characters


@dataclass(frozen=True)
class Sound:
    waveform: np.ndarray  # float32 [samples], inside [-1, 1]
    caption: str
    kinds: tuple[str, ...]  # who is heard, the loudest first
    place: str
    time: str
    onsets: tuple[float, ...]  # seconds at which calls begin


@dataclass(frozen=True)
class JointClip:
    frames: np.ndarray  # uint8 [frames, pixels, pixels, 3]
    waveform: np.ndarray  # float32 [frames * rate / FPS], inside [-1, 1]
    caption: str
    kind: str
    place: str
    time: str
    motion: str
    path: np.ndarray  # float [frames, 3]: x and y of the box from edge (0) to edge (1), and its side
    loudness: np.ndarray  # float [frames]: that of the voice, QUIET to 1
    onsets: tuple[float, ...]  # seconds at which calls begin


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.hanning(width + 2)[1:-1] / np.hanning(width + 2)[1:-1].sum(), "same")


def shaped_noise(rng: np.random.Generator, samples: int, rate: int, low: float, high: float) -> np.ndarray:
    """Gaussian noise of standard deviation 1 between two frequencies (Hz), with soft edges an octave wide."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    octave = np.log2(np.maximum(np.fft.rfftfreq(samples, 1 / rate), 1.0))
    rise, fall = octave - np.log2(low) + 1, np.log2(high) + 1 - octave
    noise = np.fft.irfft(spectrum * np.clip(rise, 0, 1) * np.clip(fall, 0, 1), samples)
    return noise / max(noise.std(), 1e-9)


def _tone(pitch: np.ndarray, harmonics: tuple[float, ...], rate: int) -> np.ndarray:
    """Harmonics of a moving pitch (Hz, one per sample); those beyond 0.48 of the rate are left out."""
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tone = sum(
        strength * np.sin(number * phase)
        for number, strength in enumerate(harmonics, 1)
        if number * pitch.max() < 0.48 * rate
    )
    return tone / np.abs(tone).max()


def call(kind: str, rng: np.random.Generator, rate: int = 16000) -> np.ndarray:
    """One call of a kind, float64 [samples], largest value 1."""
    seconds, (start, end), harmonics, breath, tremolo, _ = VOICES[kind]
    samples = round(seconds * rate * rng.uniform(0.95, 1.05))
    way = np.linspace(0, 1, samples)
    sound = _tone((start + (end - start) * way) * rng.uniform(0.985, 1.015), harmonics, rate)
    if breath:
        sound = sound + breath * 0.5 * shaped_noise(rng, samples, rate, start, min(4 * start, 0.45 * rate))
    if tremolo:
        sound = sound * (0.65 + 0.35 * np.sin(2 * np.pi * tremolo * way * seconds))
    edge = max(1, round(min(0.03, seconds / 4) * rate))
    sound = sound * np.clip(np.minimum(np.arange(samples), samples - 1 - np.arange(samples)) / edge, 0, 1)
    return sound / np.abs(sound).max()


def voice(kind: str, rng: np.random.Generator, seconds: float, rate: int = 16000) -> tuple[np.ndarray, list[float]]:
    """Calls in the rhythm of a kind, float64 [samples], and the seconds at which they begin."""
    sound, onsets = np.zeros(round(seconds * rate)), []
    gaps = VOICES[kind][-1]
    turn = int(rng.integers(len(gaps)))
    at = rng.uniform(0, min(gaps))
    while at < seconds:
        one = call(kind, rng, rate)[: len(sound) - round(at * rate)]
        sound[round(at * rate) : round(at * rate) + len(one)] += one
        onsets.append(at)
        at += gaps[turn % len(gaps)] * rng.uniform(0.96, 1.04)
        turn += 1
    return sound, onsets


def _chirps(rng, samples, rate, pitch, every, seconds, rise=1.15):
    sound, at = np.zeros(samples), rng.uniform(0, every)
    while at * rate < samples:
        length = round(seconds * rate * rng.uniform(0.8, 1.2))
        way = np.linspace(0, 1, length)
        one = _tone(pitch * rng.uniform(0.95, 1.05) * rise**way, (1.0,), rate) * np.sin(np.pi * way)
        start = round(at * rate)
        sound[start : start + length] += one[: samples - start]
        at += every * rng.uniform(0.6, 1.4)
    return sound


def _forest(rng, samples, rate):  # birds over a breath of leaves
    return 0.8 * _chirps(rng, samples, rate, 1480, 0.16, 0.09) + 0.05 * shaped_noise(rng, samples, rate, 400, 1500)


def _beach(rng, samples, rate):  # waves that come and go
    seconds = samples / rate
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * (rng.random() + np.linspace(0, seconds / 2.5, samples)))
    return 0.55 * swell * shaped_noise(rng, samples, rate, 300, 0.4 * rate)


def _snow(rng, samples, rate):  # a whistling wind
    wind = 500 * 1.5 ** _smooth(rng.standard_normal(samples // 400 + 8), 5)
    pitch = np.interp(np.arange(samples) / 400 + 4, np.arange(len(wind)), wind)
    return 0.3 * _tone(pitch, (1.0,), rate) + 0.12 * shaped_noise(rng, samples, rate, 300, 900)


def _city(rng, samples, rate):  # the hum of engines
    pitch = np.full(samples, 55.0 * rng.uniform(0.97, 1.03))
    return 0.5 * _tone(pitch, (0.5, 1.0, 0.4), rate) + 0.1 * shaped_noise(rng, samples, rate, 40, 120)


def _desert(rng, samples, rate):  # a low wind and cicadas
    beat = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 12 * np.arange(samples) / rate))
    return 0.3 * shaped_noise(rng, samples, rate, 60, 150) + 0.25 * beat * _tone(np.full(samples, 1250.0), (1.0,), rate)


def _meadow(rng, samples, rate):  # a bee about
    pitch = 210 * (1 + 0.05 * np.sin(2 * np.pi * (rng.random() + 3 * np.arange(samples) / rate)))
    return 0.4 * _tone(pitch, (1.0, 0.6, 0.4, 0.3), rate) + 0.04 * shaped_noise(rng, samples, rate, 200, 800)


def _crickets(rng, samples, rate):
    pulse = 0.6 + 0.4 * np.sin(2 * np.pi * (rng.random() + 14 * np.arange(samples) / rate))
    return 0.45 * pulse * _tone(np.full(samples, 1500.0 * rng.uniform(0.99, 1.01)), (1.0,), rate)


AMBIENCES = {"forest": _forest, "beach": _beach, "snow": _snow, "city": _city, "desert": _desert, "meadow": _meadow}


def ambience(
    place: str, rng: np.random.Generator, seconds: float, rate: int = 16000, time: str = "day"
) -> np.ndarray:
    """Background of a place, float64 [samples], about 0.3 in root mean square; softer at sunset, at night with crickets
    and without birds."""
    samples = round(seconds * rate)
    if time == "night" and place == "forest":
        return _crickets(rng, samples, rate)
    sound = AMBIENCES[place](rng, samples, rate) * (1.0 if time == "day" else 0.6)
    return sound + 0.4 * _crickets(rng, samples, rate) if time == "night" else sound


def mixture(
    rng: np.random.Generator,
    kinds: dict[str, float],
    place: str,
    seconds: float = 2.0,
    rate: int = 16000,
    time: str = "day",
    background: float = 0.3,
) -> Sound:
    """Voices of several kinds with their loudness (1 is full) over a place's ambience of loudness `background`."""
    heard, onsets = background * ambience(place, rng, seconds, rate, time), []
    for kind, loudness in kinds.items():
        sound, starts = voice(kind, rng, seconds, rate)
        heard, onsets = heard + 0.6 * loudness * sound, onsets + starts
    order = tuple(sorted(kinds, key=lambda kind: -kinds[kind]))
    caption = phrase(rng, Facts(order[0], "", "", place, time, (0, 0, 0, 0)))
    return Sound(heard.clip(-1, 1).astype(np.float32), caption, order, place, time, tuple(sorted(onsets)))


def sample_sound(rng: np.random.Generator, seconds: float = 2.0, rate: int = 16000, **known) -> Sound:
    """A scene that is only heard: one kind in a place at a time; `known` fixes kind, place or time."""
    kind = known.get("kind") or _choose(rng, KINDS)
    place, time = known.get("place") or _choose(rng, PLACES), known.get("time") or _choose(rng, TIMES)
    loudness, background = rng.uniform(0.6, 1.0), rng.uniform(0.2, 0.5)
    return mixture(rng, {kind: loudness}, place, seconds, rate, time, background)


def way(rng: np.random.Generator, motion: str, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """Path [frames, 3] (x, y, side) of a character that moves for a part of the clip, and its activity [frames], 0 to 1.

    It stands, sets off, moves and stands again; "hop" moves up and down on the spot, "right" and "left" cross the
    picture. Activity is its speed over the largest speed of the motion.
    """
    lasts = rng.uniform(0.45, 0.7)
    begins = rng.uniform(0, 1 - lasts)
    part = (np.linspace(0, 1, frames) - begins) / lasts
    inside = (part > 0) & (part < 1)
    activity = np.where(inside, np.sin(np.pi * part.clip(0, 1)) ** 0.5, 0)
    done = part.clip(0, 1)
    x, y = np.full(frames, rng.random()), np.full(frames, 1.0)
    if motion == "hop":
        y = y - 0.8 * np.abs(np.sin(2 * np.pi * done))
    else:
        x = done if motion == "right" else 1 - done
    return np.stack([x, y, np.full(frames, rng.uniform(0.62, 0.74))], 1), activity


def sample_clip(
    rng: np.random.Generator, motion: str | None = None, pixels: int = PIXELS, rate: int = RATE, **known
) -> JointClip:
    """Draw a clip with sound of the joint demo's part of the world: kinds and places of SUBSETS, at night.

    The voice is as loud as the character moves (QUIET when it stands). `known` fixes kind or place. Frames uint8
    [16, pixels, pixels, 3], waveform float32 [16 * rate / 10].
    """
    kind = known.get("kind") or _choose(rng, SUBSETS["kinds"])
    place = known.get("place") or _choose(rng, SUBSETS["places"])
    motion = motion or _choose(rng, MOTIONS)
    facts = Facts(kind, SUBSETS["kinds"][kind], "none", place, "night", (0, 0, 0, 0))
    path, activity = way(rng, motion)
    scene = backdrop(place, "night", 0).crop(((WIDE - SIZE) // 2, 0, (WIDE + SIZE) // 2, SIZE)).convert("RGB")
    figure = sprite(kind, facts.colour, "none")
    if motion == "right":  # side views look left
        figure = figure.transpose(Image.FLIP_LEFT_RIGHT)
    scale = path[0, 2] * SIZE / max(figure.size)
    drawn = figure.resize((round(figure.width * scale), round(figure.height * scale)), Image.LANCZOS)
    drawn = Image.merge("RGBA", [
        band.point([round(value * light) for value in range(256)])
        for band, light in zip(drawn.split(), (*MOONLIGHT, 1.0), strict=True)
    ])  # fmt: skip
    frames = []
    for x, y, _ in path:
        image = scene.copy()
        image.paste(drawn, (round(x * (SIZE - drawn.width)), round(y * (SIZE - drawn.height))), drawn)
        frames.append(np.asarray(image.resize((pixels, pixels), Image.BOX)))
    loudness = QUIET + (1 - QUIET) * activity
    samples = len(path) * rate // FPS
    swell = np.interp((np.arange(samples) + 0.5) / rate, (np.arange(len(path)) + 0.5) / FPS, loudness)
    sound, onsets = voice(kind, rng, samples / rate, rate)
    # crickets would be heard everywhere and tell nothing
    around = ambience(place, rng, samples / rate, rate, "night" if place == "forest" else "day")
    heard = np.tanh(1.8 * swell * sound + around)
    return JointClip(
        np.stack(frames), heard.astype(np.float32), phrase(rng, facts), kind, place, "night", motion,
        path, loudness, tuple(onsets),
    )  # fmt: skip


def write_video(path: str | Path, frames: np.ndarray, waveform: np.ndarray, rate: int, fps: int = FPS) -> None:
    """Write frames uint8 [F, h, w, 3] and a mono waveform [samples] as a Matroska file, both without loss."""
    import av

    with av.open(str(path), "w", format="matroska") as file:
        video = file.add_stream("ffv1", rate=Fraction(fps))
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "bgr0"
        audio = file.add_stream("pcm_f32le", rate=rate, layout="mono")
        for image in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None], np.float32), "flt", "mono")
        block.sample_rate, block.pts = rate, 0
        for stream, last in ((audio, block), (audio, None), (video, None)):
            file.mux(stream.encode(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="output/joint_videos", help="where the videos go")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    for index in range(args.clips):
        clip = sample_clip(np.random.default_rng((args.seed, index)))
        write_video(Path(args.folder) / f"{index:04d}.mkv", clip.frames, clip.waveform, RATE)
        print(index, clip.caption, clip.motion)


if __name__ == "__main__":
    main()
