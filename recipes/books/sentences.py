"""Sentences of a folder of texts as rows of a classifier: which text is a sentence from? And a tokenizer that is made of the training rows.

    python recipes/books/sentences.py FOLDER OUT [SENTENCES_OF_EACH]

FOLDER has a .txt file for each class, such as an author; its name is the class. Sentences of 6 to 14 words are taken. The first four fifths of a
text are for training and the last fifth is held out, so that no neighbour of a held-out sentence is trained on; of both as many of each text as of
the shortest, at most SENTENCES_OF_EACH (1,000), evenly over the text. Written are OUT/train.jsonl, OUT/held_out.jsonl and OUT/tokenizer.
"""

import json
import re
import sys
from pathlib import Path

WORDS = range(6, 15)
ENTRIES = 4_000  # of the tokenizer


def sentences(text: str) -> list[str]:
    """Each once, in the text's order, without quotation marks, in which printers differ, and without the name of a speaker that begins a paragraph
    of a play, as in "ROMEO:"."""
    text = re.sub('[“”‘"_]', "", text).replace("’", "'")
    paragraphs = re.split(r"\n\s*\n", text)
    said = [re.sub(r"\A\s*[A-Z][\w .']{0,24}:\n", "", one) for one in paragraphs]
    found = [" ".join(one.split()).strip("'") for part in said for one in re.split(r"(?<=[.!?])'?\s+", part)]
    return list(dict.fromkeys(one for one in found if len(one.split()) in WORDS and one[0].isalpha() and one[-1] in ".!?"))


def evenly(rows: list[str], count: int) -> list[str]:
    return [rows[i * len(rows) // count] for i in range(count)]


def main(folder: str, out: str, most: str = "1000") -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    texts = {path.stem: sentences(path.read_text("utf-8-sig")) for path in sorted(Path(folder).glob("*.txt"))}
    parts = {name: (rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]) for name, rows in texts.items()}
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    for k, split in enumerate(("train", "held_out")):
        count = min(int(most) // (1, 4)[k], *(len(part[k]) for part in parts.values()))
        rows = [{"text": text, "label": name} for name, part in parts.items() for text in evenly(part[k], count)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        print(f"{split}: {count} sentences of each of {', '.join(parts)}")
        if split == "train":
            made = BertWordPieceTokenizer(lowercase=True)
            made.train_from_iterator([row["text"] for row in rows], vocab_size=ENTRIES, show_progress=False)
            made.save_model(str(place))
    BertTokenizerFast(vocab=str(place / "vocab.txt"), do_lower_case=True).save_pretrained(place / "tokenizer")


if __name__ == "__main__":
    main(*sys.argv[1:])
