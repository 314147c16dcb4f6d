"""Text rules of a story script and of panel selections, and one test for every refusal."""
import pytest
from storyweft.story.script import MAX_LINE, MAX_PANELS, ScriptError, parse_script
from storyweft.story.selection import SelectionError, select_panels

ANA = "[Ana] a red-haired girl in a blue coat"
BOB = "[Bob] an old robot"
FOUR = "[Ana] reads\n[Ana] runs\n[Ana] eats\n[Ana] sleeps"
DUO = "[Ana] reads\n[Bob] walks\n[Ana] runs\n[NC] the sea\n[Bob] sings\n[Ana] and [Bob] meet"


def refused(characters=ANA, panels=FOUR, style="", id_count=1) -> str:
    with pytest.raises(ScriptError) as caught:
        parse_script(characters, panels, style, id_count)
    assert isinstance(caught.value, ValueError) and str(caught.value).startswith("StoryweftScript: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tag_becomes_the_description():
    story = parse_script(ANA, FOUR)
    assert story.panels[0].prompt == "a red-haired girl in a blue coat reads"
    assert [panel.characters for panel in story.panels] == [("Ana",)] * 4
    assert story.id_panels == {"Ana": (0, 1, 2, 3)}
    assert [panel.index for panel in story.panels] == [0, 1, 2, 3]
    assert story.panels[0].text == "[Ana] reads"


def test_no_space_stays_before_a_punctuation_mark():
    assert parse_script(ANA, "[Ana], asleep", id_count=1).panels[0].prompt == "a red-haired girl in a blue coat, asleep"


def test_caption_stands_behind_the_first_hash():
    panel = parse_script(ANA, "[Ana] reads  # Page #7 of [Ana]'s book", id_count=1).panels[0]
    assert panel.prompt == "a red-haired girl in a blue coat reads"
    assert panel.caption == "Page #7 of Ana's book"


def test_without_hash_the_caption_is_the_line_without_markup():
    story = parse_script(ANA, "[Ana] reads\n[NC] the sea", id_count=1)
    assert [panel.caption for panel in story.panels] == ["Ana reads", "the sea"]


def test_an_empty_caption_can_be_asked_for():
    assert parse_script(ANA, "[Ana] reads #", id_count=1).panels[0].caption == ""


def test_nc_and_lines_without_tag_show_no_character():
    story = parse_script(ANA, "[Ana] reads\n[NC] the sea\na hill", id_count=1)
    assert [panel.is_no_character for panel in story.panels] == [False, True, True]
    assert story.panels[1].prompt == "the sea" and story.panels[1].characters == ()


def test_id_panels_are_the_first_that_name_only_that_character():
    story = parse_script(f"{ANA}\n{BOB}", DUO, id_count=2)
    assert story.id_panels == {"Ana": (0, 2), "Bob": (1, 4)}
    assert story.panels[5].characters == ("Ana", "Bob")


def test_tags_match_as_a_whole():
    story = parse_script("[Ann] a tall girl\n[Anna] a small girl", "[Ann] reads\n[Anna] runs\nAnn and Anna", id_count=1)
    assert [panel.characters for panel in story.panels] == [("Ann",), ("Anna",), ()]
    assert story.panels[2].prompt == "Ann and Anna"


def test_style_is_a_suffix_or_a_template():
    assert parse_script("", "a fox", "ink").panels[0].prompt == "a fox, ink"
    assert parse_script("", "a fox", "ink of {prompt}, {x}").panels[0].prompt == "ink of a fox, {x}"


def test_without_character_lines_all_panels_share_a_nameless_one():
    story = parse_script("\n// nobody\n", "a fox\n[NC] the sea\na fox asleep", id_count=1)
    assert [panel.characters for panel in story.panels] == [("",), (), ("",)]
    assert story.characters[0].name == "" and story.id_panels == {"": (0,)}
    assert parse_script("", "a fox", id_count=4).id_panels == {"": (0,)}


def test_id_count_zero_leaves_looks_to_saved_characters():
    assert parse_script(f"{ANA}\n{BOB}", "[Ana] and [Bob] meet", id_count=0).id_panels == {}


def test_comments_blank_lines_and_line_ends_are_read_over():
    story = parse_script(f"# cast\r\n\r\n// x\r{ANA}\r\n", "\n  // first act\n\n[Ana] reads\n   \n", id_count=1)
    assert len(story.characters) == len(story.panels) == 1


def test_any_script_and_html_pass_as_text():
    story = parse_script("[하나] 빨간 머리 소녀", "[하나] 책을 읽는다 # <b>하나</b> 📖 مرحبا", id_count=1)
    assert story.panels[0].caption == "<b>하나</b> 📖 مرحبا"
    decomposed = "[\u1112\u1161\u1102\u1161] 달린다"
    assert parse_script("[하나] 소녀", decomposed, id_count=1).panels[0].characters == ("하나",)


def test_the_description_names_panels_from_one():
    text = parse_script(f"{ANA}\n{BOB}", DUO, id_count=2).describe()
    assert "6 panels, 2 characters" in text and "looks from panels 1, 3, also in 6" in text
    assert "1 (id) [Ana]: a red-haired girl in a blue coat reads" in text and "4 [no character]: the sea" in text
    assert "shares nothing" in parse_script("", "a fox").describe()


@pytest.mark.parametrize(("panels", "words"), [
    ("", "is empty"),
    ("\n  \n// only a comment", "is empty"),
    ("[Ana] reads\n---", "line 2, '---': has no words"),
    ("#, ;", "nothing before '#'"),
    ("# a caption alone", "nothing before '#'"),
    ("[Ana] reads\n\n[Zed] runs", "line 3, '[Zed] runs': the tag [Zed] is unknown; known are [Ana], [NC]"),
    ("[ana] reads", "known are [Ana]"),
    ("[] reads", "the tag [] is unknown"),
    ("[Ana reads", "bracket without its partner"),
    ("Ana] reads", "bracket without its partner"),
    ("[Ana] [NC] reads", "has [NC] and [Ana]"),
    ("[Ana] re\0ads", "NUL"),
    ("x" * (MAX_LINE + 1), f"limit is {MAX_LINE}"),
    ("a fox\n" * (MAX_PANELS + 1), f"has {MAX_PANELS + 1} panels and the limit is {MAX_PANELS}"),
    ("a fox\n" * 200_000, "bytes long and the limit is"),
    ("a \ud800 fox", "half a character"),
    ("[Ana] " * 400, "makes a prompt of"),
])
def test_bad_panels_are_refused(panels, words):
    assert words in refused(panels=panels)


@pytest.mark.parametrize(("characters", "words"), [
    (f"{ANA}\n{ANA}", "line 2, '[Ana] a red-haired girl in a blue coat': defines [Ana] a second time"),
    ("a girl", "write '[Name] description'"),
    ("[] a girl", "needs a name"),
    ("[A#b] a girl", "needs a name without '#'"),
    ("[NC] a girl", "means 'no character'"),
    ("[Ana]", "describes nothing"),
    ("[Ana] ...", "describes nothing"),
    ("[Ana] a girl [Bob] a robot", "one character a line"),
    ("[A\0na] a girl", "NUL"),
    ("\n".join(f"[c{i}] a girl" for i in range(101)), "limit is 100"),
])
def test_bad_characters_are_refused(characters, words):
    assert words in refused(characters=characters)


def test_too_few_id_panels_are_refused_with_both_numbers():
    assert "[Ana] stands alone in only 4 of the 5 panels" in refused(id_count=5)
    assert "lower id_panels to 4" in refused(id_count=5)
    message = refused(characters=f"{ANA}\n{BOB}", panels="[Ana] and [Bob]\n[Ana] x")
    assert "[Bob] stands alone in only 0 of the 1 panels" in message


def test_nc_among_the_first_panels_is_refused():
    message = refused(panels="[Ana] reads\n[NC] the sea\n[Ana] runs", id_count=2)
    assert "line 2, '[NC] the sea': [NC] stands among the first 2 panels" in message
    parse_script(ANA, "[Ana] reads\n[Ana] runs\n[NC] the sea", id_count=2)


@pytest.mark.parametrize("id_count", [-1, MAX_PANELS + 1, 1.5, True, float("nan"), None])
def test_bad_id_counts_are_refused(id_count):
    assert "must be a whole number from 0" in refused(id_count=id_count)


def test_anything_but_text_is_refused():
    assert "must be text, not NoneType" in refused(characters=None)
    assert "must be text, not list" in refused(panels=["a fox"])


@pytest.mark.parametrize(("text", "chosen"), [
    ("all", (0, 1, 2, 3, 4, 5)), ("1-3", (0, 1, 2)), ("6, 1 - 2", (5, 0, 1)), ("id", (0, 1, 2, 4)), ("id:Bob", (1, 4)),
    ("id:[Ana],id", (0, 2, 1, 4)), ("rest", (3, 5)), ("REST,,4", (3, 5)),
])
def test_selections(text, chosen):
    assert select_panels(parse_script(f"{ANA}\n{BOB}", DUO, id_count=2), text) == chosen


@pytest.mark.parametrize(("text", "words"), [
    ("", "selects none of the 6 panels"), (" , ", "selects none"),
    ("7", "panel 7 does not exist; the story has panels 1 to 6"),
    ("0", "panel 0 does not exist"), ("2-99999999", "does not exist"), ("9" * 30, "not understood"),
    ("3-1", "write '1-3'"),
    ("-2", "not understood"), ("1.5", "not understood"), ("²", "not understood"), ("two", "not understood"),
    ("id:Zed", "write one of: id:Ana, id:Bob"), ("1\0", "plain characters"), ("1," * 9000, "at most"),
])
def test_bad_selections_are_refused(text, words):
    with pytest.raises(SelectionError, match=words.replace("?", r"\?")):
        select_panels(parse_script(f"{ANA}\n{BOB}", DUO, id_count=2), text)


def test_a_selection_of_nothing_left_is_refused():
    with pytest.raises(SelectionError, match="selects none of the 4 panels"):
        select_panels(parse_script(ANA, FOUR), "rest")
