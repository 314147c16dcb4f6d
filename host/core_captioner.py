"""Audio-capable language models of ComfyUI's core as captioners: their text, and one teacher-forced pass for the numbers.

Core's generation gives token ids without scores; the pass over prompt and answer gives each answer token's probability in
the raw scores.
"""

import comfy.model_management
import torch
from comfy.sd1_clip import SDClipModel

from ..story.heard import group
from .sounds import Asked, Window

LONGEST = 96  # tokens
SECONDS = 30.0


class CoreCaptioner:
    """A CLIP of core whose model can generate and takes sound."""

    seconds = SECONDS

    def __init__(self, clip, node_id: str):
        self.clip, self.node_id = clip, node_id
        self.model = clip.cond_stage_model
        self.inner = getattr(self.model, getattr(self.model, "clip", ""), None)
        if self.inner is None or not hasattr(self.inner.transformer, "generate"):
            raise ValueError(
                f"{node_id}: the clip ({type(self.model).__name__}) generates no text; load a language model, such as Gemma 4."
            )

    def tokens(self, window: Window, prompt: str) -> dict:
        """The prompt with the sound in it. Raises ValueError where the model left the sound out."""
        audio = {"waveform": window.wave[None, None], "sample_rate": window.rate}
        tokens = self.clip.tokenize(prompt, audio=audio, skip_template=False, min_length=1, thinking=False)
        heard = [one[0] for rows in tokens.values() for row in rows for one in row if isinstance(one[0], dict)]
        if not any(one.get("type") == "audio" for one in heard):
            raise ValueError(
                f"{self.node_id}: the clip ({type(self.model).__name__}) takes no sound; load an audio-capable model, such "
                "as Gemma 4."
            )
        return tokens

    def caption(self, window: Window, asked: Asked) -> tuple[list[str], list[float]]:
        tokens = self.tokens(window, asked.prompt)
        with torch.no_grad():
            ids = self.clip.generate(tokens, do_sample=False, max_length=LONGEST, seed=0)
            stops = set(self.inner.transformer.model.config.stop_tokens)
            ids = [token for token in ids if token not in stops]
            chances = self.probabilities(self.tokens(window, asked.prompt), ids)  # generating used the sound in the first ones up
        return group(self.pieces(ids), chances, asked.geometric)

    def probabilities(self, tokens: dict, ids: list[int]) -> list[float]:
        """Probability of each of `ids` as the answer to `tokens`, in one pass."""
        row = [one[0] for one in next(iter(tokens.values()))[0]] + ids
        device = self.clip.patcher.load_device
        with comfy.model_management.cuda_device_context(device):
            embeds, _, _, info = SDClipModel.process_tokens(self.inner, [row], device)
            transformer = self.inner.transformer
            embeds = embeds.to(torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32)
            hidden = transformer.model.forward(
                None,
                embeds=embeds,
                attention_mask=None,
                input_ids=self._expanded(row, info, embeds.shape[1], device),
                embeds_info=info,
            )[0]
            first = hidden.shape[1] - len(ids)
            found = []
            for place, token in enumerate(ids):  # core's logits look at the last position only
                scores = transformer.logits(hidden[:, : first + place])[0, -1].float()
                found.append(float(scores.softmax(-1)[token]))
        return found

    @staticmethod
    def _expanded(row: list, info: list[dict], length: int, device) -> torch.Tensor:
        """Token ids at their places among the embeddings, 0 where a sound or picture stands."""
        sizes, ids, place = {one["index"]: one["size"] for one in info}, [0] * length, 0
        for one in row:
            if place in sizes:
                place += sizes[place]
            else:
                if isinstance(one, int):
                    ids[place] = one
                place += 1
        return torch.tensor([ids], device=device)

    def pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text; control marks add nothing."""
        texts = ["", *(self.clip.decode(ids[: count + 1]) for count in range(len(ids)))]
        return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]
