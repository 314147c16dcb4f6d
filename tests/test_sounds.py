"""The world's sounds: from a seed, told apart by pitch and rhythm, as loud as characters move."""

import numpy as np
import pytest
from storyweft.training import sounds
from storyweft.training.storybook import KINDS, PLACES, TIMES


def rng(*numbers):
    return np.random.default_rng(numbers)


def spectrum(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Share of power in bands a third of an octave wide from 40 Hz to 1.9 kHz."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    edges = 40 * 2 ** (np.arange(18) / 3)
    band = np.digitize(np.fft.rfftfreq(len(waveform), 1 / rate), edges)
    found = np.bincount(band, power, len(edges) + 1)
    return np.sqrt(found / found.sum())


def nearest(make, words, rate) -> float:
    """Share of sounds whose spectrum is nearest to the mean one of their own word."""
    means = {word: np.mean([spectrum(make(word, rng(1, i)), rate) for i in range(6)], 0) for word in words}
    right = [
        max(means, key=lambda other: means[other] @ spectrum(make(word, rng(2, i)), rate)) == word
        for word in words
        for i in range(12)
    ]
    return float(np.mean(right))


@pytest.mark.parametrize("rate", [4000, 16000])
def test_voices_and_ambiences_are_told_apart_by_their_spectra(rate):
    assert nearest(lambda kind, r: sounds.call(kind, r, rate), KINDS, rate) > 0.95
    assert nearest(lambda place, r: sounds.ambience(place, r, 1.6, rate), PLACES, rate) > 0.95


def test_rhythms_differ():
    counts = {kind: np.mean([len(sounds.voice(kind, rng(3, i), 4.0)[1]) for i in range(8)]) for kind in KINDS}
    assert sorted(counts.values())[-1] > 3 * sorted(counts.values())[0]
    assert len({round(count) for count in counts.values()}) >= 5


def test_calls_begin_at_the_onsets():
    for kind in KINDS:
        heard, onsets = sounds.voice(kind, rng(4), 3.0, 8000)
        for at in onsets:
            assert np.abs(heard[round(at * 8000) :][:800]).max() > 0.3 or at > 2.9
        assert not heard[: round(onsets[0] * 8000)].any()


def test_same_seed_same_sound_and_facts_are_kept():
    one, other = (sounds.sample_sound(rng(5), 1.0, 16000, kind="owl", place="snow", time="night") for _ in range(2))
    assert np.array_equal(one.waveform, other.waveform) and one.caption == other.caption
    assert one.waveform.dtype == np.float32 and one.waveform.shape == (16000,) and np.abs(one.waveform).max() <= 1
    assert (one.kinds, one.place, one.time) == (("owl",), "snow", "night")
    assert "owl" in one.caption and PLACES["snow"] in one.caption and TIMES["night"] in one.caption
    assert not np.array_equal(one.waveform, sounds.sample_sound(rng(6), 1.0, 16000, kind="owl", place="snow").waveform)


def test_mixtures_follow_the_loudness():
    loud = sounds.mixture(rng(7), {"owl": 0.2, "elephant": 1.0}, "city", 2.0, 8000)
    assert loud.kinds == ("elephant", "owl") and "elephant" in loud.caption
    means = {kind: spectrum(sounds.voice(kind, rng(8), 2.0, 8000)[0], 8000) for kind in ("owl", "elephant")}
    quiet = sounds.mixture(rng(7), {"owl": 1.0, "elephant": 0.2}, "city", 2.0, 8000)
    for sound, winner in ((loud, "elephant"), (quiet, "owl")):
        assert max(means, key=lambda kind: means[kind] @ spectrum(sound.waveform, 8000)) == winner


def test_a_joint_clip_is_what_its_facts_say():
    for index in range(12):
        clip = sounds.sample_clip(rng(9, index))
        assert clip.frames.shape == (16, 32, 32, 3) and clip.frames.dtype == np.uint8
        assert clip.waveform.shape == (6400,) and np.abs(clip.waveform).max() <= 1
        assert clip.kind in sounds.SUBSETS["kinds"] and clip.place in sounds.SUBSETS["places"]
        assert clip.kind in clip.caption and PLACES[clip.place] in clip.caption and "at night" in clip.caption
        moved = np.abs(np.diff(clip.path[:, :2], axis=0)).sum(1)
        assert (moved[clip.loudness[:-1] + clip.loudness[1:] <= 2 * sounds.QUIET + 1e-9] < 1e-9).all()
        if clip.motion != "hop":
            x = clip.path[:, 0]
            assert (x[0], x[-1]) == pytest.approx((0, 1) if clip.motion == "right" else (1, 0))
    again = sounds.sample_clip(rng(9, 3), kind="fox", place="city", motion="left")
    assert (again.kind, again.place, again.motion) == ("fox", "city", "left")


def test_loudness_follows_motion():
    """Over many clips the sound of frames in motion is louder than that of frames that stand."""
    moving, still = [], []
    for index in range(40):
        clip = sounds.sample_clip(rng(10, index))
        power = (clip.waveform.reshape(16, -1) ** 2).mean(1)
        moving += power[clip.loudness > 0.8].tolist()
        still += power[clip.loudness <= sounds.QUIET].tolist()
    assert np.mean(moving) > 2 * np.mean(still)


def test_a_written_video_holds_the_clip(tmp_path):
    import av

    clip = sounds.sample_clip(rng(11))
    sounds.write_video(tmp_path / "clip.mkv", clip.frames, clip.waveform, sounds.RATE)
    with av.open(str(tmp_path / "clip.mkv")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.streams.video[0].average_rate == 10
    with av.open(str(tmp_path / "clip.mkv")) as file:
        heard = np.concatenate([block.to_ndarray() for block in file.decode(audio=0)], 1)
    assert np.array_equal(np.stack(frames), clip.frames) and np.array_equal(heard[0], clip.waveform)
