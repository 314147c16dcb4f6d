"""Trains a Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434): clips -> CLIP embeddings of their frames.

`python -m training.motion_predictor --videos DIR --encoder CLIP_VISION_FILE` on a folder of videos (film.txt beside film.mp4
is its caption); without --videos on the picture-book world, without --encoder with the demo encoder. Two stages, by --stage:
  embeddings  the predictor alone: mean squared error against the embeddings of the true frames. Needs no video model.
  video       the paper's: error of a frozen video model's prediction, which reads the predicted embeddings.
              `--start FILE` takes the predictor of stage one.
Stage two is for two video models. The demo one reads text and, through an image adapter that is trained along, the embeddings.
`--checkpoint FILE` is SVD, whose cross-attention takes the embeddings of its own CLIP vision as they are, one a frame: the
predictor alone is trained, the first frame stands beside the noise, and there are no captions. Others cannot be trained
with what ComfyUI has: the paper's own, AnimateDiff, is not part of it; Wan's image-to-video gives all frames the same picture
tokens; LTXV, HunyuanVideo, CogVideoX and Mochi read no CLIP embedding. SVD's temporal layers see the first frame's
embedding only, whatever is predicted for the others.
"""

import argparse
from pathlib import Path

import torch

from . import kept, loop, written_out
from .adapted import read_adapter
from .clips import demo_clips, folder_clips
from .motion_tasks import Embeddings, Film, Filmed, ImageToFilm, VideoModel
from .picture_model import PictureEncoder, PictureModel, chosen, chosen_encoder

import comfy.sd  # isort: skip
import comfy.utils  # isort: skip
from storyweft.models.ip_adapter import build as build_adapter  # isort: skip
from storyweft.models.motion_predictor import MotionPredictor, build  # isort: skip

DEMO = {"hidden": 48, "heads": 3, "dim_head": 16, "layers": 2}
FULL = {"hidden": 1024, "heads": 12, "dim_head": 64, "layers": 8}  # the paper's sizes
BESIDE = ("image_proj.", "ip_adapter.")  # an adapter trained with it


def load_predictor(path: str | None, dim: int, sizes: dict, seed: int) -> tuple[MotionPredictor, dict]:
    """A predictor of a file with the adapter tensors beside it, or a new one that starts at the interpolation."""
    if path is None:
        torch.manual_seed(seed)
        return MotionPredictor(dim, **sizes).reset(), {}
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    tensors = {key: value.float() for key, value in tensors.items()}
    beside = {key: value for key, value in tensors.items() if key.startswith(BESIDE)}
    own = {key: value for key, value in tensors.items() if key not in beside}
    return build(own, metadata or {}, path).requires_grad_(True), beside


def video_model(args) -> tuple[PictureModel | None, PictureEncoder]:
    """What stage two trains through, and the encoder: SVD's own, that of --encoder, or the demo's."""
    if not args.checkpoint:
        base = chosen(args, video=True) if args.stage == "video" else None
        return base, chosen_encoder(args.encoder, args.weights)
    if not args.checkpoint.is_file():
        raise ValueError(f"--checkpoint is {args.checkpoint} and there is no such file")
    found = comfy.sd.load_checkpoint_guess_config(str(args.checkpoint), output_clip=False, output_clipvision=True)
    model, _, vae, vision = found
    base = VideoModel(args.checkpoint.stem, args.checkpoint, model, None, vae)
    if vae is None or (vision is None and args.encoder is None):
        raise ValueError(f"{args.checkpoint} holds no {'VAE' if vae is None else 'CLIP vision; give --encoder'}")
    return base, chosen_encoder(args.encoder, args.weights) if args.encoder else PictureEncoder(vision, args.checkpoint)


def data(args, base: PictureModel | None, encoder: PictureEncoder) -> dict:
    """Embeddings `found` [n, L, D], scaled latents [n, L, 4, h, w] of stage two, captions, and which files were left out."""
    found, latents, captions, left_out = [], [], [], []
    if args.videos:
        parts = folder_clips(args.videos, args.frames, args.side or encoder.size, args.fps, left_out)
        parts = ((clips, [caption] * len(clips)) for clips, caption in parts)
    else:
        parts = (demo_clips(args.seed, start, min(50, args.clips - start)) for start in range(0, args.clips, 50))
    for clips, told in parts:
        captions += told
        found.append(torch.stack([encoder(clip.float() / 255) for clip in clips]))
        if base is not None:
            latents += [base.encode(clip.float() / 255).bfloat16() for clip in clips]
    latents = torch.stack(latents) if latents else torch.zeros(0)
    return {"found": torch.cat(found), "latents": latents, "captions": captions, "left_out": left_out}


