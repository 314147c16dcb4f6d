"""Taggers of packages that may be installed: imported when chosen, read by place, said in one sentence where missing."""

import sys
import types

import pytest
from storyweft.host import tagger_packages, taggers
from storyweft.nodes import sound
from storyweft.story.heard import typed_caption

CAPTION = typed_caption("a man's dog, barks near well-known Trains")
SPLIT = {"man's": ("man", "'s"), "well-known": ("well", "-", "known")}


def tokens(text):
    """(word, begin, end) as Penn's rules split."""
    found, at = [], 0
    for word in text.split(" "):
        for part in SPLIT.get(word, (word,)):
            found.append((part, at, at + len(part)))
            at += len(part)
        at += 1
    return found


def module(monkeypatch, name, **parts):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for key, value in parts.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def fake_nltk(monkeypatch, tags, version="3.10.4"):
    class Tokenizer:
        def span_tokenize(self, text):
            return iter((begin, end) for _, begin, end in tokens(text))

    def pos_tag(words):
        if tags is None:
            raise LookupError("Resource not found")
        return [(word, tags.get(word, "VBZ")) for word in words]

    module(monkeypatch, "nltk", pos_tag=pos_tag, __version__=version)
    module(monkeypatch, "nltk.tokenize", TreebankWordTokenizer=Tokenizer)


def test_nltk_says_noun_or_not_and_names_the_data_it_lacks(monkeypatch):
    fake_nltk(monkeypatch, {"man": "NN", "'s": "POS", "dog": "NN", "trains": "NNS", "known": "NN", "a": "DT"})
    assert taggers.load("nltk", "N")(CAPTION) == [0, 1, 1, 0, 0, 1, 1]
    fake_nltk(monkeypatch, None)
    with pytest.raises(ValueError, match="N: nltk lacks its data 'averaged_perceptron_tagger_eng'; run `python -m nltk.downloader"):
        taggers.load("nltk", "N")(CAPTION)
    fake_nltk(monkeypatch, {}, "3.8.1")
    with pytest.raises(ValueError, match="N: tagger is 'nltk', version 3.8.1; give 3.9 or newer"):
        taggers.load("nltk", "N")


def fake_spacy(monkeypatch, installed, tags):
    class Doc(list):
        def has_annotation(self, name):
            return name == "TAG" and bool(tags)

    class Token:
        def __init__(self, text, begin, end):
            self.text, self.idx, self.tag_ = text, begin, tags.get(text, "")

        def __len__(self):
            return len(self.text)

    def load(name):
        assert name == "en_core_web_sm"
        return lambda text: Doc(Token(*one) for one in tokens(text))

    util = types.SimpleNamespace(get_installed_models=lambda: installed)
    module(monkeypatch, "spacy", util=util, load=load)


def test_spacy_takes_the_english_pipeline_that_is_installed(monkeypatch):
    fake_spacy(monkeypatch, ["de_core_news_sm", "en_core_web_sm"], {"man": "NN", "dog": "NN", "trains": "NNS", "a": "DT"})
    assert taggers.load("spaCy", "N")(CAPTION) == [0, 1, 1, 0, 0, 0, 1]
    fake_spacy(monkeypatch, ["en_core_web_sm"], {})
    with pytest.raises(ValueError, match="N: spaCy's pipeline en_core_web_sm tags no parts of speech"):
        taggers.load("spaCy", "N")(CAPTION)
    fake_spacy(monkeypatch, ["de_core_news_sm"], {})
    with pytest.raises(ValueError, match="N: spaCy has no English pipeline; run `python -m spacy download en_core_web_sm`"):
        taggers.load("spaCy", "N")


@pytest.mark.parametrize("name", tagger_packages.PACKAGES)
def test_a_package_that_is_not_installed_is_named(monkeypatch, name):
    for part in (name.lower(), "nltk.tokenize"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(ValueError, match=f"StoryweftSentenceAttention: tagger is '{name}', which is not installed here .*pip install"):
        sound.SentenceAttention.execute([CAPTION], name)


def test_the_built_in_list_needs_none_of_them(monkeypatch):
    for name in tagger_packages.PACKAGES:
        monkeypatch.setitem(sys.modules, name.lower(), None)
    made, report = sound.SentenceAttention.execute([CAPTION], taggers.BUILT_IN).args
    assert made[0].nouns == (0, 1, 1, 0, 0, 0, 1) and "noun 1.00" in report
    assert sound.SentenceAttention.GET_SCHEMA().inputs[1].default == taggers.BUILT_IN
