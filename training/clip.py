"""Trains the demo CLIP: ComfyUI's SD1 text model and CLIP vision model, tiny, contrastively on picture-book pages.

`python -m training.clip --minutes 5`. Half of the captions name the character's colour and hat, so that the image
embedding knows them; the captions that the U-Net is trained on never do. Only the token embeddings of words that occur
are kept, and one row that stands for every other token.
"""

import argparse
import json
import re
import time

import numpy as np
import torch
from safetensors.torch import save_file

from . import host_models  # noqa: F401
from .storybook import COLOURS, HATS, KINDS, PLACES, TIMES, Page, sample

import comfy.clip_model  # isort: skip
import comfy.ops  # isort: skip
from comfy.sd1_clip import SD1Tokenizer  # isort: skip

TEXT = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 320,
    "hidden_act": "quick_gelu",
    "image_size": 128,
    "patch_size": 16,
    "num_channels": 3,
    "projection_dim": 96,
}
LENGTH = 48  # tokens looked at while training; later ones are padding and the mask is causal
MEAN, STD = (
    torch.tensor(x).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def words() -> list[str]:
    """Every word a caption can have, and those of identities."""
    fixed = "a an in on by at the with and two panels drawn twice , no hat wearing body"
    listed = " ".join([*KINDS, *COLOURS, *HATS, *PLACES.values(), *TIMES.values(), fixed])
    return sorted(set(re.findall(r"\w+|,", listed)))


def naming(page: Page) -> str:
    """The caption with the identity named, for the image encoder to learn it."""
    facts = page.facts[0]
    hat = "" if facts.hat == "none" else f" with a {facts.hat}"
    return re.sub(rf"\b(an?) {facts.kind}", f"a {facts.colour} {facts.kind}{hat}", page.caption)


def _layer(self, x, mask=None, optimized_attention=None):
    # the host adds in place, which autograd refuses
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


comfy.clip_model.CLIPLayer.forward = _layer


class Vocabulary:
    """Token ids of the world's words to compact rows; row 0 stands for all others."""

    def __init__(self):
        self.tokenizer = SD1Tokenizer()
        self.ids = sorted({token for word in words() for token in self.tokens(word)})
        self.row = {token: index + 1 for index, token in enumerate(self.ids)}

    def tokens(self, text: str) -> list[int]:
        return [token for token, _ in self.tokenizer.tokenize_with_weights(text)["l"][0]]

    def rows(self, text: str) -> list[int]:
        return [self.row.get(token, 0) for token in self.tokens(text)]


class Encoders(torch.nn.Module):
    def __init__(self, rows: int):
        super().__init__()
        plain = comfy.ops.disable_weight_init
        self.text = comfy.clip_model.CLIPTextModel(TEXT, torch.float32, "cpu", plain)
        self.vision = comfy.clip_model.CLIPVisionModelProjection(VISION, torch.float32, "cpu", plain)
        self.rows = torch.nn.Parameter(torch.randn(rows, TEXT["hidden_size"]) * 0.05)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.6))
        for name, parameter in [*self.text.named_parameters(), *self.vision.named_parameters()]:
            if parameter.ndim > 1 and "token_embedding" not in name:
                torch.nn.init.normal_(parameter, std=0.02 if "position" in name else 0.7 / parameter[0].numel() ** 0.5)
            else:
                torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
        self.text.text_model.embeddings.token_embedding.weight.requires_grad_(False)

    def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
        ends = (rows == rows.max()).int().argmax(1) + 1  # the end token has the greatest id, so the last row
        model = self.text.text_model
        position = model.embeddings.position_embedding.weight[: rows.shape[1]]
        mask = torch.full((rows.shape[1],) * 2, -1e9).triu_(1)
        x, _ = model.encoder(self.rows[rows] + position, mask=mask)
        return self.text.text_projection(model.final_layer_norm(x)[torch.arange(len(x)), ends - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="output/training/clip.safetensors")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--pages", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vocabulary = Vocabulary()
    pages = [sample(np.random.default_rng((args.seed, index))) for index in range(args.pages)]
    images = torch.from_numpy(np.stack([page.image for page in pages])).permute(0, 3, 1, 2)
    texts = [(page.caption, naming(page)) for page in pages]
    keys = [(tuple(f[:1] + f[3:5] for f in map(_tuple, page.facts)), page.facts[0].identity) for page in pages]
    model = Encoders(len(vocabulary.ids) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02)
    start, step, seconds = time.time(), 0, args.minutes * 60
    while (spent := time.time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 100) * min(1, 2 * (1 - spent / seconds) + 0.01)
        index = rng.integers(len(pages), size=args.batch)
        named = rng.random() < 0.5
        rows = torch.tensor([vocabulary.rows(texts[i][named])[:LENGTH] for i in index])
        rows[(torch.rand(rows.shape) < 0.03) & (rows > 0) & (rows < rows.max() - 1)] = 0  # words it will not know
        same = torch.tensor([[keys[a][: 1 + named] == keys[b][: 1 + named] for b in index] for a in index]).float()
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.vision(pixel_values=(images[index].float() / 255 - MEAN) / STD, intermediate_output=-2)[
                2
            ].float()
        read = model.encode_text(rows)
        logits = torch.nn.functional.normalize(read, dim=1) @ torch.nn.functional.normalize(seen, dim=1).T
        logits = logits * model.logit_scale.clamp(max=4.6).exp()
        target = same / same.sum(1, keepdim=True)
        loss = -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            best = logits.argmax(1)
            hit = same[torch.arange(len(best)), best].mean().item()
            print(
                f"step {step} named {named} loss {loss.item():.3f} retrieval {hit:.3f} seconds {spent:.0f}", flush=True
            )
    save(model, vocabulary, args.out, step * args.batch, seconds)


def _tuple(facts) -> tuple:
    return facts.kind, facts.colour, facts.hat, facts.place, facts.time


def save(model: Encoders, vocabulary: Vocabulary, path: str, seen: int, seconds: float) -> None:
    """Text under `text.`, vision under `vision.`, embedding rows and the token ids they belong to beside them."""
    tensors = {f"text.{key}": value for key, value in model.text.state_dict().items() if "token_embedding" not in key}
    tensors |= {f"vision.{key}": value for key, value in model.vision.state_dict().items()}
    tensors["text.rows"] = model.rows.detach()
    tensors = {key: value.half().contiguous() for key, value in tensors.items()}
    tensors["text.token_ids"] = torch.tensor(vocabulary.ids, dtype=torch.int32)
    metadata = {
        "text": json.dumps(TEXT),
        "vision": json.dumps(VISION),
        "pages_seen": str(seen),
        "minutes": f"{seconds / 60:.1f}",
    }
    save_file(tensors, path, metadata)


if __name__ == "__main__":
    main()
