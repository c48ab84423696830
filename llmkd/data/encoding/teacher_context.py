"""Context distillation: the teacher reads a context that the student does not, and both predict the same targets.

A row with a context is rendered a second time by its format, with the context in it. The targets there must be the student's targets,
token by token; where they are not, the row is refused.
"""

import itertools

import numpy as np

from ...config.data import no_context_with
from ...config.recipe import Data, Source
from .control_tokens import Text, controls, refuse_unmarked
from .formats import FORMATS, paragraphs
from .locate import NotShown, no_spaces
from .long_texts import bound_of

#: Token ids, and the mask of the supervised ones.
Tokens = tuple[np.ndarray, np.ndarray]


def teacher_texts(row: dict, own: list[Text], source: Source, data: Data, tokenizer) -> list[Text] | None:
    """The texts that the teacher reads, one for each of the student's `own`; None for a row without a context.

    ValueError if the row, its format or its template cannot take the context.
    """
    context = paragraphs(data.teacher_context, row.get("teacher_context"))
    if not context:
        return None
    for _, problem in no_context_with(data):
        raise ValueError(f"{source.fields.get('teacher_context', 'teacher_context')} cannot be used with {problem}")
    try:
        theirs = FORMATS[source.format].render(row, source, tokenizer, context, bound_of(data, tokenizer))
        refuse_unmarked([text.text for text in theirs if text.raw], controls(tokenizer))
        if not all(text.left_out or no_spaces(context) in no_spaces(text.text) for text in theirs):
            raise NotShown
    except NotShown:
        raise ValueError(
            "the chat template does not show the teacher's context, a system message; use a tokenizer whose template does"
        ) from None
    except ValueError as error:
        raise ValueError(f"with the teacher's context, {error}") from None
    if len(theirs) != len(own):
        raise ValueError(
            f"the chat template makes {len(own)} examples of it, and with the teacher's context {len(theirs)}; fix the row or the template"
        )
    return theirs


def align(own: Tokens, theirs: Tokens, raw: bool, tokenizer) -> Tokens:
    """The teacher's tokens, with only the student's targets supervised. ValueError if the supervised tokens differ.

    In a raw text nothing predicts the student's first token. The teacher has its context before that token, so it has more targets, of
    which the student's are the last.
    """
    (ids, loss_mask), targets = theirs, own[0][own[1]]
    places = np.flatnonzero(loss_mask)
    if raw:
        places = places[-len(targets) :] if len(targets) else places[:0]
    if not np.array_equal(ids[places], targets):
        pairs = itertools.zip_longest(ids[places].tolist(), targets.tolist())
        found, expected = (_token(i, tokenizer) for i in next(pair for pair in pairs if pair[0] != pair[1]))
        fix = "begin the text otherwise, or use another format" if raw else "fix the row, the context or the template"
        raise ValueError(
            f"with the teacher's context, the supervised tokens are not the student's: {found} where the student has {expected}; {fix}"
        )
    loss_mask = np.zeros_like(loss_mask)
    loss_mask[places] = True
    return ids, loss_mask


def _token(i: int | None, tokenizer) -> str:
    return "no more" if i is None else repr(tokenizer.convert_ids_to_tokens(i))


def keep_common(views: tuple[Tokens, ...]) -> None:
    """After a cut, supervise only the targets that every view still has: the first ones. In place."""
    kept = min(int(loss_mask.sum()) for _, loss_mask in views)
    for _, loss_mask in views:
        loss_mask[np.flatnonzero(loss_mask)[kept:]] = False
