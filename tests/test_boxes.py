"""Boxes over time: text forms, interpolation, language models' plans, other nodes' boxes, and what is refused."""

import json

import pytest
from storyweft.story import box_sources
from storyweft.story.box_plan import ask, complete_prompt, read_answer, read_boxes
from storyweft.story.box_text import parse_boxes, write_boxes
from storyweft.story.boxes import Box, BoxError, BoxPlan, BoxTrack, Key, KeyedObject, TrackedObject, keys_of, make_track

CANVAS = (512, 320)


def corners(track: BoxTrack, number: int = 0) -> list:
    return [(box.x0, box.y0, box.x1, box.y1) if box else None for box in track.objects[number].boxes]


def near(boxes) -> list:
    return [pytest.approx(box, abs=1e-9) if box else None for box in boxes]


def plan_of(*keys: Key) -> BoxPlan:
    return BoxPlan((KeyedObject("fox", "fox", keys),))


# --- text ------------------------------------------------------------------------------------------------------------

JSON_TEXT = """{"canvas": [512, 320], "fps": 8, "background": "a forest", "objects": [
  {"id": "a", "words": "a red fox", "keyframes": [{"t": 0, "box": [0, 160, 128, 320]}, {"frame": 9, "box": null}]},
  {"id": 7, "words": "an owl", "keyframes": [{"t": 1, "box": [256, 0, 512, 32]}]}]}"""
LINES = """// two animals
canvas: 512, 320
a = a red fox | 0: 0 160 128 320 | f9: -

7 = an owl | 1: [256, 0, 512, 32]
background: a forest
"""


def test_both_forms_say_the_same_and_pixels_become_parts_of_the_canvas():
    plan = parse_boxes(JSON_TEXT)
    assert plan.objects == (
        KeyedObject("a", "a red fox", (Key((0, 0.5, 0.25, 1), t=0.0), Key(None, frame=9))),
        KeyedObject("7", "an owl", (Key((0.5, 0, 1, 0.1), t=1.0),)),
    )
    assert (plan.canvas, plan.fps, plan.background) == ((512, 320), 8, "a forest")
    lines = parse_boxes(LINES)
    assert (lines.objects, lines.canvas, lines.background) == (plan.objects, plan.canvas, plan.background)


@pytest.mark.parametrize("text", [JSON_TEXT, LINES, "여우 | 0: 0.1 0.2 0.3 0.4 | 1: .5 .5 1.2 .9"])
def test_what_is_written_is_read_back(text):
    plan = parse_boxes(text)
    assert parse_boxes(write_boxes(plan)) == plan
    assert json.loads(write_boxes(plan))["objects"][0]["words"] == plan.objects[0].words


def test_pixels_without_a_canvas_of_their_own_take_the_nodes():
    (item,) = parse_boxes("fox | 0: 51.2 32 256 320", CANVAS).objects
    assert item.keys[0].corners == pytest.approx((0.1, 0.1, 0.5, 1))


def test_the_same_words_on_two_lines_are_two_objects():
    plan = parse_boxes("fox | 0: 0 0 .1 .1\nfox | 0: .5 .5 1 1")
    assert [(item.id, item.words) for item in plan.objects] == [("fox", "fox"), ("fox 2", "fox")]


def obj(**change) -> str:
    key = {"t": 0, "box": [0.1, 0.1, 0.5, 0.5]} | change.pop("key", {})
    item = {"id": "fox", "words": "fox", "keyframes": [{name: value for name, value in key.items() if value != "drop"}]}
    return json.dumps({"objects": [item | change.pop("item", {})]} | change)


