"""Labels clips of recorded digits: by pocketsphinx, a recogniser of which only the answer is known, or by a classifier that llmkd trained.

    python recipes/digits/labels.py RECORDINGS pocketsphinx OUT.jsonl          needs pip install pocketsphinx
    python recipes/digits/labels.py RECORDINGS MODEL_FOLDER OUT.jsonl

It writes a row of audio and label for each clip of the official training set (indexes from 5 on) and says how many labels are right.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmkd.data.audio.decode import decode

WORDS = "zero one two three four five six seven eight nine".split()


def pocketsphinx() -> Callable[[Path], str]:
    """Its English model with a grammar of the ten words, at 16,000 Hz."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=16_000, lm=None, loglevel="FATAL")
    decoder.add_jsgf_string("digits", f"#JSGF V1.0; grammar digits; public <digit> = {' | '.join(WORDS)};")
    decoder.activate_search("digits")

    def label(path: Path) -> str:
        samples = decode(path, 16_000, str(path)).samples
        quiet = np.zeros(4_000, np.float32)  # a quarter of a second before and after, which it expects
        pcm = (np.concatenate([quiet, samples, quiet]) * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2")
        decoder.start_utt()
        decoder.process_raw(pcm.tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return str(WORDS.index(found.hypstr)) if found and found.hypstr else ""

    return label


def classifier(folder: str) -> Callable[[Path], str]:
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    import llmkd

    llmkd.register()
    model, extractor = AutoModelForAudioClassification.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)

    def label(path: Path) -> str:
        clip = decode(path, extractor.sampling_rate, str(path)).samples
        with torch.no_grad():
            logits = model(**extractor([clip], sampling_rate=extractor.sampling_rate, return_tensors="pt")).logits
        return model.config.id2label[int(logits.argmax())]

    return label


def main(recordings: str, labeller: str, out: str) -> None:
    label = pocketsphinx() if labeller == "pocketsphinx" else classifier(labeller)
    rows, right, silent = [], 0, 0
    for path in sorted(Path(recordings).glob("*.wav")):
        digit, speaker, index = path.stem.split("_")
        if int(index) < 5:
            continue
        found = label(path)
        silent += not found
        right += found == digit
        if found:
            rows.append({"audio": str(path.absolute()), "label": found, "speaker": speaker, "index": int(index)})
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{labeller}: {right} of {len(rows) + silent} labels are right, {silent} clips have none; {len(rows)} rows in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
