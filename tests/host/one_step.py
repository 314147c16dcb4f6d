"""What a MODEL with the nodes' rules makes of given latents in one step: what trainers must train on."""

import comfy.samplers
import torch


def clean(model, x: torch.Tensor, sigma: float, positive: list, negative: list) -> torch.Tensor:
    """The clean latents that the model predicts for x = clean + sigma noise, by core's own guider without guidance."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    start = model.model.process_latent_out(x)  # the guider takes it back in; one Euler step to 0 ends at the prediction
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([sigma, 0.0])
    return model.model.process_latent_in(guider.sample(torch.zeros_like(x), start, sampler, sigmas, disable_pbar=True, seed=0))
