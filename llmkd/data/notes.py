"""Notes on examples: things that a template or a format did with rows that may not be intended."""

from ..console import count

_NOTES = {
    "as_characters": "{} with the characters of a control token, which stay characters",
    "endless": "{} that the chat template ends without a control token: from these the student does not learn to stop",
    "unnamed": "{} of token ids whose tokenizer is not named: they are read as the student's",
}


def example_notes(counts: dict[str, int]) -> list[str]:
    """A line for each oddity in the counts of `encode` that may matter."""
    rendered, turns, listed, unshown = (
        {key.partition(" ")[2]: number for key, number in counts.items() if key.startswith(f"{what} ")}
        for what in ("rendered", "turns", "listed", "unshown")
    )
    most = 2 * sum(rendered.values()) >= counts.get("rows", 0)
    out = [
        f"note: {words.format(counts[key])}" for key, words in _NOTES.items() if counts.get(key) and not (key == "as_characters" and most)
    ]
    if rendered and most:
        out.append(
            f"warning: {sum(rendered.values())} of {count(counts['rows'], 'row')} hold control tokens as text ({max(rendered, key=rendered.get)!r}), as if a chat "
            "template had rendered them already; here they are characters; give the messages themselves (format: chat), or texts without these "
            "tokens (the end token is added)"
        )
    if turns and 2 * sum(turns.values()) >= counts["rows"]:
        out.append(
            f"warning: {sum(turns.values())} of {count(counts['rows'], 'row')} hold a conversation as text ({max(turns, key=turns.get)!r}), as if it had been "
            "rendered already: all of it is supervised, the user's turns too; to train on the answers alone, give messages (format: chat), "
            "or prompt and answer (format: prompt_completion)"
        )
    if listed and 2 * sum(listed.values()) >= counts["rows"]:
        out.append(
            f"warning: {sum(listed.values())} of {count(counts['rows'], 'row')} hold a list of messages as text ({max(listed, key=listed.get)}), which "
            "is read as the text that it is; write the list itself, in a .jsonl, .json or .parquet file"
        )
    if unshown:
        names = ", ".join(f"{name} ({number:,})" for name, number in sorted(unshown.items(), key=lambda one: (-one[1], one[0])))
        out.append(f"note: not shown by the chat template, with the rows that have it, of {count(counts['rows'], 'row')}: {names}")
    if counts.get("apart"):
        factor = counts["apart_tokens"] / max(1, counts["apart_last"])
        out.append(
            f"note: {count(counts['apart'], 'row')} taken apart into {count(counts['apart_examples'], 'example')}, one for each answer, since the chat "
            f"template shows earlier answers differently once others follow: {counts['apart_tokens']:,} tokens, {factor:.1f} times those of "
            f"the last examples alone ({counts['apart_last']:,}); answers: last trains on these alone"
        )
    return out