@pytest.mark.parametrize(("text", "says"), [
    ("", "there is no object"),
    ("background: a forest", "there is no object"),
    ("fox", "line 1: 'fox' is no object"),
    ("fox | 0 0 1 1", "has no time"),
    ("fox | 0: 0.1 0.1 0.5", "'0.1 0.1 0.5' is no box"),
    ("fox | 0: a b c d", "'a b c d' is no box"),
    ("fox | 1.5: 0 0 1 1", "t must lie between 0 and 1, not 1.5"),
    ("fox | -0.5: 0 0 1 1", "t must lie between 0 and 1, not -0.5"),
    ("fox | now: 0 0 1 1", "t must lie between 0 and 1, not 'now'"),
    ("canvas: 0 512\nfox | 0: 0 0 1 1", "canvas must be"),
    ("fox | 0: 0.5 0.1 0.2 0.9", r"box \[0.5, 0.1, 0.2, 0.9\] must run from left to right"),
    ("fox | 0: 0.1 0.1 0.1 0.9", "must run from left to right"),
    ("fox | 0: 1.1 0 1.5 1", r"box \[1.1, 0, 1.5, 1\] lies outside the picture; write null"),
    ("fox | 0: 10 10 200 200", "boxes are in pixels .200.; name the canvas"),
    ("fox | 0: 0 0 1e400 1", "no number"),
    ("canvas: 512 512\nfox | 0: 0.1 0.1 300 300", "is in parts of the picture and others are in pixels"),
    ("canvas: 512 512\nfox | 0: 0 0 300 300 | 1: 0 0 1 1", "key frame 2: box .* in parts of the picture and others are in pixels"),
    ("a = x | 0: 0 0 1 1\na = y | 0: 0 0 1 1", "two objects have the id 'a'"),
    (" = y | 0: 0 0 1 1", "empty id"),
    ("fox | 0: 0 0 1 1\0", "NUL"),
    ("fox" * 200_000, "the limit is"),
    ("{", "the JSON cannot be read"),
    ('{"objects":' + "[" * 100_000, "nested too deeply"),
    ("[1]", "'.1.' is no object"),
    ('{"objects": {}}', "objects must be a list"),
    ('{"objects": [], "frames": 3}', "'frames' is unknown; known are canvas"),
    (obj(item={"boxes": []}), "object 1: 'boxes' is unknown"),
    (obj(item={"words": 3}), "words must be text, not 3"),
    (obj(item={"keyframes": []}), "keyframes must be a list of 1 to"),
    (obj(key={"t": "drop"}), "needs t .0 to 1. or frame"),
    (obj(key={"frame": 2}), "needs t .0 to 1. or frame"),
    (obj(key={"t": True}), "t must lie between 0 and 1, not True"),
    (obj(key={"t": "drop", "frame": 1.5}), "frame must be a whole number from 0, not 1.5"),
    (obj(key={"t": "drop", "frame": -1}), "frame must be a whole number from 0, not -1"),
    (obj(key={"box": "drop"}), "has no box; write null"),
    (obj(key={"box": [1, 2, 3]}), "box must be .x0, y0, x1, y1. or null"),
    (obj(key={"box": ["0", 0, 1, 1]}), "box must be .x0, y0, x1, y1. or null"),
    (obj(key={"box": [0, 0, float("nan"), 1]}), "holds a value that is no number"),
    (obj(fps=0), "fps must be a number above 0"),
    (obj(canvas=[512]), "canvas must be"),
    ("\n".join(f"o{n} | 0: 0 0 1 1" for n in range(101)), "101 objects, the limit is 100"),
])
def test_a_text_that_cannot_be_used_is_refused_with_its_value(text, says):
    with pytest.raises(BoxError, match=says):
        parse_boxes(text)


# --- from key frames to frames ---------------------------------------------------------------------------------------

LEFT, RIGHT = (0.0, 0.4, 0.2, 0.8), (0.8, 0.4, 1.0, 0.8)


def test_linear_motion_is_linear_and_held_outside_the_key_frames():
    track = make_track(plan_of(Key(LEFT, t=0.2), Key(RIGHT, t=0.6)), 11)
    shares = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [box[0] for box in corners(track)] == pytest.approx([0.8 * share for share in shares])
    assert all(box[2] - box[0] == pytest.approx(0.2) and box[1::2] == (0.4, 0.8) for box in corners(track))


def test_time_counts_from_the_first_to_the_last_frame_and_frames_from_zero():
    by_time = make_track(plan_of(Key(LEFT, t=0.0), Key(RIGHT, t=1.0)), 16)
    by_frame = make_track(plan_of(Key(RIGHT, frame=15), Key(LEFT, frame=0)), 16)
    assert by_time == by_frame
    assert corners(by_time)[0] == LEFT and corners(by_time)[15] == RIGHT


