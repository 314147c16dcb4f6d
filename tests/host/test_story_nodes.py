"""The story nodes inside ComfyUI: per-panel conditioning equals single runs, refusals, and sheets with captions."""
import asyncio
import json
import logging
import math

import comfy.hooks
import comfy.sample
import comfy_extras.nodes_hooks
import execution
import pytest
import server
import tiny
import tiny_clip
import torch
from storyweft.host import fonts, prompts
from storyweft.host.sheet import Style, draw_sheet
from storyweft.host.wrapping import wrap
from storyweft.nodes.story import NODES as STORY_NODES
from storyweft.nodes.story import StoryweftPanelConditioning, StoryweftScript
from storyweft.nodes.storyboard import NODES as SHEET_NODES
from storyweft.nodes.storyboard import StoryweftStoryboard
from storyweft.story.script import parse_script

import nodes

PROMPTS = ["a fox", "a red-haired girl in a blue coat walks through the forest", "a fox"]
LONG = ["a fox", "a " + "very " * 90 + "long road", "a girl " + "and a dog " * 60]
STORY = parse_script("[Ana] a girl", "[Ana] reads # 책\n[Ana] runs\n[NC] the sea\n[Ana] sleeps", id_count=2)


def run_node(node, **inputs):
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**inputs)


def alone(clip, prompt, **options):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt, **options))


def encode(clip, texts):
    ((cond, extras),) = prompts.encode_panels(clip, texts, "Node")
    return cond, extras


@pytest.fixture(scope="module")
def sd1():
    return tiny_clip.sd1()


# --- conditioning --------------------------------------------------------------------------------------------------

