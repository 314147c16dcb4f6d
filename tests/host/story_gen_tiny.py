"""A tiny SD1.5 model with random StoryGen weights, references for it, and counters of what it computes."""

import comfy.samplers
import tiny
import torch
from storyweft.host import override
from storyweft.host import story_gen_weights as weights
from storyweft.host.reference_pass import Noise, Reference
from storyweft.host.story_gen import ReferenceRule, make_guider
from storyweft.models.story_gen import ImageAttention
from storyweft.sampling.story_gen import ALONE, AUTO

CONFIG = tiny.UNET


def own_state(patcher, seed=9, native=False) -> dict:
    """Random attn3 and norm4 of every site under published names (or ComfyUI's)."""
    base = patcher.model
    names = weights.site_names(base.model_config.unet_config)[native]
    blocks = weights.transformer_blocks(base.diffusion_model)
    state = {}
    for number, (name, place) in enumerate(names.items()):
        channels = blocks[place].attn1.to_q.in_features
        module = ImageAttention(channels, channels)
        tiny.fill(module, seed + number)
        for linear in (module.attn3.to_q, module.attn3.to_k, module.attn3.to_v, module.attn3.to_out[0]):
            linear.weight.data *= 4  # so that what is attended to shows in the result
        state |= {name + key: value.clone() for key, value in module.state_dict().items()}
    return state


def with_weights(patcher, **metadata):
    return weights.add(patcher, own_state(patcher), metadata, "tiny", "test")


def reference(seed: int, size=tiny.SIZE, tokens=7) -> Reference:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, *size, generator=generator)
    return Reference(latent, [torch.randn(1, tokens, 16, generator=generator), {}])


NEGATIVE, POSITIVE = tiny.conditioning("sd15", 1, 2), tiny.conditioning("sd15", 1, 1)


def blank(size=tiny.SIZE) -> Reference:
    return Reference(torch.full((1, 4, *size), 0.2), NEGATIVE[0])


def rule(model, references, stage=AUTO, strength=1.0, seed=5, grey=None):
    sites = weights.weights_of(model, "test").sites
    return ReferenceRule(sites, tuple(references), grey or blank(), stage, Noise(seed), strength)


def draw(model, own_rule, text=7.0, image=3.5, rows=1, steps=2, sampler="euler", size=tiny.SIZE, positive=None, schedule=None):
    """Latents [rows, 4, h, w] of a sampler through the guider; own_rule None: no references."""
    if own_rule is not None and own_rule.stage != ALONE:
        model = override.register(model, own_rule)
    guider = make_guider(model, own_rule, positive or POSITIVE, NEGATIVE, text, image)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps) if schedule is None else schedule
    start = torch.zeros(rows, 4, *size)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
    return guider.sample(noise, start, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0)


class Counter:
    """Rows of every call of the U-Net, while it is used as a context."""

    def __init__(self, model):
        self.network, self.calls = model.model.diffusion_model, []

    def __enter__(self):
        self.hook = self.network.register_forward_pre_hook(self._seen)
        return self

    def _seen(self, network, args):
        self.calls.append(len(args[0]))

    def __exit__(self, *error):
        self.hook.remove()