def test_a_time_of_four_decimals_hits_its_frame():
    for frame in range(24):
        track = make_track(plan_of(Key(LEFT, t=0.0), Key(None, t=round(max(frame, 1) / 23, 4))), 24)
        assert [box is None for box in corners(track)] == [place >= max(frame, 1) for place in range(24)]


def test_one_frame_takes_the_first_time():
    assert corners(make_track(plan_of(Key(LEFT, t=0.0), Key(RIGHT, t=1.0)), 1)) == [LEFT]


@pytest.mark.parametrize("interpolation", ["linear", "smooth"])
def test_absent_from_null_to_the_next_key_frame_with_the_last_box_held_before(interpolation):
    keys = (Key(None, t=0.0), Key(LEFT, t=0.1), Key(RIGHT, t=0.3), Key(None, t=0.5), Key(LEFT, t=0.8))
    track = make_track(plan_of(*keys), 11, interpolation)
    middle = (0.4, 0.4, 0.6, 0.8)
    assert corners(track) == near([None, LEFT, middle, RIGHT, RIGHT, None, None, None, LEFT, LEFT, LEFT])


def test_smooth_motion_passes_every_key_frame_without_overshoot_and_without_corners():
    values = [0.0, 0.1, 0.5, 0.55, 0.2]
    keys = [Key((x, 0.1, x + 0.2 + x / 4, 0.5), frame=10 * place) for place, x in enumerate(values)]
    smooth, linear = (make_track(plan_of(*keys), 41, kind) for kind in ("smooth", "linear"))
    xs = [box[0] + box[2] for box in corners(smooth)]
    for place, key in enumerate(keys):
        assert corners(smooth)[10 * place] == pytest.approx(key.corners)
    for place in range(4):
        part = xs[10 * place : 10 * place + 11]
        assert part == sorted(part, reverse=values[place + 1] < values[place])
    jumps = [abs(xs[f + 1] - 2 * xs[f] + xs[f - 1]) for f in (10, 20)]
    straight = [box[0] + box[2] for box in corners(linear)]
    assert all(jump < 0.5 * abs(straight[f + 1] - 2 * straight[f] + straight[f - 1]) for jump, f in zip(jumps, (10, 20), strict=True))


def test_smooth_slopes_are_the_weighted_harmonic_mean():
    """The first half-way box of keys at frames 0, 2 and 6 with x 0, 1 and 2 (in tenths): Hermite form by hand, with the
    side's own slope at the first key and (10 + 8) / (10 / (1/2) + 8 / (1/4)) at the second."""
    keys = [Key((x / 10, 0.0, x / 10 + 0.1, 0.1), frame=frame) for frame, x in ((0, 0), (2, 1), (6, 2))]
    box = corners(make_track(plan_of(*keys), 7, "smooth"))[1]
    slope = (10 + 8) / (10 / 0.5 + 8 / 0.25) * 2    # over the first side's two frames
    expected = 0 + 0.5 * (1 + 0.5 * (3 - 2 - slope + 0.5 * (1 + slope - 2)))
    assert box[0] * 10 == pytest.approx(expected)


def test_boxes_are_cut_at_the_edges_after_interpolation():
    track = make_track(plan_of(Key((-0.3, 0.2, 0.1, 0.6), t=0.0), Key((0.9, 0.2, 1.3, 0.6), t=1.0)), 3)
    assert corners(track) == near([(0, 0.2, 0.1, 0.6), (0.3, 0.2, 0.7, 0.6), (0.9, 0.2, 1, 0.6)])


@pytest.mark.parametrize(("keys", "frames", "says"), [
    ((Key(LEFT, frame=16),), 16, "object 'fox': key frame at frame 16, but the frames are 0 to 15"),
    ((Key(LEFT, frame=5), Key(RIGHT, t=1 / 3)), 16, "two key frames at frame 5"),
    ((Key(None, t=0.0),), 16, "absent in all 16 frames"),
    ((Key(LEFT, t=0.5), Key(None, t=0.0)), 1, "absent in all 1 frames"),
    ((), 16, "has no key frame"),
    ((Key(LEFT, t=0.0),), 0, "frames must be a whole number from 1"),
    ((Key(LEFT, t=0.0),), 10_001, "not 10001"),
])
def test_key_frames_that_do_not_fit_are_refused(keys, frames, says):
    with pytest.raises(BoxError, match=says):
        make_track(plan_of(*keys), frames)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(BoxError, match="interpolation 'cubic' is unknown"):
        make_track(plan_of(Key(LEFT, t=0.0)), 4, "cubic")


