"""Taggers of packages that the pack does not bring: nltk and spaCy; each imported when it is chosen.

Both tag with Penn's classes, of which NN and NNS count, read as 1 and 0. flair, the paper's tagger, is not among them: its
models are pickles that hold more than weights.
"""

from collections.abc import Callable

NOUNS = ("NN", "NNS")
NLTK_DATA = "averaged_perceptron_tagger_eng"
Pieces = Callable[[str], list[tuple[int, int, float]]]  # text -> (begin, end, noun probability) of its tokens


def load(name: str, node_id: str) -> Pieces:
    """Raises ValueError, one sentence, where the package or its model is not installed."""
    try:
        return PACKAGES[name](node_id)
    except ImportError as error:
        raise ValueError(
            f"{node_id}: tagger is '{name}', which is not installed here ({error}); run `pip install {name.lower()}` with ComfyUI's "
            "Python or choose the built-in word list."
        ) from error


def nltk(node_id: str) -> Pieces:
    from nltk import __version__, pos_tag
    from nltk.tokenize import TreebankWordTokenizer

    if tuple(map(int, __version__.split(".")[:2])) < (3, 9):  # its tagger was a pickle
        raise ValueError(f"{node_id}: tagger is 'nltk', version {__version__}; give 3.9 or newer.")

    def pieces(text: str) -> list[tuple[int, int, float]]:
        places = list(TreebankWordTokenizer().span_tokenize(text))
        try:
            tags = pos_tag([text[begin:end] for begin, end in places])
        except LookupError as error:
            raise ValueError(
                f"{node_id}: nltk lacks its data '{NLTK_DATA}'; run `python -m nltk.downloader {NLTK_DATA}` with ComfyUI's Python."
            ) from error
        return [(*place, float(tag in NOUNS)) for place, (_, tag) in zip(places, tags, strict=True)]

    return pieces


def spacy(node_id: str) -> Pieces:
    """The first English pipeline that is installed."""
    import spacy as package

    english = sorted(name for name in package.util.get_installed_models() if name.startswith("en_"))
    if not english:
        raise ValueError(
            f"{node_id}: spaCy has no English pipeline; run `python -m spacy download en_core_web_sm` with ComfyUI's Python."
        )
    pipeline = package.load(english[0])

    def pieces(text: str) -> list[tuple[int, int, float]]:
        doc = pipeline(text)
        if not doc.has_annotation("TAG"):
            raise ValueError(f"{node_id}: spaCy's pipeline {english[0]} tags no parts of speech; install en_core_web_sm.")
        return [(token.idx, token.idx + len(token), float(token.tag_ in NOUNS)) for token in doc]

    return pieces


PACKAGES = {"nltk": nltk, "spaCy": spacy}
