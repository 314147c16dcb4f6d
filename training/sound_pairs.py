"""Reads a folder of captions with sounds and pictures: their ImageBind embeddings and the prompts of a text encoder of core.

The one trainer module that uses `host`: pictures and texts must reach ImageBind as the nodes bring them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchaudio
from PIL import Image
from safetensors.torch import save_file

from . import host_models, pack  # noqa: F401

import comfy.sd  # isort: skip
import comfy.utils  # isort: skip
from storyweft.host import imagebind as imagebind_host  # isort: skip
from storyweft.models import imagebind, imagebind_frontend  # isort: skip

SOUNDS, PICTURES = (".wav", ".flac", ".ogg", ".mp3", ".opus"), (".png", ".jpg", ".jpeg", ".webp")


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


def read_sound(path: Path) -> torch.Tensor:
    """Mono [samples] at 16 kHz."""
    import av

    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler("fltp", "mono", stream.rate)
        blocks = [one.to_ndarray()[0] for frame in file.decode(stream) for one in resampler.resample(frame)]
        rate = stream.rate
    wave = torch.from_numpy(np.concatenate(blocks)).float()
    if not wave.any():
        raise ValueError(f"{path} is silent")
    return torchaudio.functional.resample(wave, rate, imagebind_frontend.RATE)


@torch.no_grad()
def prepare(args: argparse.Namespace) -> None:
    """Write embeddings of every modality that all examples have, prompts, pooled vectors and lengths."""
    if not args.imagebind or not args.text_encoder:
        raise ValueError("prepare needs --imagebind and --text-encoder")
    examples = listed(Path(args.pairs))
    heard, seen = (all(one[place] is not None for one in examples) for place in (1, 2))
    towers = ["text", *(["audio"] if heard else []), *(["vision"] if seen else [])]
    network = imagebind.build(comfy.utils.load_torch_file(args.imagebind, safe_load=True), towers, args.imagebind)
    kind = getattr(comfy.sd.CLIPType, args.text_type.upper())
    clip = comfy.sd.load_clip(ckpt_paths=args.text_encoder, clip_type=kind)
    captions = list(dict.fromkeys(caption for caption, _, _ in examples))
    made = {"text": [], "audio": [], "image": []}
    for caption, sound, picture in examples:
        made["text"].append(network.encode_text(imagebind_host.tokenize([caption])))
        if heard:
            made["audio"].append(network.encode_audio(imagebind_frontend.hear(read_sound(sound)[None], short="loop")))
        if seen:
            pixels = torch.from_numpy(np.array(Image.open(picture).convert("RGB")))[None] / 255
            made["image"].append(network.encode_vision(imagebind_host.see(pixels)))
    tensors = {name: torch.cat(parts) for name, parts in made.items() if parts}
    prompts, pooled, lengths = [], [], []
    for caption in captions:
        tokens = clip.tokenize(caption, disable_weights=True)
        (z, extras), *_ = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
        prompts.append(z.float().cpu())
        if extras.get("pooled_output") is not None:
            pooled.append(extras["pooled_output"].float().cpu())
        lengths.append(filled(tokens, z.shape[1]))
    longest = max(z.shape[1] for z in prompts)
    tensors["target"] = torch.cat([torch.nn.functional.pad(z, (0, 0, 0, longest - z.shape[1])) for z in prompts])
    if len(pooled) == len(captions):
        tensors["pooled"] = torch.cat(pooled)
    tensors["length"] = torch.tensor(lengths)
    tensors["target_of"] = torch.tensor([captions.index(caption) for caption, _, _ in examples])
    name = args.target_name or ", ".join(Path(path).stem for path in args.text_encoder)
    save_file({key: value.contiguous() for key, value in tensors.items()}, args.out, {"space": "ImageBind", "target": name})
    print(f"{len(examples)} examples, {len(captions)} prompts of {tuple(tensors['target'].shape[1:])} to {args.out}")


def filled(tokens: dict, length: int) -> int:
    """Tokens of a prompt up to its end: what comes after repeats the last one."""
    ids = [token for chunk in next(iter(tokens.values())) for token, *_ in chunk]
    count = len(ids)
    while count > 1 and ids[count - 1] == ids[count - 2]:
        count -= 1
    return min(count, length)