@pytest.mark.parametrize("values", [(0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, float("nan"), 1, 1)])
def test_a_box_lies_inside_the_picture(values):
    with pytest.raises(BoxError, match="no box inside the picture"):
        Box(*values)


def test_a_track_holds_one_box_per_frame():
    with pytest.raises(BoxError, match="has 1 boxes for 2 frames"):
        BoxTrack(2, (TrackedObject("fox", "fox", (Box(0, 0, 1, 1),)),))
    with pytest.raises(BoxError, match="no object"):
        BoxTrack(2, ())


def test_the_description_names_frames_areas_and_what_rarely_works():
    text = make_track(parse_boxes("fox | 0: 0 0 .1 .1 | f3: -\nsea | 0: 0 0 1 .8"), 6).describe()
    assert "fox: frames 0-2, 1% of the picture; small" in text and "sea: frames 0-5, 80% of the picture; large" in text


# --- language models -------------------------------------------------------------------------------------------------

GOOD = """Reasoning: The bear walks to the right, the ball rolls away.
Frame 1: [{'id': 0, 'name': 'a brown bear', 'box': [0, 160, 128, 160]}, {'id': 1, 'name': "a dog's ball", 'box': [256, 240, 64, 64]}]
Frame 2: [{'id': 0, 'name': 'a brown bear', 'box': [128, 160, 128, 160]}, {'id': 1, 'name': "a dog's ball", 'box': [384, 240, 64, 64]}]
Frame 3: [{'id': 0, 'name': 'a brown bear', 'box': [256, 160, 128, 160]}]
Background keyword: forest
"""


def test_a_clean_answer_is_read_without_a_note():
    plan, notes = read_answer(GOOD, CANVAS)
    assert notes == [] and plan.background == "forest"
    bear, ball = plan.objects
    assert bear.words == "a brown bear"
    assert [(key.t, key.corners) for key in bear.keys] == [(0, (0, 0.5, 0.25, 1)), (0.5, (0.25, 0.5, 0.5, 1)), (1, (0.5, 0.5, 0.75, 1))]
    assert ball.words == "a dog's ball" and ball.keys[-1] == Key(None, t=1.0)
    assert parse_boxes(write_boxes(plan)) == plan


@pytest.mark.parametrize("change", [
    lambda text: text.replace("'", '"').replace('dog"s', "dog's"),
    lambda text: "<think>\nFrame 1: [{'id': 9, 'name': 'nobody', 'box': [0, 0, 9, 9]}]\n</think>\n" + text,
    lambda text: text.replace("Frame 1:", "**Frame 1:**").replace("Frame 2:", "- frame 2 :"),
    lambda text: text.replace("[{", "[\n  {").replace("}, {", "},\n  {"),
    lambda text: "```\n" + text + "```",
    lambda text: text.replace("\n", "\r\n"),
])
def test_the_manners_of_models_do_not_matter(change):
    changed, notes = read_answer(change(GOOD), CANVAS)
    assert notes == [] and changed == read_answer(GOOD, CANVAS)[0]


def test_boxes_in_parts_of_the_picture_are_read_as_such():
    answer = "Frame 1: [{'id': 0, 'name': 'fox', 'box': [0.1, 0.2, 0.3, 0.4]}]\nBackground keyword: sea"
    (fox,) = read_answer(answer, CANVAS)[0].objects
    assert fox.keys[0].corners == pytest.approx((0.1, 0.2, 0.4, 0.6))


def frames(*entries: str) -> str:
    return "\n".join(f"Frame {n}: [{entry}]" for n, entry in enumerate(entries, 1)) + "\nBackground keyword: sea"


def entry(name="'fox'", box="[0, 0, 100, 100]", **more) -> str:
    fields = {"id": "0", "name": name, "box": box} | more
    return "{" + ", ".join(f"'{key}': {value}" for key, value in fields.items() if value is not None) + "}"