def kept_data(args, base: PictureModel | None, encoder: PictureEncoder) -> dict:
    source = kept.mark(args.videos) if args.videos else f"demo_{args.seed}_{args.clips}"
    through = base.hash[:12] if base is not None else "embeddings"
    settings = f"{encoder.hash[:12]}_{args.frames}_{args.fps}_{args.side}"
    found = kept.kept(Path(args.folder) / f"motion_data_{through}_{source}_{settings}.pt", lambda: data(args, base, encoder))
    print("\n".join(["left out:", *found["left_out"]] if found["left_out"] else [f"{len(found['found'])} clips"]), flush=True)
    if len(found["found"]) < 2:
        raise ValueError("there is one clip; give at least two, of which one measures")
    return found


def film_task(args, base: PictureModel, predictor, beside: dict, data: dict, encoder: PictureEncoder) -> Film:
    """Stage two; the demo model's adapter begins as the demo adapter unless the file brings one."""
    pinned = not args.free
    if args.checkpoint:
        if base.width != predictor.dim:
            raise ValueError(f"{base.name} reads embeddings {base.width} wide and the encoder gives {predictor.dim}")
        model = Filmed(predictor, None, base.unet, pinned)
        task = ImageToFilm(model, base, data["found"], data["latents"], encoder.name, pinned, args.name, fps=args.fps)
    else:
        adapter = build_adapter(beside, args.start) if beside else read_adapter(args.weights / "adapter.safetensors", base)
        model = Filmed(predictor, adapter.requires_grad_(True), base.unet, pinned)
        task = Film(model, base, data["found"], data["latents"], encoder.name, pinned, args.name).told(data["captions"])
        task.metadata["base_model"] = loop.file_hash(args.weights / "unet.safetensors")
    task.metadata["video_model"] = base.hash
    return task


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("embeddings", "video"), default="embeddings")
    parser.add_argument("--videos", type=Path, help="folder of videos")
    parser.add_argument(
        "--encoder", type=Path, help="CLIP vision model file (ViT-H for SVD and most adapters); default: SVD's own or the demo's"
    )
    parser.add_argument("--checkpoint", type=Path, help="SVD checkpoint to train stage two on in the demo model's place")
    parser.add_argument("--side", type=int, default=0, help="pixels of a clip's side in stage two, default 128, SVD 512")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the demo models")
    parser.add_argument("--start", help="predictor file to begin from")
    parser.add_argument("--adapter-only", action="store_true", help="stage two leaves the predictor as it is")
    parser.add_argument(
        "--free", action="store_true", help="let the predictor change the given pictures' embeddings too"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip; the paper: 16; SVD: 14, SVD-XT: 25")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second taken from videos")
    parser.add_argument("--clips", type=int, default=1000, help="clips of the picture-book world")
    parser.add_argument("--name", default="motion", help="stem of the files")
    loop.add_arguments(parser, batch=32, rate=1e-3, minutes=5, precision="no", clip=1.0, average=0.99)
    args = parser.parse_args()
    if args.checkpoint and (args.stage != "video" or not args.videos or args.adapter_only):
        parser.error("--checkpoint needs --stage video and --videos, and has no adapter: leave --adapter-only out")
    if args.stage == "video" and args.encoder and not args.checkpoint:
        parser.error("--stage video without --checkpoint trains the demo video model, which reads the demo encoder: leave --encoder out")
    if args.stage == "video":
        args.side = args.side or (512 if args.checkpoint else 128)
    if args.side % 64 or args.side and args.stage != "video":
        parser.error(f"--side is {args.side}; give a multiple of 64, in stage two")
    if args.frames < 3:
        parser.error(f"--frames is {args.frames}; a clip needs a frame between its ends")
    return args


def main() -> None:
    args = arguments()
    if not args.checkpoint:
        written_out.use()
    base, encoder = video_model(args)
    found = kept_data(args, base, encoder)
    sizes = FULL if args.encoder or args.checkpoint else DEMO
    predictor, beside = load_predictor(args.start, found["found"].shape[2], sizes, args.seed)
    predictor.requires_grad_(not (args.adapter_only and args.stage == "video"))
    if args.stage == "video":
        task = film_task(args, base, predictor, beside, found, encoder)
    else:
        task = Embeddings(predictor, found["found"], encoder.name, not args.free, args.name)
    loop.Loop(task, args).run()


if __name__ == "__main__":
    main()
