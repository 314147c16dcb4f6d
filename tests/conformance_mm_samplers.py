"""Runners for golden/mm_diffusion: schedules, samplers, conditional steps, frame upsampler and preparation.

States are one tensor [B, video + audio], as ComfyUI's samplers see them. DDIM is core's own euler.
"""

from pathlib import Path

import torch
from comfy.k_diffusion.sampling import sample_euler
from conformance_consistent import read
from conformance_mm_diffusion import part, relative, unet_of_io
from storyweft.models.frame_upsampler import FrameUpsampler, upsampler_configuration
from storyweft.models.joint_media import letterbox
from storyweft.sampling.cross_guidance import Known, guided_step
from storyweft.sampling.ddpm import clean_estimate, ddpm_step, posterior
from storyweft.sampling.dpm_solver import dpm_solver_fast
from storyweft.sampling.schedule import dpm_grid, linear_betas, previous, solver_orders, solver_times, spaced_times

ALPHAS = linear_betas().neg().add(1).cumprod(0)
SR_TIME = 480


def schedule(path: Path, report) -> None:
    data, _ = read(path)

    def same(name, got, tolerance=1e-12):
        report.close(path.name, name, got, data[name], tolerance)

    def tables(alphas):
        before = previous(alphas)
        step = posterior(alphas, before)
        return {"alphas_cumprod": alphas, "betas": step.large, "posterior_variance": step.variance}, before, step

    shared, before, step = tables(ALPHAS)
    raised = torch.cat([step.variance[1:2], step.variance[1:]])
    full = {
        **shared,
        "betas": linear_betas(),
        "alphas_cumprod_prev": before,
        "posterior_mean_coef1": step.clean,
        "posterior_mean_coef2": step.here,
        "posterior_log_variance_clipped": raised.log(),
        "model_log_variance_fixed_large": torch.cat([step.variance[1:2], step.large[1:]]).log(),
    }
    for name in sorted(key for key in data if key.startswith("full.")):
        same(name, full[name.removeprefix("full.")])
    for respacing in sorted({key.split(".")[0].removeprefix("spaced_") for key in data if key.startswith("spaced_")}):
        times = torch.tensor(spaced_times(len(ALPHAS), respacing.replace("_", ",")))
        spaced = tables(ALPHAS[times])[0] | {"timestep_map": times}
        for name in sorted(key for key in data if key.startswith(f"spaced_{respacing}.")):
            same(name, spaced[name.split(".", 1)[1]])
    for count in sorted({int(key.split(".")[0].rsplit("_", 1)[1]) for key in data if key.startswith("dpm_grid_")}):
        grid = dpm_grid(count, ALPHAS)
        same(f"dpm_grid_{count}.t", (grid.times + 1) / len(ALPHAS), 1e-6)
        same(f"dpm_grid_{count}.orders", torch.tensor(grid.orders), 0)
        asked = []
        list(
            dpm_solver_fast(
                lambda x, lam, asked=asked: asked.append(lam) or x, torch.zeros(1), grid.lambdas, grid.orders
            )
        )
        same(f"dpm_grid_{count}.model_times", solver_times(torch.stack(asked), ALPHAS), 0)


class Pair:
    """Puts a clip into one row of numbers and back; video [B, F, C, H, W] as recorded."""

    def __init__(self, video, audio):
        self.shapes = video.shape[1:], audio.shape[1:]
        self.split_at = video[0].numel()

    def join(self, video, audio):
        return torch.cat([video.flatten(1), audio.flatten(1)], 1)

    def split(self, x):
        return [
            half.unflatten(1, shape)
            for half, shape in zip(x.tensor_split([self.split_at], 1), self.shapes, strict=True)
        ]


def toy(video, audio, t):
    """The closed-form model of the README; t [B]."""
    s = torch.as_tensor(t, dtype=torch.float64).to(video.dtype) / 1000
    own_video = 0.8 * video + 0.2 * audio.mean((1, 2)).tanh().view(-1, 1, 1, 1, 1)
    own_audio = 0.7 * audio + 0.3 * video.mean((1, 2, 3, 4)).tanh().view(-1, 1, 1)
    return own_video * s.cos(), own_audio * (2 * s).cos()


class Network:
    """The recorded U-Net with a table of shifts [evaluations, blocks], one row a call."""

    def __init__(self, path: Path):
        self.net = unet_of_io(path)[0].requires_grad_(False)
        self.table = []
        self.calls = 0

    def __call__(self, video, audio, t):
        shifts = self.table[self.calls % len(self.table)]
        self.calls += 1
        times = torch.full((len(video),), int(t))
        out = self.net(video.transpose(1, 2), audio, times, shifts)
        return out[0].transpose(1, 2), out[1]


