"""A model that scores rows."""

from ...data.encoding.same_tokenizer import refuse_other_tokens
from ...data.encoding.tokenizer import shared_vocab
from ...errors import UserError
from ...model_folder.files import positions, rows_of
from ..model import ModelToLoad


class Scorer(ModelToLoad):
    """A model with the settings of a `ScoringModel`."""

    def check(self, row_format: str, max_length: int) -> None:
        """UserError if it cannot read rows of this format and length."""
        if row_format == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"{self.setting}.model: {self.settings.model} has no chat template; use format: alpaca, or a model that has one"
            )
        most = positions(self.files.config)
        if most and max_length > most:
            raise UserError(f"{self.setting}.model: {self.settings.model} has {most} positions, and max_length is {max_length}; lower it")

    def refuse_other(self, other: "Scorer") -> None:
        """UserError if the other model's tokens differ from this one's."""
        refuse_other_tokens(self.tokenizer, other.tokenizer, f"{other.setting}.model", self.settings.model, other.settings.model)


def vocabulary(scorers: dict[str, Scorer]) -> int:
    """The size of the vocabulary that all models share."""
    first = next(iter(scorers.values()))
    return shared_vocab(first.tokenizer, {f"{one.setting}.model": rows_of(one.files.config) for one in scorers.values()})
