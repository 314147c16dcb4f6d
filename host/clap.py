"""Judges in the layout of transformers: CLIP reads the caption and looks, LAION's CLAP (arXiv 2211.06687) hears.

CLAP knows sounds and texts and no pictures, so that its word on a picture goes through texts: it says how probable the caption
and each of its nouns are for the sound, and the mean of these texts in CLIP, weighted so, is what pictures are compared with.
"""

import json
from pathlib import Path

import comfy.model_management
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..story.heard import noun_probability, plain
from . import imagebind, sounds
from .judge import Judge
from .model_files import CONFIG, check_tokenizer, read

RATE = 48000
HEARD, SEEN = "This is a sound of {}.", "a photo of a {}"  # how the models' authors put a single word
COUNTED = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")  # buffers not in every file


def kind_of(path: Path) -> str:
    """What model a folder's config.json names; "" for a file."""
    if not path.is_dir():
        return ""
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("model_type", "")
    except (ValueError, AttributeError):
        return "nothing that can be read"


def pretrained(path: Path, kind: str, node_id: str) -> torch.nn.Module:
    """A frozen "clip" or "clap" network of a folder, loaded strictly; a single file of CLIP is OpenAI's ViT-B/32.

    Raises ValueError naming the file for another model, for tensors that are missing, unknown or of another shape, and where
    transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"{node_id}: {path.name} needs the package transformers, which this ComfyUI lacks.") from error
    config_class, model_class = {"clip": ("CLIPConfig", "CLIPModel"), "clap": ("ClapConfig", "ClapModel")}[kind]
    if path.is_dir() and kind_of(path) != kind:
        raise ValueError(f"{node_id}: {path.name} is no {kind.upper()} model: its {CONFIG} says '{kind_of(path)}'.")
    config = getattr(transformers, config_class)
    config = config.from_dict(json.loads((path / CONFIG).read_text())) if path.is_dir() else config()
    state = read(path, node_id)
    with torch.device("meta" if next(iter(state.values())).is_meta else "cpu"):
        network = getattr(transformers, model_class)(config)
    fill(network, state, f"{node_id}: {path.name}", kind)
    return network.train(False).requires_grad_(False)


def fill(network: torch.nn.Module, state: dict[str, Tensor], source: str, kind: str) -> None:
    """Load tensors strictly, but for buffers that only count. Raises ValueError naming the first that does not fit."""
    own = network.state_dict()
    if not own.keys() & state.keys():
        raise ValueError(f"{source} is no {kind.upper()} model: it lacks {next(iter(own))}.")
    for key in sorted(own.keys() | state.keys()):
        if key.endswith(COUNTED):
            continue
        if key not in own or key not in state:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}.")
    network.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


class ClipJudge(Judge):
    """CLIP's two towers. `audio` is not its to judge."""

    def __init__(self, path: Path, node_id: str):
        super().__init__(pretrained(path, "clip", node_id))
        self.size = self.network.config.vision_config.image_size

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        ids = imagebind.tokenize([caption]).to(self.device)
        return self.network.text_projection(self.network.text_model(input_ids=ids)[1])

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.network.visual_projection(self.network.vision_model(pixel_values=pixels)[1])
        return seen, seen


class SeparateTextJudge:
    """The caption judged by CLIP, as in the paper (ViT-B/32), the sound by another judge."""

    def __init__(self, hearing: Judge, reading: ClipJudge):
        self.hearing, self.reading, self.log_scale = hearing, reading, hearing.log_scale

    def text(self, caption: str) -> Tensor:
        return self.reading.text(caption)

    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        return self.hearing.audio(wave, rate, caption)

    def see(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        return self.reading.see(picture)[0], self.hearing.see(picture)[1]


class ClapJudge(Judge):
    """What CLAP hears, looked up in the texts and pictures of a CLIP. Sounds are heard in windows of 10 s, as it was trained."""

    def __init__(self, path: Path, reading: ClipJudge, node_id: str):
        super().__init__(pretrained(path, "clap", node_id))
        # seconds of import that only those who use it should wait for
        from transformers import AutoTokenizer, ClapFeatureExtractor

        check_tokenizer(path, node_id)
        try:
            self.features = ClapFeatureExtractor.from_pretrained(path, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{node_id}: {path.name} lacks CLAP's tokenizer or preprocessor_config.json: {reason}") from error
        self.reading, self.node_id = reading, node_id

    def text(self, caption: str) -> Tensor:
        return self.reading.text(caption)

    def see(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        return self.reading.see(picture)

    @torch.no_grad()
    def audio(self, wave: Tensor, rate: int, caption: str) -> Tensor:
        nouns = [plain(word) for word in dict.fromkeys(caption.split()) if noun_probability(word)]
        chances = self.probabilities(wave, rate, [caption, *(HEARD.format(noun) for noun in nouns)])
        texts = [self.text(one) for one in (caption, *(SEEN.format(noun) for noun in nouns))]
        return (chances[:, None] * normalize(torch.cat(texts), dim=-1)).sum(0, keepdim=True)

    @torch.no_grad()
    def probabilities(self, wave: Tensor, rate: int, texts: list[str]) -> Tensor:
        """CLAP's zero-shot probability of each text [n] for a sound [samples]."""
        scale = self.network.logit_scale_a.float().exp()
        return (scale * self.read(texts) @ self.hear(wave, rate)).softmax(0)

    def read(self, texts: list[str]) -> Tensor:
        """Unit embeddings [n, width]."""
        given = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        pooled = self.network.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[1]
        return normalize(self.network.text_projection(pooled), dim=-1)

    def hear(self, wave: Tensor, rate: int) -> Tensor:
        """The unit mean over windows [width]: longer sounds would be cut at random by the feature extractor."""
        seconds = self.features.max_length_s
        heard = []
        for part in sounds.windows(sounds.resampled(wave.cpu(), rate, RATE), RATE, seconds, seconds, self.node_id):
            comfy.model_management.throw_exception_if_processing_interrupted()
            given = self.features(part.wave.numpy(), sampling_rate=RATE, return_tensors="pt").to(self.device)
            pooled = self.network.audio_model(input_features=given["input_features"], is_longer=given["is_longer"])[1]
            heard.append(normalize(self.network.audio_projection(pooled), dim=-1))
        return normalize(torch.cat(heard).mean(0), dim=-1)
