"""Word and character error rates of transcripts, by jiwer, after a named normaliser. Rates with different normalisers are not comparable."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import UserError

#: How references and transcripts are normalised before they are compared.
NORMALISERS = {
    "none": "texts as they are",
    "basic": "lower case, without text in brackets and without punctuation (Whisper's basic normaliser)",
    "english": "basic, contractions and numbers written out (Whisper's English normaliser, without its list of British spellings)",
}


@dataclass(frozen=True)
class Errors:
    """The edits that turn references into transcripts, in words or characters. Counts of several sets can be added, rates cannot."""

    substitutions: int
    deletions: int
    insertions: int
    length: int  # of the references

    @property
    def rate(self) -> float:
        """Edits divided by the references' length; NaN if that is 0."""
        return (self.substitutions + self.deletions + self.insertions) / self.length if self.length else float("nan")

    def __add__(self, other: "Errors") -> "Errors":
        pairs = zip(*(vars(one).values() for one in (self, other)), strict=True)
        return Errors(*(mine + theirs for mine, theirs in pairs))


def word_errors(references: Sequence[str], transcripts: Sequence[str], normaliser: str) -> Errors:
    """Errors in words, over all pairs. `normaliser`: a name of NORMALISERS."""
    return _errors("process_words", references, transcripts, normaliser)


def character_errors(references: Sequence[str], transcripts: Sequence[str], normaliser: str) -> Errors:
    """Errors in characters, spaces included, over all pairs."""
    return _errors("process_characters", references, transcripts, normaliser)


def _errors(process: str, references: Sequence[str], transcripts: Sequence[str], normaliser: str) -> Errors:
    try:
        import jiwer
    except ImportError:
        raise UserError('the word error rate needs jiwer; install it: pip install "llmkd[audio]"') from None
    normalise = normaliser_of(normaliser)
    pairs = [(" ".join(normalise(a).split()), " ".join(normalise(b).split())) for a, b in zip(references, transcripts, strict=True)]
    # Some versions of jiwer raise ValueError for a reference that is empty after normalising: all of its transcript counts as insertions.
    size = str.split if process == "process_words" else list
    inserted = sum(len(size(b)) for a, b in pairs if not a)
    pairs = [(a, b) for a, b in pairs if a]
    if not pairs:
        return Errors(0, 0, inserted, 0)
    found = getattr(jiwer, process)(*map(list, zip(*pairs, strict=True)))
    return Errors(found.substitutions, found.deletions, found.insertions + inserted, sum(len(size(a)) for a, _ in pairs))


@functools.cache
def normaliser_of(name: str) -> Callable[[str], str]:
    """The function of a name of NORMALISERS."""
    if name == "none":
        return str
    from transformers.models.whisper import english_normalizer

    return english_normalizer.BasicTextNormalizer() if name == "basic" else english_normalizer.EnglishTextNormalizer({})
