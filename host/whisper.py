"""Whisper audio captioning (arXiv 2305.09690) through transformers' own classes; the authors' subclass is not needed."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch

from ..story.heard import group
from .model_files import check_tokenizer
from .sounds import Asked, Window, resampled

RATE, SECONDS = 16000, 30.0
PREFIX = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
LONGEST = 60  # tokens


class Whisper:
    """A folder with config.json, weights and tokenizer of a WhisperForConditionalGeneration."""

    seconds = SECONDS

    def __init__(self, folder: Path, node_id: str):
        # seconds of import that only those who use it should wait for
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

        try:
            with torch.inference_mode(False):
                self.network = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).train(False)
            self.features = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = WhisperTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{node_id}: {folder.name} is no Whisper model: {str(error).splitlines()[0]}") from error
        check_tokenizer(folder, node_id)
        self.network.requires_grad_(False)
        self.device = comfy.model_management.get_torch_device()
        held = torch.nn.ModuleDict({"whisper": self.network})  # the patcher notes a device, which transformers' classes refuse
        self.patcher = comfy.model_patcher.ModelPatcher(held, self.device, comfy.model_management.unet_offload_device())

    def prefix(self, style: str) -> list[int]:
        """What every caption begins with: Whisper's own marks and the words that choose the style."""
        marks = self.tokenizer.convert_tokens_to_ids(list(PREFIX))
        return [*marks, *self.tokenizer(style, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def encode(self, window: Window) -> torch.Tensor:
        comfy.model_management.load_models_gpu([self.patcher])
        wave = resampled(window.wave, window.rate, RATE)[: round(SECONDS * RATE)]
        found = self.features(wave.cpu().numpy(), sampling_rate=RATE, return_tensors="pt").input_features
        return self.network.model.encoder(found.to(self.device, self.network.dtype)).last_hidden_state

    @torch.no_grad()
    def greedy(self, encoded: torch.Tensor, prefix: list[int]) -> tuple[list[int], list[float]]:
        """Tokens of a caption after its prefix, the end left out, and the probability of each in the raw scores."""
        end, ids, chances, past = self.network.config.eos_token_id, [], [], None
        given = torch.tensor([prefix], device=self.device)
        while len(ids) < LONGEST:
            comfy.model_management.throw_exception_if_processing_interrupted()
            out = self.network.model.decoder(
                input_ids=given, encoder_hidden_states=encoded, past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            best, token = self.network.proj_out(out.last_hidden_state[:, -1]).float().softmax(-1).max(-1)
            if int(token) == end:
                break
            ids.append(int(token))
            chances.append(float(best))
            given = token[:, None]
        return ids, chances

    def caption(self, window: Window, asked: Asked) -> tuple[list[str], list[float]]:
        ids, chances = self.greedy(self.encode(window), self.prefix(asked.style))
        return group(self.pieces(ids), chances, asked.geometric)

    def pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text."""
        texts = ["", *(self.tokenizer.decode(ids[: count + 1], skip_special_tokens=True) for count in range(len(ids)))]
        return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]