@pytest.mark.parametrize(("answer", "says", "ids"), [
    (frames(entry(), entry(id=None)), "Frame 2: 'fox' has no id; taken as id 0.", ["fox"]),
    (frames(entry(), entry(id="3")), "Frame 2: 'fox' has the id 3; taken as id 0.", ["fox"]),
    (frames(entry("'a red fox'"), entry("'fox'")), "Frame 2: id 0 is now called 'fox'; it stays 'a red fox'.", ["a red fox"]),
    (frames(entry("'a fox'"), entry("'a car'")), "Frame 2: 'a car' has the id 0 of 'a fox'; taken as another object.", ["a fox", "a car"]),
    (frames(entry("'fox'") + "," + entry("'fox'", "[300, 0, 50, 50]")), "the id 0 of 'fox'; taken as another", ["fox", "fox 2"]),
    (frames(entry(), entry(box="[500, 0, 100, 100]")), "box [500, 0, 100, 100] leaves the picture; cut at its edge", ["fox"]),
    (frames(entry(), entry(box="[600, 0, 100, 100]")), "lies outside the picture; absent there", ["fox"]),
    (frames(entry(), entry(box="[10, 0, 0, 100]")), "has no size; absent there", ["fox"]),
    (frames(entry(), entry(box="[10, 0, 100]")), "has no box of four numbers; left out", ["fox"]),
    (frames(entry(), entry(name=None, id="8")), "has no name; left out", ["fox"]),
    (
        frames(entry() + "," + entry("'car'", "[50, 50, 100, 100]", id="1")),
        "'fox' and 'car' overlap in frame 1; 'car' lies on top", ["fox", "car"],
    ),
    (frames(entry(), entry()).replace("Frame 2", "Frame 4"), "Missing frames: 2, 3; boxes there are interpolated", ["fox"]),
    (frames(entry()).replace("Background keyword: sea", ""), "There is no background keyword", ["fox"]),
    (frames(entry(), entry()) + "\n\nFrame 1: [" + entry("'x'") + "]", "Frame 1 comes again after Frame 2", ["fox"]),
    (frames(entry()) + "\nFrame 2: [{'id': 0, 'name': 'fox', 'box': [1, 2,", "Frame 2: unfinished entries left out: 1.", ["fox"]),
    (frames(entry()) + "\nFrame 2: same as before", "no list of boxes in 'same as before'", ["fox"]),
    (frames(entry(), entry("'owl'", "[600, 0, 9, 9]", id="1")), "'owl' is in no frame; left out", ["fox"]),
])
def test_what_is_mended_is_reported(answer, says, ids):
    plan, notes = read_answer(answer, (512, 512))
    assert any(says in note for note in notes), notes
    assert [item.id for item in plan.objects] == ids


def test_an_empty_list_is_an_empty_frame_and_an_unreadable_one_is_not():
    empty, _ = read_answer(frames(entry(), "", entry()), CANVAS)
    assert corners(make_track(empty, 3))[1] is None
    broken, _ = read_answer(frames(entry(), "oops", entry()), CANVAS)
    assert corners(make_track(broken, 3))[1] is not None


def test_an_answer_in_json_is_read():
    plan, notes = read_answer(f"Here you are:\n```json\n{JSON_TEXT}\n```", CANVAS)
    assert plan == parse_boxes(JSON_TEXT) and notes == []


@pytest.mark.parametrize(("answer", "says"), [
    ("", "holds no line 'Frame 1: "),
    ("I am sorry, I cannot do that.", "it begins with 'I am sorry, I cannot do that.'"),
    ("Frame 1: []", "there is no object"),
    ("Frame 1: nothing", "there is no object"),
    ("\n".join(f"Frame {n}: []" for n in range(1, 300)), "299 key frames, the limit is 200"),
    (frames(*(entry(f"'thing{n}'", id=str(n)) for n in range(150))), "more than 100 objects"),
    ("x" * 600_000, "the limit is"),
])
def test_an_answer_without_a_plan_is_refused(answer, says):
    with pytest.raises(BoxError, match=says):
        read_answer(answer, CANVAS)


