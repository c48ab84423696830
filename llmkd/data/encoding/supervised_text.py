"""Decodes the tokens of an example, cut where supervision starts or ends."""


def supervised_spans(ids: list[int], loss_mask: list[bool], tokenizer) -> list[tuple[str, bool]]:
    """[(text, supervised)], cut where supervision starts or ends but never inside a character: one of which a part is supervised counts as supervised."""

    def text(stop: int) -> str:
        return tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def whole(stop: int) -> bool:
        return not text(stop).endswith("\ufffd") or text(stop) == text(len(ids))[: len(text(stop))]

    out, before = [], ""
    for i in range(1, len(ids) + 1):
        if i < len(ids) and loss_mask[i] == loss_mask[i - 1]:
            continue
        stop, step = i, 1 if loss_mask[i - 1] else -1  # into the side that is not supervised
        while 0 < stop < len(ids) and not whole(stop):
            stop += step
        here = text(stop)
        out.append((here[len(before) :], loss_mask[i - 1]))
        before = here
    return out
