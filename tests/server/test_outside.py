"""Checks that other people wrote: comfy-lint, comfy-cli and nodesafe."""
import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ROOT

TOOLS = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))

ASKED_FOR = [
    ("CheckpointLoaderSimple", "ckpt_name", "sd_xl_base_1.0.safetensors"),
    ("StoryweftLoadCharacter", "file", "demo_Fox.safetensors"),
    ("StoryweftLoadImageAdapter", "file", "ip-adapter-plus_sdxl_vit-h.safetensors"),
    ("StoryweftJointAVLoader", "model_name", "Landscape.pt"),
    ("StoryweftFrameUpsamplerLoader", "model_name", "Landscape_SR.pt"),
    ("CLIPVisionLoader", "clip_name", "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"),
    ("LoadBackgroundRemovalModel", "bg_removal_name", "birefnet.safetensors"),
    ("LoadImage", "image", "example.png"),
    ("UNETLoader", "unet_name", "wan2.1_t2v_1.3B_fp16.safetensors"),
    ("CLIPLoader", "clip_name", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    ("VAELoader", "vae_name", "wan_2.1_vae.safetensors"),
    ("StoryweftStoryGenLoader", "unet_name", "storygen_storysalon_unet.bin"),
    ("CheckpointLoaderSimple", "ckpt_name", "v1-5-pruned-emaonly-fp16.safetensors"),
    ("ImageOnlyCheckpointLoader", "ckpt_name", "svd.safetensors"),
    ("ImageOnlyCheckpointLoader", "ckpt_name", "svd_xt.safetensors"),
    ("StoryweftLoadMotionPredictor", "file", "motion_predictor.safetensors"),
    ("unCLIPCheckpointLoader", "ckpt_name", "sd21-unclip-h.ckpt"),
    ("LoadAudio", "audio", "example.flac"),
    ("StoryweftLoadJointEncoder", "encoder", "imagebind_huge.pth"),
]


@pytest.fixture(scope="session")
def object_info(server, tmp_path_factory):
    """What the server says of its nodes, with the file names that example workflows ask for added to the loaders' lists."""
    info = server.get("/object_info")
    for node, field, file in ASKED_FOR:
        spec = info[node]["input"]["required"][field]
        if isinstance(spec[0], list):
            spec[0] = [*spec[0], file]
        else:
            spec[1]["options"] = [*spec[1]["options"], file]
    path = tmp_path_factory.mktemp("info") / "object_info.json"
    path.write_text(json.dumps(info))
    return path


def call(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_comfy_lint_finds_no_error(object_info, workflow):
    done = call(TOOLS / "comfy-lint", "--schema-cache", object_info, "--strict", workflow)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_comfy_cli_validates(object_info, workflow):
    done = call(TOOLS / "comfy", "--json", "--skip-prompt", "--no-enable-telemetry", "workflow", "validate", "--workflow", workflow,
                "--input", object_info)
    assert done.returncode == 0, done.stdout + done.stderr


def shipped(target: Path) -> Path:
    """A copy of what the registry would ship: tracked files that .comfyignore does not name."""
    ignored = [line.strip() for line in (ROOT / ".comfyignore").read_text().splitlines() if line.strip()]
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if not any(name.startswith(part) if part.endswith("/") else fnmatch.fnmatch(name, part) for part in ignored):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def test_nodesafe_does_not_call_the_pack_malicious(tmp_path):
    done = call(TOOLS / "nodesafe", "scan", shipped(tmp_path / "storyweft"), "--format", "json", "--fail-on", "malicious")
    assert done.returncode == 0, done.stdout[-3000:]
