"""The end tokens that training teaches: those that end the supervised parts. The saved student's generation stops at them."""

import numpy as np

from ...config.recipe import Data
from ...console import info, warn
from ...model_folder.generation import stops_at
from ..examples import TokenExamples
from .control_tokens import controls


def end_tokens(examples: TokenExamples, data: Data, tokenizer) -> set[int]:
    """The control tokens that end supervised parts; none if every example was cut before its end, or the template writes none.

    A token that also occurs inside such parts, as between a thought and its answer, does not end a turn.
    """
    ids, loss_mask = examples.ids, examples.loss_mask
    goes_on = np.append(loss_mask[1:], False)  # no example's first token is supervised
    last = loss_mask & ~goes_on
    if data.too_long in ("truncate", "split"):
        last[(examples.offsets[1:] - 1)[examples.lengths >= data.max_length]] = False
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if controls(tokenizer).any.fullmatch(token.content)}
    found = set(_before_spaces(ids, loss_mask, np.flatnonzero(last), tokenizer).tolist()) & control
    inside = set() if data.train_on_input else set(np.unique(ids[loss_mask & goes_on]).tolist())
    return found - inside or found


def _before_spaces(ids: np.ndarray, loss_mask: np.ndarray, places: np.ndarray, tokenizer) -> np.ndarray:
    """The distinct tokens at these places, or the tokens before the white space that ends there, such as a template's last line break."""
    for _ in range(8):
        blank = [i for i in np.unique(ids[places]).tolist() if not tokenizer.decode([i]).strip()]
        at_blank = np.isin(ids[places], blank) & loss_mask[places - 1]
        if not at_blank.any():
            break
        places = np.where(at_blank, places - 1, places)
    return np.unique(ids[places])


def report_end_tokens(end_tokens: set[int], settings: dict, tokenizer) -> None:
    """Reports at which tokens the saved student's generation stops. `settings`: the generation config of the model that it is trained from."""
    if not end_tokens:
        warn("note: no example is supervised up to an end token, so the student does not learn to stop")
        return
    new = [i for i in sorted(end_tokens) if i not in stops_at(settings)]
    before = " and ".join(_named(i, tokenizer) for i in stops_at(settings)) or "no token"
    what = (
        f"answers end with {' or '.join(_named(i, tokenizer) for i in sorted(end_tokens))}, at which the saved student's generation stops"
    )
    info(what + (f"; that of the model it is trained from stops at {before}" if new else ""))


def _named(i: int, tokenizer) -> str:
    token = tokenizer.convert_ids_to_tokens(i) if i >= 0 else None
    return f"no token of the tokenizer ({i})" if token is None else f"{token!r} ({i})"