def test_hostile_texts_are_read_in_no_time():
    """Each of these takes minutes where a pattern backtracks or a name is looked up in a list of all names."""
    size = 500_000
    for text in ("\n" * size, " " * size, "{" * size, "{" + "a" * size + "}", "'" * size, "frame" * (size // 5), "a|0:0 0 1 1\n" * 40_000):
        for body in (text, "Frame 1: [" + text + "]"):
            with pytest.raises(BoxError):
                read_boxes(body, CANVAS)


def test_the_box_tracks_text_reads_a_models_lines_too():
    assert read_boxes(GOOD, CANVAS) == read_answer(GOOD, CANVAS)
    assert read_boxes(LINES, CANVAS) == (parse_boxes(LINES), [])


def test_the_question_names_scene_sizes_and_the_form_it_wants_back():
    text = ask(" A fox  runs. ", 16, CANVAS, 4)
    assert text.rstrip().endswith("Caption: A fox runs.")
    assert "4 key frames, 512 x 320" in text and "over the 16 frames" in text and "Background keyword:" in text
    example = text[text.index("Frame 1:") : text.index("Now,")]
    plan, notes = read_answer(example, CANVAS)
    assert notes == [] and [item.words for item in plan.objects] == ["a boat", "a gull"]


@pytest.mark.parametrize(("scene", "keys", "says"), [(" ", 4, "no scene"), ("a fox", 17, "17 key frames are more than the 16 frames")])
def test_a_question_that_makes_no_sense_is_refused(scene, keys, says):
    with pytest.raises(BoxError, match=says):
        ask(scene, 16, CANVAS, keys)


def test_the_prompt_names_everything_that_is_planned():
    plan, _ = read_answer(GOOD, CANVAS)
    assert complete_prompt("A brown bear plays.", plan) == "A brown bear plays. | a dog's ball, forest background"
    assert complete_prompt("A brown bear and a dog's ball", BoxPlan(plan.objects)) == "A brown bear and a dog's ball"


# --- other nodes' boxes ----------------------------------------------------------------------------------------------

def pixel_box(x, y, width, height, **more) -> dict:
    return {"x": x, "y": y, "width": width, "height": height, **more}


def test_one_box_or_a_list_holds_in_all_frames():
    one = box_sources.from_bounding_boxes(pixel_box(128, 80, 128, 160), 16, CANVAS)
    assert one == [("", (Key((0.25, 0.25, 0.5, 0.75), frame=0),))]
    two = box_sources.from_bounding_boxes([pixel_box(0, 0, 256, 320), pixel_box(256, 0, 256, 320)], 16, CANVAS)
    assert [keys[0].corners for _, keys in two] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]


def test_lists_per_frame_follow_labels_and_leave_gaps_absent():
    cat, dog = pixel_box(0, 0, 256, 160, label="cat", score=0.9), pixel_box(256, 160, 256, 160, label="dog")
    found = box_sources.from_bounding_boxes([[cat, dog], [dog], [dog, cat]], 3, CANVAS)
    plan = BoxPlan(tuple(box_sources.named(found, "box", [], set())))
    track = make_track(plan, 3)
    assert [item.words for item in track.objects] == ["cat", "dog"]
    assert corners(track, 0) == [(0, 0, 0.5, 0.5), None, (0, 0, 0.5, 0.5)]
    assert corners(track, 1) == [(0.5, 0.5, 1, 1)] * 3


def test_extents_keep_every_frame():
    boxes = [None, LEFT, LEFT, LEFT, RIGHT, None]
    ((_, keys),) = box_sources.from_extents(boxes, 6)
    for kind in ("linear", "smooth"):
        assert corners(make_track(plan_of(*keys), 6, kind)) == near(boxes)
    assert len(keys) == 5
    assert keys_of([LEFT] * 9) == (Key(LEFT, frame=0),)


def test_a_path_carries_a_box_of_the_given_size_along():
    text = json.dumps([{"x": 128, "y": 160}, {"x": 256, "y": 160}, {"x": 384, "y": 80}])
    ((_, keys),) = box_sources.from_paths(text, (0.25, 0.5), CANVAS)
    assert corners(make_track(plan_of(*keys), 5)) == near([
        (0.125, 0.25, 0.375, 0.75), (0.25, 0.25, 0.5, 0.75), (0.375, 0.25, 0.625, 0.75), (0.5, 0.125, 0.75, 0.625), (0.625, 0, 0.875, 0.5),
    ])
    assert len(box_sources.from_paths(f"[{text}, {text}]", (0.25, 0.5), CANVAS)) == 2
    parts = box_sources.from_paths('[{"x": 0.25, "y": 0.5}]', (0.25, 0.5), CANVAS)
    assert parts[0][1][0].corners == pytest.approx((0.125, 0.25, 0.375, 0.75))


def test_tracks_become_the_box_around_their_visible_points():
    points = [[[128, 160], [256, 80]], [[128, 160], [9000, 80]], [[9000, 80], [9000, 80]], [[-900, 0], [-900, 0]]]
    visible = [[True, True], [True, False], [False, False], [True, True]]
    ((_, keys),) = box_sources.from_tracks(points, visible, 4, (0.1, 0.1), CANVAS)
    assert corners(make_track(plan_of(*keys), 4)) == near([(0.2, 0.2, 0.55, 0.55), (0.2, 0.45, 0.3, 0.55), None, None])


def test_words_go_to_the_objects_in_order_and_ids_stay_apart():
    found = [("cat", ()), ("", ()), ("", ())]
    words = ["", "a dog"]
    items = box_sources.named(found, "mask", words, {"cat", "mask"})
    assert [(item.id, item.words) for item in items] == [("cat 2", "cat"), ("a dog", "a dog"), ("mask 2", "")]
    assert words == []


@pytest.mark.parametrize(("read", "says"), [
    (lambda: box_sources.from_bounding_boxes([], 4, CANVAS), "holds no box"),
    (lambda: box_sources.from_bounding_boxes([[], []], 2, CANVAS), "holds no box in any frame"),
    (lambda: box_sources.from_bounding_boxes([[pixel_box(0, 0, 9, 9)]] * 3, 4, CANVAS), "3 lists of boxes for 4 frames"),
    (lambda: box_sources.from_bounding_boxes([[pixel_box(0, 0, 9, 9)], 3], 2, CANVAS), "frame 1 is int"),
    (lambda: box_sources.from_bounding_boxes(pixel_box(0, 0, -9, 9), 4, CANVAS), "frame 0, box 1: .* has no size"),
    (lambda: box_sources.from_bounding_boxes(pixel_box(0, 0, float("nan"), 9), 4, CANVAS), "has no size"),
    (lambda: box_sources.from_bounding_boxes(pixel_box(600, 0, 9, 9), 4, CANVAS), "lies outside the picture"),
    (lambda: box_sources.from_bounding_boxes({"x": 1}, 4, CANVAS), "is no box .x, y, width, height."),
    (lambda: box_sources.from_extents([None, None], 2), "empty in all frames"),
    (lambda: box_sources.from_extents([LEFT] * 3, 2), "3 masks for 2 frames"),
    (lambda: box_sources.from_paths("nothing", (0.1, 0.1), CANVAS), "no JSON list of points"),
    (lambda: box_sources.from_paths("[[]]", (0.1, 0.1), CANVAS), "must be a list of points"),
    (lambda: box_sources.from_paths('[{"x": 1}]', (0.1, 0.1), CANVAS), "path 1, point 1: .* is no point"),
    (lambda: box_sources.from_paths('[{"x": 900, "y": 10}]', (0.1, 0.1), CANVAS), "path 1, point 1: .* outside the picture"),
    (lambda: box_sources.from_paths('[{"x": 100, "y": 10}]', (0.0, 0.1), CANVAS), "must run from left to right"),
    (lambda: box_sources.from_tracks([[[1, 2]]] * 3, None, 4, (0.1, 0.1), CANVAS), "3 frames of tracks for 4 frames"),
    (lambda: box_sources.from_tracks([[[float("nan"), 2]]], None, 1, (0.1, 0.1), CANVAS), "frame 0 holds a point that is no number"),
    (lambda: box_sources.from_tracks([[[9000, 2]]], None, 1, (0.1, 0.1), CANVAS), "empty in all frames"),
])
def test_other_nodes_boxes_that_do_not_fit_are_refused(read, says):
    with pytest.raises(BoxError, match=says):
        read()