class Run:
    """A model (video, audio, t) -> noise of both as the samplers want it: one tensor, lambda or sigma or alpha."""

    def __init__(self, pair: Pair, model, clip: bool = True):
        self.pair, self.model, self.clip = pair, model, clip
        self.times = []

    def noise(self, x, t):
        self.times.append(int(t))
        return self.pair.join(*self.model(*self.pair.split(x), t))

    def predict(self, x, lam):
        return self.noise(x, solver_times(lam, ALPHAS))

    def denoise(self, x, sigma, **_):
        """What core's model wrapper answers at a sigma of the table."""
        sigma = sigma[0].double()
        alpha = 1 / (1 + sigma**2)
        t = (ALPHAS - alpha).abs().argmin()
        noise = self.noise(x * alpha.sqrt().float(), t)
        clean = x - sigma.float() * noise
        return clean.clamp(-1, 1) if self.clip else clean


def solver(run: Run, x, evaluations: int):
    grid = dpm_grid(evaluations, ALPHAS)
    return list(dpm_solver_fast(run.predict, x, grid.lambdas, grid.orders))


def ddim(run: Run, x, respacing: str):
    """Core's euler over the levels of a respacing; states at unit scale after every step."""
    times = spaced_times(len(ALPHAS), respacing)[::-1]
    sigmas = torch.cat([((1 - ALPHAS[times]) / ALPHAS[times]).sqrt(), torch.zeros(1, dtype=torch.float64)])
    scale = (1 + sigmas**2).sqrt().float()
    states = []
    out = sample_euler(
        run.denoise, x * scale[0], sigmas.float(), callback=lambda state: states.append(state["x"]), disable=True
    )
    return [state / part for state, part in zip([*states[1:], out], scale[1:], strict=True)]


@torch.no_grad()
def toy_samplers(path: Path, report) -> None:
    data, _ = read(path)
    pair = Pair(data["in.video"], data["in.audio"])
    x = pair.join(data["in.video"], data["in.audio"])

    def same(name, state):
        video, audio = pair.split(state)
        relative(path, report, f"{name}.video", video, data[f"{name}.video"], 1e-4)
        relative(path, report, f"{name}.audio", audio, data[f"{name}.audio"], 1e-4)

    for count in sorted(
        {key.split(".")[0] for key in data if key.startswith("dpm") and key.split(".")[0][3:].isdigit()}
    ):
        states = solver(Run(pair, toy), x, int(count[3:]))
        if f"{count}.video" in data:
            same(count, states[-1])
        for number in range(len(solver_orders(int(count[3:])))):
            if f"{count}.{number}.video" in data:
                same(f"{count}.{number}", states[number])
    for name in sorted({key.split(".")[0] for key in data if key.split(".")[0].endswith("_defect")}):
        video, audio = pair.split(solver(Run(pair, toy), x, int(name.removeprefix("dpm").removesuffix("_defect")))[-1])
        relative(path, report, f"{name}.video", video, data[f"{name}.video"], 1e-4)
        wrong = data[f"{name}.audio"]
        report.apart(path.name, f"{name}.audio", audio / wrong.abs().max(), wrong / wrong.abs().max(), 1e-2)
    for name in sorted({key.split(".")[0] for key in data if key.startswith("ddim")}):
        states = ddim(Run(pair, toy, clip="noclip" not in name), x, name.removesuffix("_noclip"))
        if f"{name}.video" in data:
            same(name, states[-1])
        for number, state in enumerate(states):
            if f"{name}.{number}.video" in data:
                same(f"{name}.{number}", state)
    for name in sorted({key.split(".")[0] for key in data if key.startswith("ddpm")}):
        ancestral(path, report, data, pair, x, name)


def ancestral(path: Path, report, data: dict, pair: Pair, x, name: str) -> None:
    times = spaced_times(len(ALPHAS), name.removeprefix("ddpm"))[::-1]
    for number, t in enumerate(times):
        alpha, after = ALPHAS[t], ALPHAS[times[number + 1]] if number + 1 < len(times) else ALPHAS.new_tensor(1.0)
        clean = clean_estimate(x, pair.join(*toy(*pair.split(x), t)), alpha)
        noise = pair.join(data[f"{name}.{number}.noise_video"], data[f"{name}.{number}.noise_audio"])
        x = ddpm_step(x, clean, alpha, after, noise)
        video, audio = pair.split(x)
        relative(path, report, f"{name}.{number}.video", video, data[f"{name}.{number}.video"], 1e-4)
        relative(path, report, f"{name}.{number}.audio", audio, data[f"{name}.{number}.audio"], 1e-4)


@torch.no_grad()
def unet_samplers(path: Path, report) -> None:
    data, _ = read(path)
    pair = Pair(data["in.video"], data["in.audio"])
    x = pair.join(data["in.video"], data["in.audio"])
    network = Network(path)
    for name in sorted({key.split(".")[0] for key in data if key.endswith(".shifts")}):
        network.table, network.calls = data[f"{name}.shifts"].tolist(), 0
        run = Run(pair, network)
        count = len(network.table)
        state = (solver(run, x, count) if name.startswith("dpm") else ddim(run, x, name))[-1]
        report.close(path.name, f"{name}.times", torch.tensor(run.times), data[f"{name}.times"], 0)
        tolerance = 1e-4 if name.startswith("dpm") else 2e-3
        video, audio = pair.split(state)
        relative(path, report, f"{name}.video", video, data[f"{name}.video"], tolerance)
        relative(path, report, f"{name}.audio", audio, data[f"{name}.audio"], tolerance)


