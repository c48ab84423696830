"""Rows of format speech: recorded digits by their file names, and sentences that espeak-ng says. rows.py RECORDINGS OUT

RECORDINGS is a folder of files named DIGIT_SPEAKER_INDEX.wav, as in FSDD, whose indexes below 5 are its test set. Of each digit and speaker
two recordings are in train.jsonl, and one in test.jsonl. espeak-ng says 120 sentences in two voices, of which every third is in
test.jsonl: its words, not its sentences, are among those of train.jsonl.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHO = ("the teacher", "my brother", "an old sailor", "the doctor", "our neighbour", "a young girl")
DOES = ("opened", "painted", "carried", "sold", "looked at")
WHAT = ("the green door", "a heavy box", "three red apples", "her father's boat")
VOICES = ("en-us", "en-gb")


def main(recordings: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "test": []}
    for path in sorted(recordings.glob("*_*_*.wav")):
        digit, _, index = path.stem.split("_")
        if index in ("0", "5", "6"):
            row = {"audio": str(path.resolve()), "text": WORDS[int(digit)], "from": "digits"}
            rows["test" if index == "0" else "train"].append(row)
    for i, (who, does, what) in enumerate(itertools.product(WHO, DOES, WHAT)):
        text, file = f"{who} {does} {what}", out / f"said_{i}.wav"
        subprocess.run(["espeak-ng", "-v", VOICES[i // 3 % 2], "-w", str(file), text], check=True)
        rows["test" if i % 3 == 2 else "train"].append({"audio": file.name, "text": text, "from": "espeak-ng"})
    for name, these in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(these)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
