"""Rows of format speech: recorded digits by their file names, and sentences that espeak-ng says. rows.py RECORDINGS OUT

RECORDINGS is a folder of files named DIGIT_SPEAKER_INDEX.wav, as in FSDD, whose indexes below 5 are its test set. Of it
one recording of each digit and speaker is in train.jsonl, and one of each digit and every other speaker in test.jsonl. espeak-ng says 40
sentences in two voices, 30 of which are in train.jsonl.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHO = ("the teacher", "my brother", "an old sailor", "the doctor", "our neighbour")
DOES = ("opened", "painted", "carried", "sold")
WHAT = ("the green door", "a heavy box")
VOICES = ("en-us", "en-gb")


def main(recordings: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "test": []}
    for path in sorted(recordings.glob("*_*_*.wav")):
        digit, speaker, index = path.stem.split("_")
        if index == "5":
            rows["train"].append({"audio": str(path.resolve()), "text": WORDS[int(digit)], "from": "digits"})
        elif index == "0" and speaker in ("george", "lucas", "theo"):
            rows["test"].append({"audio": str(path.resolve()), "text": WORDS[int(digit)], "from": "digits"})
    for i, (who, does, what) in enumerate(itertools.product(WHO, DOES, WHAT)):
        text, file = f"{who} {does} {what}", out / f"said_{i}.wav"
        subprocess.run(["espeak-ng", "-v", VOICES[i % 2], "-w", str(file), text], check=True)
        rows["test" if i % 4 == 3 else "train"].append({"audio": file.name, "text": text, "from": "espeak-ng"})
    for name, these in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(these)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
