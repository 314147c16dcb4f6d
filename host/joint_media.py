"""Pictures and sound to joint latents and back, and masks over time."""

import logging

import torch
import torchaudio.functional
from comfy.nested_tensor import NestedTensor

from ..models.joint_media import fitted_audio, frame_places, letterbox
from .joint_av import JointAVModel, Media

ENCODE, DECODE, MASK, EMPTY = (
    "StoryweftEncodeJointLatent", "StoryweftDecodeJointLatent", "StoryweftJointTimeMask", "StoryweftEmptyJointLatent",
)  # fmt: skip
BOTH, VIDEO, SOUND = "both", "video", "sound"
KEEP = (BOTH, VIDEO, SOUND)
RATE, FPS, SCALE = "sample_rate", "fps", "video_scale"  # entries of a joint latent that say what its halves are
QUIET = 1e-4
PLAYED = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # rates that AAC knows


def media_of(model, node_id: str) -> Media:
    if not isinstance(model.model, JointAVModel):
        raise ValueError(f"{node_id}: model is a {type(model.model).__name__}, not a joint audio-video model")
    return model.model.media


def rates(media: Media) -> dict:
    return {FPS: media.fps, RATE: media.sample_rate, SCALE: media.video_scale}


def empty(model, batch: int, frames: int, width: int, height: int) -> dict:
    """Zeros of both halves; 0 stands for what the model was trained on. The sound is as long as the frames."""
    media = media_of(model, EMPTY)
    frames = frames or media.frames
    video = torch.zeros(batch, 3, frames, height or media.height, width or media.width)
    return {"samples": NestedTensor([video, torch.zeros(batch, 1, samples_of(media, frames))]), **rates(media)}


def samples_of(media: Media, frames: int) -> int:
    return media.samples * frames // media.frames


def encode_frames(images: torch.Tensor, fps: float, media: Media, start: float, antialias: bool) -> torch.Tensor:
    """IMAGE [n, h, w, 3] at `fps` pictures a second to [1, 3, F, H, W]; ValueError when fps is not above 0."""
    if fps <= 0:
        raise ValueError(f"{ENCODE}: fps {fps:g} must be above 0")
    if not images.isfinite().all():
        raise ValueError(f"{ENCODE}: images hold numbers that are not finite (NaN or infinity)")
    places = frame_places(len(images), fps, media.frames, media.fps, start)
    pixels = (images[places, ..., :3] * 255).round()
    return media.video_scale * letterbox(pixels, media.height, media.width, antialias).movedim(1, 0)[None]


def encode_sound(audio: dict, media: Media, start: float) -> torch.Tensor:
    """AUDIO to [1, 1, L]: its left channel at the model's sample rate; ValueError when it has no sample rate or samples."""
    rate = audio.get("sample_rate")
    if not rate:
        raise ValueError(f"{ENCODE}: audio has no sample rate")
    waveform = audio["waveform"][:1]
    if not waveform.shape[-1]:
        raise ValueError(f"{ENCODE}: audio holds no samples")
    if not waveform.isfinite().all():
        raise ValueError(f"{ENCODE}: audio holds numbers that are not finite (NaN or infinity)")
    needed = media.samples / media.sample_rate
    first = round(start * rate)
    waveform = waveform[:, :1, first : first + round(needed * rate) + 1].float()
    if rate != media.sample_rate and waveform.shape[-1]:
        waveform = torchaudio.functional.resample(waveform, rate, media.sample_rate)
    sound = fitted_audio(waveform, media.samples)
    if sound.abs().max() < QUIET:
        logging.warning(f"{ENCODE}: audio is silent from {start:g} s on; a model makes nothing of it.")
    return sound


def encode(model, images, fps: float, audio, start: float, keep: str, antialias: bool, batch: int) -> dict:
    """A joint latent of one clip, `batch` times; the half that is not kept is empty.

    ValueError: a half that is to be kept was not given, and what encode_frames and encode_sound refuse.
    """
    media = media_of(model, ENCODE)
    if keep in (BOTH, VIDEO) and images is None:
        raise ValueError(f'{ENCODE}: keep is "{keep}", but neither images nor video are connected')
    if keep in (BOTH, SOUND) and audio is None:
        raise ValueError(f'{ENCODE}: keep is "{keep}", but there is no sound: connect audio, or a video that has a sound track')
    video, sound = torch.zeros(1, 3, media.frames, media.height, media.width), torch.zeros(1, 1, media.samples)
    if keep in (BOTH, VIDEO):
        video = encode_frames(images, fps, media, start, antialias)
    if keep in (BOTH, SOUND):
        sound = encode_sound(audio, media, start)
    halves = [half.repeat(batch, *[1] * (half.ndim - 1)) for half in (video, sound)]
    return {"samples": NestedTensor(halves), **rates(media)}


def pair_of(latent: dict, node_id: str) -> list[torch.Tensor]:
    """Video [B, 3, F, H, W] and sound [B, 1, L] of a latent; ValueError for anything else."""
    samples = latent["samples"]
    halves = list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]
    shapes = [tuple(half.shape) for half in halves]
    if [half.ndim for half in halves] != [5, 3] or halves[0].shape[1] != 3 or halves[1].shape[1] != 1:
        raise ValueError(f"{node_id}: latent {shapes} is not a pair of video [B, 3, F, H, W] and sound [B, 1, L]")
    return halves


def decode(latent: dict, fps: float, sample_rate: int) -> tuple[torch.Tensor, dict, float]:
    """IMAGE [B * F, H, W, 3], AUDIO and frames a second; 0 takes the rate that the latent names, ValueError if it names none.

    A named rate that video files cannot hold (the demo model's 4000) is raised to the next multiple of it that they can.
    """
    video, sound = pair_of(latent, DECODE)
    fps, rate = fps or latent.get(FPS, 0), int(sample_rate or latent.get(RATE, 0))
    if not fps or not rate:
        raise ValueError(f"{DECODE}: latent does not say its rates: set fps and sample_rate")
    images = ((video.movedim(1, -1).flatten(0, 1) / latent.get(SCALE, 1.0) + 1) / 2).clamp(0, 1)
    if not sample_rate and rate not in PLAYED:
        played = next((other for other in PLAYED if other > rate and other % rate == 0), PLAYED[-1])
        sound, rate = torchaudio.functional.resample(sound, rate, played), played
    return images, {"waveform": sound.clamp(-1, 1), "sample_rate": rate}, float(fps)


def time_mask(latent: dict, half: str, start: float, end: float) -> dict:
    """The latent with what is drawn anew from `start` to `end` seconds (0: to the end) of a half; the rest is kept.

    A mask that is already there is kept and added to. ValueError when the span holds no frame or sample of the clip.
    """
    halves = pair_of(latent, MASK)
    fps = latent.get(FPS, 0)
    if not fps:
        raise ValueError(f"{MASK}: latent does not say its frames a second: make it with Empty or Encode Joint Latent")
    seconds = halves[0].shape[2] / fps
    end = end or seconds
    before = latent.get("noise_mask")
    masks = [mask.clone() for mask in before.unbind()] if before is not None else [torch.zeros_like(x[:, :1]) for x in halves]
    for number, name in enumerate((VIDEO, SOUND)):
        if half not in (BOTH, name):
            continue
        count = halves[number].shape[2]
        first, last = (min(count, max(0, round(moment / seconds * count))) for moment in (start, end))
        if first >= last:
            raise ValueError(f"{MASK}: nothing of the {name} lies from {start:g} to {end:g} s of a clip of {seconds:g} s")
        masks[number][:, :, first:last] = 1
    return {**latent, "noise_mask": NestedTensor(masks)}