def test_rows_of_clip_chunks_are_the_single_encodings_repeated(sd1):
    cond, extras = encode(sd1, LONG)
    singles = [alone(sd1, prompt)[0] for prompt in LONG]
    lengths = [single.shape[1] for single, _ in singles]
    assert len(set(lengths)) > 1 and cond.shape[1] == math.lcm(*lengths)
    for row, (single, extra) in enumerate(singles):
        assert torch.equal(cond[row:row + 1], single.repeat(1, cond.shape[1] // single.shape[1], 1))
        assert torch.equal(extras["pooled_output"][row:row + 1], extra["pooled_output"])


def test_both_encoders_and_the_pooled_vector_of_sdxl_are_stacked():
    cond, extras = encode(tiny_clip.sdxl(), LONG)
    assert cond.shape[0] == 3 and cond.shape[1] % 77 == 0 and extras["pooled_output"].shape[0] == 3


def test_masked_encoders_keep_every_real_token_and_mask_the_rest():
    for clip in (tiny_clip.ltxv(), tiny_clip.qwen_image(), tiny_clip.z_image()):
        cond, extras = encode(clip, LONG)
        assert extras["pooled_output"] is None
        for row, prompt in enumerate(LONG):
            single, extra = alone(clip, prompt)[0]
            mask = extra.get("attention_mask", torch.ones(single.shape[:2]))[0].bool()
            kept = extras["attention_mask"][row].bool()
            assert int(kept.sum()) == int(mask.sum())
            assert torch.allclose(cond[row][kept], single[0][mask], atol=1e-5)


def test_unmasked_encoders_get_what_a_longer_minimum_length_gives_them():
    clip = tiny_clip.flux()
    texts = [*LONG, "a " + "very " * 300 + "long road"]
    cond, extras = encode(clip, texts)
    assert cond.shape[1] > 256
    for row, prompt in enumerate(texts):
        options = {"tokenizer_options": {"t5xxl_min_length": cond.shape[1]}}
        single, extra = alone(clip, prompt, **options)[0]
        assert torch.allclose(cond[row:row + 1], single, atol=1e-6)
        assert torch.equal(extras["pooled_output"][row:row + 1], extra["pooled_output"])


def test_left_padding_encoders_get_zeros_in_front(monkeypatch):
    clip = tiny_clip.z_image()
    clip.tokenizer.qwen3_4b.pad_left = True
    cond, extras = encode(clip, PROMPTS)
    single, _ = alone(clip, PROMPTS[0])[0]
    extra_tokens = cond.shape[1] - single.shape[1]
    assert extra_tokens > 0 and torch.equal(cond[0, extra_tokens:], single[0])
    assert not cond[0, :extra_tokens].any() and not extras["attention_mask"][0, :extra_tokens].any()


@pytest.mark.parametrize(("name", "clip_of", "texts"), [
    ("sd15", lambda: tiny_clip.sd1(hidden_size=16), LONG),
    ("ltxv", tiny_clip.ltxv, LONG),
    ("qwen_image", tiny_clip.qwen_image, PROMPTS),
    ("flux", tiny_clip.flux, LONG),
    ("zimage", tiny_clip.z_image, ["a red fox", "a big bear", "a red fox"]),
])
def test_sampling_the_batch_equals_single_runs(name, clip_of, texts):
    patcher, clip = tiny.build(name), clip_of()
    with torch.inference_mode():
        together = sampled(patcher, prompts.encode_panels(clip, texts, "Node"), alone(clip, ""), rows=range(len(texts)))
        for row, prompt in enumerate(texts):
            single = sampled(patcher, alone(clip, prompt), alone(clip, ""), rows=[row])
            assert torch.allclose(together[row:row + 1], single, rtol=0, atol=2e-5 * float(single.abs().max()))
        assert not torch.allclose(together[0], together[1], rtol=0, atol=1e-3 * float(together.abs().max()))


def sampled(patcher, positive, negative, rows):
    name = next(name for name, family in tiny.FAMILIES.items() if isinstance(patcher.model.model_config, family.config))
    start = tiny.latent(name, 3)
    noise = comfy.sample.prepare_noise(start[:1], 5).expand_as(start)[list(rows)]
    return comfy.sample.sample(
        patcher, noise, 2, 2.0, "euler", "normal", positive, negative, start[list(rows)], disable_pbar=True, seed=5
    )


def test_scheduled_hooks_keep_one_entry_per_range(sd1):
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(1.0, 0.0))
    keyframes.add(comfy.hooks.HookKeyframe(0.5, 0.4))
    hooks.set_keyframes_on_hooks(keyframes)
    clip = comfy_extras.nodes_hooks.SetClipHooks().apply_hooks(sd1, True, True, hooks)[0]
    entries = prompts.encode_panels(clip, PROMPTS, "Node")
    assert [(e["clip_start_percent"], e["clip_end_percent"]) for _, e in entries] == [(0.0, 0.4), (0.4, 1.0)]
    assert all(cond.shape[0] == 3 and extras["hooks"] is hooks for cond, extras in entries)


def test_answers_that_cannot_share_a_batch_are_refused():
    rows = [[torch.zeros(1, 4, 2), {"ids": torch.arange(3)}], [torch.zeros(1, 4, 2), {"ids": torch.arange(1, 4)}]]
    with pytest.raises(ValueError, match="Node: this text encoder answers with 'ids'"):
        prompts._stack(rows, None, "Node")
    with pytest.raises(ValueError, match="makes 4 to 5 tokens of these prompts"):
        prompts._stack([rows[0], [torch.zeros(1, 5, 2), {}]], None, "Node")


def test_the_conditioning_is_marked_with_its_panels(sd1):
    (conditioning, count) = run_node(StoryweftPanelConditioning, clip=sd1, story=STORY, panels="4,1-2").result
    ((cond, extras),) = conditioning
    assert count == len(cond) == 3
    assert extras["storyweft_panels"] == (3, 0, 1) and extras["storyweft_story"] is STORY
    assert torch.equal(cond[1:2], alone(sd1, STORY.panels[0].prompt)[0][0])


@pytest.mark.parametrize(("change", "words"), [
    ({"clip": None}, "clip is empty"), ({"story": None}, "connect the story output"),
    ({"panels": "9"}, "panel 9 does not exist"), ({"panels": ""}, "selects none of the 4 panels"), ({"panels": "id:Zed"}, "id:Ana"),
])
def test_bad_conditioning_inputs_are_refused(sd1, change, words):
    with pytest.raises(ValueError, match=f"^StoryweftPanelConditioning: .*{words}"):
        run_node(StoryweftPanelConditioning, **{"clip": sd1, "story": STORY, "panels": "all", **change})


# --- script in the real executor -----------------------------------------------------------------------------------

class Keep:
    """Output node that keeps what it is given."""
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "test"
    kept: list = []

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"story": "STORYWEFT_STORY", "count": "INT", "preview": "STRING", "rows": "CONDITIONING", "sheet": "IMAGE"}
        return {"optional": {name: (kind,) for name, kind in kinds.items()}}

    def keep(self, **inputs):
        self.kept.append(inputs)
        return {}