HALVES = {"v2a": ("video", "audio"), "a2v": ("audio", "video")}


def conditional(path: Path, report) -> None:
    data, _ = read(path)
    network = Network(path)
    network.table = [data["unet.shifts"].tolist()]
    for model, name in ((toy, "toy"), (network, "unet")):
        for way, (given, made) in HALVES.items():
            for kind in ("replace", "guided"):
                conditional_steps(path, report, data, model, f"{name}.{way}.{kind}", given, made)


def conditional_steps(path: Path, report, data: dict, model, name: str, given: str, made: str) -> None:
    """Every step from the recorded state before it."""
    times = data["timestep_map"].tolist()[::-1]
    pair = Pair(data["cond.video"], data["cond.audio"])

    def join(values):
        return pair.join(values["video"], values["audio"])

    clean, noise = ({half: data[f"{kind}.{half}"] for half in ("video", "audio")} for kind in ("cond", "noise"))
    ones = {half: torch.full_like(clean[half], half == made) for half in clean}
    known = Known(join(clean), join(noise), join(ones))
    kind, way = name.split(".")[:2]
    scale = float(data[f"class_scale.{kind}.{way}"]) / clean[given].numel() if name.endswith("guided") else 0.0
    tolerance = 1e-4 if kind == "toy" else 2e-3
    wanted = noise[made]
    for number, t in enumerate(times):
        alpha, after = ALPHAS[t], ALPHAS[times[number + 1]] if number + 1 < len(times) else ALPHAS.new_tensor(1.0)

        def estimate(x, t=t, alpha=alpha):
            return clean_estimate(x, pair.join(*model(*pair.split(x), t)), alpha)

        z = join({half: data[f"step_noise.{number}.{half}"] for half in clean})
        x = join({made: wanted, given: torch.zeros_like(clean[given])})
        with torch.no_grad():
            step = guided_step(estimate, known, x, alpha, after, z, scale)
        after_step, before = (
            dict(zip(("video", "audio"), pair.split(y), strict=True)) for y in (step.x, known.at(alpha))
        )
        wanted = data[f"{name}.{number}.{made}"]
        relative(path, report, f"{name}.{number}.{made}", after_step[made], wanted, tolerance)
        shown = before if name.endswith("guided") else after_step
        relative(path, report, f"{name}.{number}.{given}", shown[given], data[f"{name}.{number}.{given}"], tolerance)
        if step.gradient is not None:
            mean = dict(zip(("video", "audio"), pair.split(step.gradient / clean[given].numel()), strict=True))[made]
            relative(path, report, f"{name}.{number}.grad", mean, data[f"{name}.{number}.grad"], tolerance)


@torch.no_grad()
def sr(path: Path, report) -> None:
    data, _ = read(path)
    weights = part(data, "w.")
    net = FrameUpsampler(**upsampler_configuration(weights))
    net.load_state_dict(weights)
    net.train(False)
    small = data["low_res"]
    x = data["noise_one_frame"].repeat(len(small), 1, 1, 1)
    out = net(x, small, torch.full((len(small),), SR_TIME))
    relative(path, report, "out", out, data["out"], 1e-4)

    class Frames(Run):
        def noise(self, x, t):
            return net(x, small, torch.full((len(x),), int(t)))[:, :3]

    for name in sorted({key.split(".")[0] for key in data if key.startswith("ddim")}):
        states = ddim(Frames(None, None), x, name)
        for number, state in enumerate(states):
            if f"{name}.{number}" in data:
                relative(path, report, f"{name}.{number}", state, data[f"{name}.{number}"], 1e-3)


def prep(path: Path, report) -> None:
    data, _ = read(path)
    for name, antialias in (("letterbox", False), ("letterbox_antialias", True)):
        height, width = data[name].shape[-2:]
        got = letterbox(data["frames_uint8"], height, width, antialias)
        report.close(path.name, name, got, data[name], 1 / 127.5 + 1e-6)
    new_height, new_width, top, left = data["new_h_w_top_left"].tolist()
    inside = torch.full((height, width), -1.0)
    inside[top : top + new_height, left : left + new_width] = 1
    white = letterbox(torch.full_like(data["frames_uint8"], 255), height, width)[0, 0]
    report.close(path.name, "new_h_w_top_left", white, inside, 0)


RUNNERS = {
    ("mm_diffusion", name): runner
    for name, runner in {
        "schedule": schedule,
        "toy_samplers": toy_samplers,
        "unet_samplers": unet_samplers,
        "conditional": conditional,
        "sr": sr,
        "prep": prep,
    }.items()
}
RUNNERS |= {kind: runner for (_, kind), runner in RUNNERS.items()}
