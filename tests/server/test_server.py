"""The pack in a real server: workflows over HTTP, progress, previews, interrupt, refusals, a client of somebody else."""
import asyncio
import re

import av
import numpy as np
import pytest
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from PIL import Image
from serving import ROOT, RUNNABLE, api, change, node_of


def pictures(server, followed) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in files(server, followed) if path.suffix != ".mp4"]


def files(server, followed):
    return [server.base / image["type"] / image["subfolder"] / image["filename"] for image in followed.images]


def clips(server, followed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames [F, H, W, 3] and sound [channels, L] of every video that was saved."""
    found = []
    for path in files(server, followed):
        if path.suffix == ".mp4":
            with av.open(str(path)) as opened:
                frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
            with av.open(str(path)) as opened:
                sound = [frame.to_ndarray() for frame in opened.decode(audio=0)]
            found.append((np.stack(frames), np.concatenate(sound, 1)))
    return found


def story_steps(followed, at_least: int) -> list[dict]:
    return [data for data in followed.of("progress") if data["max"] >= at_least]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_workflow_runs_and_draws_pictures_that_are_not_flat(server, name):
    server.prepare(name)
    followed = server.run(api(name))
    assert followed.status == 200, followed.answer
    assert not followed.answer["node_errors"]
    assert followed.history["status"]["status_str"] == "success", followed.events[-3:]
    drawn, made = pictures(server, followed), clips(server, followed)
    assert drawn or made
    assert all(picture.std() > 15 for picture in drawn)
    for frames, sound in made:
        assert len(frames) == 16 and frames.std() > 15 and sound.std() > 1e-3


def test_progress_and_previews_arrive_while_a_story_is_drawn(server):
    followed = server.run(change(api("long_story"), "StoryweftStorySampler", seed=101, steps=20))
    steps = [data["value"] for data in story_steps(followed, 100)]
    assert steps == sorted(steps)
    assert len(set(steps)) > 50
    assert followed.previews > 5


def test_an_interrupt_ends_within_a_step_and_the_next_run_is_as_if_nothing_had_been(server):
    graph = change(api("consistent_story"), "KSampler", seed=7)
    whole = pictures(server, server.run(graph))
    other = change(api("consistent_story"), "KSampler", seed=8)
    stopped = server.run(other, stop_after=5)
    assert stopped.of("execution_interrupted")
    assert max(data["value"] for data in story_steps(stopped, 20)) <= 7     # one step, and one for the way of the message
    again = pictures(server, server.run(change(graph, "KSampler", denoise=0.9999)))     # runs anew with the very same steps
    assert len(again) == len(whole) == 5
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))


def test_panels_drawn_before_an_interrupt_are_kept(server):
    graph = change(api("long_story"), "StoryweftStorySampler", seed=202)
    stopped = server.run(graph, stop_after=24 * 4)
    assert stopped.of("execution_interrupted")
    followed = server.run(graph)
    report = followed.history["outputs"][node_of(graph, "PreviewAny")]["text"][0]
    assert "from an earlier run" in report
    assert "drew panel 12" in report


def test_a_character_is_saved_although_every_panel_is_kept_from_an_earlier_run(server):
    server.prepare("saved_character")
    saved = server.base / "models" / "storyweft_characters" / "demo_Fox.safetensors"
    saved.unlink()
    graph = change(api("long_story"), "StoryweftStorySampler", panels_at_once=2)       # so that the node runs again
    followed = server.run(graph)
    assert "kept panels 5, 6 from an earlier run" in followed.history["outputs"][node_of(graph, "PreviewAny")]["text"][0]
    assert saved.exists()


REFUSALS = [
    ("consistent_story", "StoryweftScript", {"panels": "[Nobody] in the forest"}, r"StoryweftScript: panels, line 1.*Nobody"),
    ("consistent_story", "StoryweftPanelConditioning", {"panels": "9-12"}, r"StoryweftPanelConditioning: panels.*9-12"),
    ("consistent_story", "StoryweftConsistentSelfAttention", {"start_percent": 0.9, "end_percent": 0.1},
     r"StoryweftConsistentSelfAttention: start_percent 0.9"),
    ("consistent_story", "EmptyLatentImage", {"batch_size": 2},
     r"StoryweftConsistentSelfAttention: the latent holds 2 pictures and the conditioning 4 panels"),
    ("consistent_story", "StoryweftStoryboard", {"background": "no colour"}, r"StoryweftStoryboard: background.*no colour"),
    ("long_story", "StoryweftStorySampler", {"panel_seeds": "three: 5"}, r"StoryweftStorySampler: panel_seeds .*three: 5"),
    ("subject_and_text", "StoryweftAdaptivePromptAlignment", {"alpha_text": "nan"},
     r"StoryweftAdaptivePromptAlignment: alpha_text is nan; give a finite number"),
    ("two_subjects", "EmptyLatentImage", {"width": 256}, r"StoryweftAdaptivePromptAlignment: region is 128 x 128 and the picture 256"),
    ("saved_character", "KSampler", {"steps": 5}, r"character 'Fox' was made with 24 steps .* and this run has 5"),
]


@pytest.mark.parametrize(("name", "kind", "inputs", "sentence"), REFUSALS, ids=[f"{row[1]}-{row[0]}" for row in REFUSALS])
def test_a_bad_input_gives_one_sentence_with_node_input_and_value(server, name, kind, inputs, sentence):
    server.prepare(name)
    followed = server.run(change(api(name), kind, **inputs))
    if refused := followed.answer["node_errors"]:  # when queued; outputs that do not need the node are made all the same
        assert re.search(sentence, str(refused))
        return
    assert "\n" not in followed.error
    assert re.search(sentence, followed.error), followed.error


def test_a_ratio_above_one_is_refused_by_the_server_itself(server):
    followed = server.run(change(api("consistent_story"), "StoryweftConsistentSelfAttention", sampling_ratio=1.5))
    assert followed.status == 400
    assert "sampling_ratio" in str(followed.answer["node_errors"])


def test_not_a_number_gets_past_the_server_and_is_refused_by_the_node(server):
    followed = server.run(change(api("consistent_story"), "StoryweftConsistentSelfAttention", sampling_ratio="nan"))
    assert followed.status == 200
    assert "StoryweftConsistentSelfAttention: sampling_ratio is nan; give a number from 0 to 1" in followed.error


def test_panels_drawn_before_a_failure_stay_on_disk(server):
    graph = change(api("two_characters"), "StoryweftStorySampler", seed=303)
    graph["colour"] = {"class_type": "PrimitiveString", "inputs": {"value": "no colour"}}      # typed, it would not be queued
    graph = change(graph, "StoryweftStoryboard", background=["colour", 0])
    failed = server.run(graph)
    assert "no colour" in failed.error
    assert len(list((server.base / "output" / "storyweft" / "panels").glob("*.safetensors"))) >= 8


def test_a_client_of_somebody_else_runs_the_story(server):
    client = ComfyApiWrapper(server.url + "/")
    workflow = ComfyWorkflowWrapper(str(ROOT / "workflows" / "api" / "consistent_story.json"))
    workflow.set_node_param("KSampler", "seed", 5)
    workflow.set_node_param("KSampler", "steps", 8)
    prompt_id, _ = asyncio.run(client.queue_prompt_and_wait(workflow))
    saved = client.get_history(prompt_id)[prompt_id]["outputs"][workflow.get_node_id("Save Sheet")]["images"]
    assert [client.get_image(**{"folder_type" if key == "type" else key: image[key] for key in image})[:4] for image in saved] == [
        b"\x89PNG"
    ]
