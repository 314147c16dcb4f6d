"""StoryImager's trained module on a board (arXiv 2404.05979)."""

import os

import folder_paths
from comfy_api.latest import io

from ..host import families, frame_story, override
from ..host import trained_board as rules
from ..host.frame_story import KNOWN
from ..host.rule import fraction

TrainedBoard = io.Custom("STORYWEFT_TRAINED_BOARD")
CATEGORY = "Storyweft/Board"
FOLDER = "story_board"
DEMO = "demo board (comes with Storyweft)"


def _files() -> list[str]:
    return [file for file in folder_paths.get_filename_list(FOLDER) if file.lower().endswith(".safetensors")]


class LoadTrainedBoard(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadTrainedBoard",
            display_name="Load Trained Board",
            category=CATEGORY,
            description="Reads what StoryImager trains: context extractor, latent prior and LoRA of both branches. The authors "
            "published none: train one with python -m training.story_board.",
            search_aliases=["storyimager loader", "story lora"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[DEMO, *_files()],
                    tooltip="A file of models/story_board made for the family of your model, or the demo one.",
                )
            ],
            outputs=[TrainedBoard.Output("trained_board", tooltip="For Trained Board.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(FOLDER, file)
        return os.path.getmtime(path) if path else None

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        if file == DEMO:
            return io.NodeOutput(rules.load_demo())
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        return io.NodeOutput(rules.load(path, "StoryweftLoadTrainedBoard"))


class TrainedBoardBlock(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=rules.NODE_ID,
            display_name="Trained Board",
            category=CATEGORY,
            description="Draws a board as StoryImager does: each frame reads its own caption through a trained LoRA, the whole board "
            "the story that an extractor makes of all captions, and a prior helps each frame along.",
            search_aliases=["storyimager", "story visualization", "story continuation", "story completion"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2 or SDXL model the module was trained for."),
                TrainedBoard.Input("trained_board", tooltip="From Load Trained Board."),
                io.Conditioning.Input("positive", tooltip="The conditioning of Board."),
                io.Conditioning.Input("negative", tooltip="An ordinary negative prompt; every frame reads it."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of what was trained; 0 is Frame-Story Cross Attention with blend 0.",
                ),
                io.Combo.Input(
                    "known_frames",
                    options=list(KNOWN),
                    default="clean",
                    tooltip="How the model sees frames that are kept. clean: without noise, as it was trained; renoise: with as much "
                    "noise as the rest.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For the sampler."),
                io.Conditioning.Output("positive", tooltip="For the sampler."),
                io.Conditioning.Output("negative", tooltip="For the sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, trained_board, positive, negative, strength, known_frames) -> io.NodeOutput:
        node_id = rules.NODE_ID
        fraction(node_id, "strength", strength)
        family = families.find(model, node_id)
        for name, given in (("positive", positive), ("negative", negative)):
            if not given:
                raise ValueError(f"{node_id}: {name} is empty; connect a conditioning.")
        positive = frame_story.prepare(family, positive, None, node_id)
        rules.check(trained_board, family, positive)
        frame_story.check_family(family, model, positive, 0.0, node_id)
        rule = rules.TrainedBoardRule(family, trained_board, strength, known_frames == "clean")
        return io.NodeOutput(override.register(model, rule), positive, rules.negative_board(negative, positive))


folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

NODES = [LoadTrainedBoard, TrainedBoardBlock]
