"""Reads a folder of captions with sounds and pictures: their embeddings in one space and the prompts of a text encoder of core.

Uses `host`, as picture_model does for the trainers of pictures: pictures and texts must reach the encoder as the nodes bring them.
"""

import argparse
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from . import host_models, pack  # noqa: F401

import comfy.sd  # isort: skip
from storyweft.host import demo, joint, model_files  # isort: skip
from storyweft.models import imagebind  # isort: skip

SOUNDS, PICTURES = (".wav", ".flac", ".ogg", ".mp3", ".opus"), (".png", ".jpg", ".jpeg", ".webp")
DEMO = "demo"
CLIPS, SHORT = 3, "loop"  # how the nodes hear by default


def listed(folder: Path) -> list[tuple[str, Path | None, Path | None]]:
    """(caption, sound, picture) of every NAME.txt. Raises ValueError naming the folder or file that cannot do."""
    found = []
    for path in sorted(folder.glob("*.txt")):
        caption = path.read_text(encoding="utf-8").strip()
        if not caption:
            raise ValueError(f"{path} is empty")
        sound, picture = (
            next((path.with_suffix(e) for e in endings if path.with_suffix(e).is_file()), None)
            for endings in (SOUNDS, PICTURES)
        )
        found.append((caption, sound, picture))
    if not found:
        raise ValueError(f"{folder} holds no captions (NAME.txt)")
    return found


def read_sound(path: Path) -> tuple[torch.Tensor, int]:
    """Mono [samples] and their rate. Raises ValueError for a file that holds no sound."""
    try:
        with av.open(str(path)) as file:
            stream = file.streams.audio[0]
            rate = stream.rate
            resampler = av.AudioResampler("fltp", "mono", rate)
            blocks = [one.to_ndarray()[0] for frame in file.decode(stream) for one in resampler.resample(frame)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} holds no sound that can be read") from error
    wave = torch.from_numpy(np.concatenate(blocks or [np.zeros(0)])).float()
    if not wave.any():
        raise ValueError(f"{path} is silent")
    if not wave.isfinite().all():
        raise ValueError(f"{path} holds samples that are no numbers")
    return wave, rate


def read_picture(path: Path) -> torch.Tensor:
    """[1, height, width, 3] in [0, 1]. Raises ValueError for a file that is no picture."""
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None] / 255
    except OSError as error:
        raise ValueError(f"{path} is no picture that can be read") from error


def encoder_of(name: str, towers: list[str]):
    """The demo encoders, or ImageBind's towers from its file."""
    if name == DEMO:
        return joint.DemoEncoder()
    network = imagebind.build(model_files.read(name, "--encoder"), towers, name)
    return joint.ImageBindEncoder(network, towers, "training.sound_mapping")


def text_encoder_of(files: list[str], kind: str):
    if files == [DEMO]:
        return demo.load_clip(str(demo.WEIGHTS))
    kinds = {one.name.lower(): one for one in comfy.sd.CLIPType}
    if kind not in kinds:
        raise ValueError(f"--text-type is '{kind}'; choose one of {', '.join(kinds)}")
    return comfy.sd.load_clip(ckpt_paths=files, clip_type=kinds[kind])


@torch.no_grad()
def embedded(encoder, examples: list, heard: bool, seen: bool) -> dict[str, torch.Tensor]:
    """Embeddings [examples, width] by modality."""
    made = {"text": [], "audio": [], "image": []}
    for caption, sound, picture in tqdm(examples, unit="example"):
        made["text"].append(encoder.text([caption]))
        if heard:
            wave, rate = read_sound(sound)
            made["audio"].append(encoder.audio(wave[None], rate, CLIPS, SHORT))
        if seen:
            made["image"].append(encoder.image(read_picture(picture)))
    return {name: torch.cat(parts).float() for name, parts in made.items() if parts}


@torch.no_grad()
def prompts_of(clip, captions: list[str]) -> dict[str, torch.Tensor]:
    """Prompts [captions, length, width], shorter ones followed by zeros, how many of their rows are words, and pooled vectors."""
    prompts, pooled, lengths = [], [], []
    for caption in captions:
        tokens = clip.tokenize(caption, disable_weights=True)
        (z, extras), *_ = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
        prompts.append(z.float().cpu())
        if extras.get("pooled_output") is not None:
            pooled.append(extras["pooled_output"].float().cpu())
        lengths.append(filled(tokens, z.shape[1]))
    longest = max(z.shape[1] for z in prompts)
    found = {"target": torch.cat([torch.nn.functional.pad(z, (0, 0, 0, longest - z.shape[1])) for z in prompts])}
    if len(pooled) == len(captions):
        found["pooled"] = torch.cat(pooled)
    return {**found, "length": torch.tensor(lengths)}


def prepare(args: argparse.Namespace) -> None:
    """Write embeddings of every modality that all examples have, prompts, pooled vectors and lengths."""
    if not args.encoder or not args.text_encoder:
        raise ValueError("prepare needs --encoder and --text-encoder: files, or demo for the demo models")
    examples = listed(Path(args.pairs))
    heard, seen = (all(one[place] is not None for one in examples) for place in (1, 2))
    towers = ["text", *(["audio"] if heard else []), *(["vision"] if seen else [])]
    encoder = encoder_of(args.encoder, towers)
    tensors = embedded(encoder, examples, heard, seen)
    captions = list(dict.fromkeys(caption for caption, _, _ in examples))
    tensors |= prompts_of(text_encoder_of(args.text_encoder, args.text_type), captions)
    number = {caption: index for index, caption in enumerate(captions)}
    tensors["target_of"] = torch.tensor([number[caption] for caption, _, _ in examples])
    name = args.target_name or ", ".join(f"{DEMO} CLIP" if path == DEMO else Path(path).stem for path in args.text_encoder)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, args.out, {"space": encoder.space, "target": name})
    left = [what for what, there in (("sounds", heard), ("pictures", seen)) if not there]
    without = f"; left out {' and '.join(left)}, which not every caption has" if left else ""
    print(f"{len(examples)} examples, {len(captions)} prompts of {tuple(tensors['target'].shape[1:])} to {args.out}{without}")


def filled(tokens: dict, length: int) -> int:
    """Tokens of a prompt up to its end: what comes after repeats the last one."""
    ids = [token for chunk in next(iter(tokens.values())) for token, *_ in chunk]
    count = len(ids)
    while count > 1 and ids[count - 1] == ids[count - 2]:
        count -= 1
    return min(count, length)
