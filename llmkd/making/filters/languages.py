"""The language that a text is written in, by py3langid (the extra `make`): a naive Bayes model of strings of bytes, in the package itself. No torch."""

import difflib
import importlib.util
from collections.abc import Sequence

from ...errors import UserError
from .words import Reason, words

_SHORT = 5  # words: shorter texts are not judged
_SURE = 0.5  # least probability of another language
_NONE = "zxx"  # the code for no language: numbers, program code


class Languages:
    """The languages that rows may have, by their codes (ISO 639: en, de, zh). UserError for unknown ones, and where the package is not installed."""

    def __init__(self, codes: Sequence[str], setting: str):
        if importlib.util.find_spec("py3langid") is None:
            raise UserError(f"{setting}: needs py3langid; pip install llmkd[make]")
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self.codes, self.identifier = {*codes, _NONE}, LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted(set(map(str, self.identifier.labels)) - {_NONE})
        if unknown := next((code for code in codes if code not in known), None):
            near = difflib.get_close_matches(unknown, known, 1, 0.5)
            also = f"did you mean {near[0]}?" if near else "the codes are"
            raise UserError(
                f"{setting}: found {unknown}, which is no code of a language; {also} {'' if near else ', '.join(known)}".rstrip()
            )

    def other(self, *texts: str) -> Reason | None:
        """A reason if one of a row's texts with five words or more is in another language with a probability of 0.5 or more; else None."""
        for text in texts:
            if len(words(text)) >= _SHORT:
                code, probability = self.identifier.classify(text)
                if code not in self.codes and probability >= _SURE:
                    return "language", f"{code} ({probability:.2f}): {' '.join(text.split())[:60]!r}"
        return None