class Clip:
    """Loader of the tiny text encoder."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (tiny_clip.sd1(),)


class Page:
    """What the executor and the node need of a server."""
    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sockets_metadata, self.shown = {}, []

    def send_sync(self, *event):
        pass

    def send_progress_text(self, text, node_id):
        self.shown.append((node_id, text))
def execute(monkeypatch, prompt):
    page = Page()
    for node in (*STORY_NODES, *SHEET_NODES, Keep, Clip):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in prompt.items()}
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and not node_errors, (error, node_errors)
    options = {"lru": 0, "ram": 0, "ram_inactive": 0}
    executor = execution.PromptExecutor(page, cache_type=execution.CacheType.CLASSIC, cache_args=options)
    executor.execute(prompt, "id", {}, outputs)
    return executor, page


def script_graph(**inputs):
    links = {"story": ["1", 0], "count": ["1", 1], "preview": ["1", 2]}
    return {"1": ("StoryweftScript", inputs), "2": ("Keep", links)}


def test_the_script_node_runs_in_the_executor_and_shows_its_parse(monkeypatch):
    graph = script_graph(characters="[하나] 소녀", panels="[하나] 달린다 # 🏃 <b>", id_panels=1)
    executor, page = execute(monkeypatch, graph)
    assert executor.success, executor.status_messages[-1]
    kept = Keep.kept[-1]
    assert kept["count"] == 1 and kept["story"].panels[0].caption == "🏃 <b>"
    assert page.shown == [("1", kept["preview"].replace("<b>", "&lt;b&gt;"))] and "[하나] 소녀" in kept["preview"]


def test_a_refusal_is_the_same_sentence_in_the_queue_and_in_the_run():
    given = {"characters": "[Ana] a girl", "panels": "[Zed] runs", "id_panels": 1}
    sentence = (
        "StoryweftScript: panels, line 1, '[Zed] runs': the tag [Zed] is unknown; known are [Ana], [NC]; define it in "
        "characters or correct it"
    )
    assert StoryweftScript.validate_inputs(**given) == sentence
    with pytest.raises(ValueError) as refused:
        StoryweftScript.execute(**given)
    assert str(refused.value) == sentence


def test_all_three_nodes_run_in_one_graph(monkeypatch):
    sheet = {
        "layout": "comic", "columns": 0, "caption_position": "over", "font_size": 0, "gap": 4, "background": "white",
    }
    executor, _ = execute(monkeypatch, {
        "1": ("StoryweftScript", {"characters": "", "panels": "a fox\na bear # 곰", "id_panels": 4}),
        "2": ("Clip", {}),
        "3": ("StoryweftPanelConditioning", {"clip": ["2", 0], "story": ["1", 0], "panels": "2,1"}),
        "4": ("EmptyImage", {"width": 64, "height": 64, "batch_size": ["3", 1], "color": 0}),
        "5": ("StoryweftStoryboard", {"images": ["4", 0], "story": ["1", 0], **sheet}),
        "6": ("Keep", {"rows": ["3", 0], "sheet": ["5", 0], "count": ["3", 1]}),
    })
    assert executor.success, executor.status_messages[-1]
    kept = Keep.kept[-1]
    assert kept["rows"][0][1]["storyweft_panels"] == (1, 0) and kept["sheet"].shape == (1, 72, 140, 3)


def test_without_a_page_the_script_node_still_runs(monkeypatch):
    monkeypatch.delattr(server.PromptServer, "instance", raising=False)
    assert run_node(StoryweftScript, characters="", panels="a fox", id_panels=4).result[1] == 1
    with pytest.raises(ValueError, match="^StoryweftScript: panels: is empty"):
        run_node(StoryweftScript, characters="", panels=" ", id_panels=4)


@pytest.mark.parametrize("node", [*STORY_NODES, *SHEET_NODES], ids=lambda node: node.__name__)
def test_every_input_and_output_has_a_tooltip_page_and_translation(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__ and schema.category.startswith("Storyweft/")
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    root = fonts.FONTS.parent
    assert (root / "web/docs" / f"{schema.node_id}.md").is_file()
    assert (root / "web/docs" / schema.node_id / "ko.md").is_file()
    for language in ("en", "ko"):
        texts = json.loads((root / "locales" / language / "nodeDefs.json").read_text())[schema.node_id]
        assert set(texts["inputs"]) == {part.id for part in schema.inputs}
        assert set(texts["outputs"]) == {str(place) for place in range(len(schema.outputs))}


# --- sheets --------------------------------------------------------------------------------------------------------

def pictures(count, height=64, width=96):
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(count, height, width, 3)


def sheet(images, **changes):
    inputs = {
        "layout": "grid", "columns": 0, "caption_position": "below", "font_size": 0, "gap": 4, "background": "#102030",
    }
    return run_node(StoryweftStoryboard, images=images, **{**inputs, **changes}).result[0]


def test_a_grid_without_captions_holds_every_picture_unchanged():
    out = sheet(pictures(4), caption_position="none")
    assert out.shape == (1, 2 * 64 + 3 * 4, 2 * 96 + 3 * 4, 3)
    assert torch.allclose(out[0, 0, 0], torch.tensor([16.0, 32.0, 48.0]) / 255)
    for place, value in enumerate(pictures(4)[:, 0, 0, 0]):
        top, left = 4 + (place // 2) * 68, 4 + (place % 2) * 100
        assert torch.allclose(out[0, top:top + 64, left:left + 96], value.round(decimals=2), atol=0.01)


@pytest.mark.parametrize(("layout", "columns", "count", "size"), [
    ("grid", 3, 5, (2, 3)), ("strip", 0, 5, (1, 5)), ("strip", 1, 5, (5, 1)), ("grid", 9, 2, (1, 2)),
    ("grid", 0, 1, (1, 1)),
])
def test_columns_and_strips(layout, columns, count, size):
    out = sheet(pictures(count), layout=layout, columns=columns)
    assert out.shape[1:3] == (size[0] * 68 + 4, size[1] * 100 + 4)


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("position", ["below", "over", "none"])
def test_comic_pages_of_any_length(count, position):
    out = sheet(pictures(count), layout="comic", caption_position=position, captions="\n".join(["말풍선 text"] * count))
    assert out.shape[2] == 2 * 96 + 3 * 4 and torch.isfinite(out).all()


def test_captions_come_from_the_story_or_from_the_typed_lines():
    told = sheet(pictures(4), story=STORY)
    assert told.shape[1] > sheet(pictures(4)).shape[1]
    typed = sheet(pictures(4), story=STORY, captions="책\nAna runs\nthe sea\nAna sleeps")
    assert torch.equal(told, typed)
    assert not torch.equal(told, sheet(pictures(4), captions="책\n\n\n"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"story": STORY}, "images holds 3 pictures and the story 4 panels"),
    ({"captions": "one\ntwo"}, "images holds 3 pictures and captions 2 lines"),
    ({"background": "very red"}, "background 'very red' is no colour"),
    ({"background": "#12\0"}, "is no colour"),
    ({"story": "text"}, "connect the story output"),
    ({"font_size": 512, "captions": "\n".join(["word " * 4000] * 3)}, "use fewer or smaller pictures"),
])
def test_bad_sheet_inputs_are_refused(changes, words):
    with pytest.raises(ValueError, match=f"^StoryweftStoryboard: .*{words}"):
        sheet(pictures(3), **changes)


def test_no_picture_is_refused_and_bad_values_become_black():
    with pytest.raises(ValueError, match="images holds no picture"):
        sheet(pictures(1)[:0])
    bad = torch.full((1, 8, 8, 1), float("nan"))
    assert not sheet(bad, gap=0).any()


def test_every_script_finds_a_bundled_font_and_marks_no_ink_twice():
    found = {text: path for path, text in fonts.runs("Ana책読📖")}
    assert found == {
        "Ana책": fonts.TEXT_FONTS[0], "読": fonts.TEXT_FONTS[1], "📖": fonts.EMOJI_FONT,
    }
    assert fonts.runs("👩🏽‍🚀☀️") == [(fonts.EMOJI_FONT, "👩☀")]
    assert fonts.runs("a\0\u202eb\t") == [(fonts.TEXT_FONTS[0], "ab")]


@pytest.mark.parametrize("text", [
    "Ana", "빨간 머리 소녀", "彼女は「冒険」へ", "🦊🐻", "<script>alert(1)</script>", "مرحبا שלום", "é à ﷽", "ไทย हिन्दी",
    "\U000e0041x", "𝒳",
])
def test_any_text_is_drawn_as_itself(text):
    blank = draw_sheet([fonts.Image.new("RGB", (200, 40))], [""], Style())
    drawn = draw_sheet([fonts.Image.new("RGB", (200, 40))], [text], Style())
    lower = drawn.crop((0, blank.height, drawn.width, drawn.height))
    assert len(lower.getcolors(100_000)) > 1


def test_a_character_no_font_has_is_a_box_and_reported_once(caplog, monkeypatch):
    fonts.font_for.cache_clear()
    monkeypatch.setattr(fonts, "system_fonts", tuple)
    with caplog.at_level(logging.WARNING):
        assert fonts.runs("ក") == fonts.runs("ក") == [(fonts.TEXT_FONTS[0], "ក")]
    assert caplog.text.count("no font has") == 1
    assert fonts.ImageFont.truetype(fonts.TEXT_FONTS[0], 32).getmask("ក").getbbox() is not None
    fonts.font_for.cache_clear()


def test_broken_font_files_cover_nothing(tmp_path):
    broken = {"a.ttf": b"", "b.ttf": b"text, not a font, at all", "c.ttf": b"\0\1\0\0\0\xff" + bytes(40)}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        assert fonts.coverage(str(tmp_path / name)) == ([], [])


def test_coverage_is_what_the_font_draws():
    for path in fonts.TEXT_FONTS:
        font = fonts.ImageFont.truetype(path, 32)
        missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
        for code in (*range(0x21, 0x7F), *range(0xAC00, 0xAD00), *range(0x4E00, 0x4F00), *range(0x3041, 0x3097)):
            if fonts._has(path, code):
                mask = font.getmask(chr(code))
                assert (mask.getbbox(), bytes(mask)) != missing, hex(code)


# --- line breaks ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "width", "lines"), [
    ("a fox in the snow", 8, ["a fox in", "the snow"]),
    ("하나는 숲속을 걷는다", 6, ["하나는", "숲속을", "걷는다"]),
    ("彼女は行く。湖は広い", 5, ["彼女は行", "く。湖は広", "い"]),
    ("「本」を読む", 3, ["「本」", "を読む"]),
    ("abcdefgh ij", 3, ["abc", "def", "gh", "ij"]),
    ("🦊🐻🐰", 2, ["🦊🐻", "🐰"]),
    ("", 5, []), ("   ", 5, []), ("ab", 0, ["a", "b"]),
])
def test_line_breaks(text, width, lines):
    assert wrap(text, width, len) == lines


def test_no_character_of_a_long_caption_is_lost():
    text = "책을 읽는다。「本」を読むのは楽しい reading is fun🦊 " * 20
    assert "".join("".join(wrap(text, 11, len)).split()) == "".join(text.split())
