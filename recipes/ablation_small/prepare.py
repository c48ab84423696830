"""python recipes/ablation_small/prepare.py --alpaca FILE.json --text FILE.txt [FILE.txt ...] [--to data/ablation_small]

Writes what the small study trains on: text.jsonl to pre-train two small bases on (the plain texts, in pieces of some 900 characters,
and every second Alpaca row as text), train.jsonl and held_out.jsonl of the other Alpaca rows.
"""

import argparse
import json
import random
import re
from pathlib import Path

HELD_OUT, PIECE = 400, 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, required=True, help="JSON list of instruction, input, output")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain texts, such as TinyStories and books")
    parser.add_argument("--to", type=Path, default=Path("data/ablation_small"))
    options = parser.parse_args()
    rows = json.loads(options.alpaca.read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    tuning = rows[1::2]
    texts = [piece for path in options.text for piece in pieces(path.read_text(encoding="utf-8"))] + [as_text(row) for row in rows[::2]]
    random.Random(1).shuffle(texts)
    options.to.mkdir(parents=True, exist_ok=True)
    write(options.to / "text.jsonl", [{"text": text} for text in texts])
    write(options.to / "held_out.jsonl", tuning[:HELD_OUT])
    write(options.to / "train.jsonl", tuning[HELD_OUT:])


def pieces(text: str) -> list[str]:
    """Whole paragraphs, joined until a piece is long enough."""
    out = [""]
    for paragraph in re.split(r"\n\s*\n|<\|endoftext\|>", text):
        if len(out[-1]) > PIECE:
            out.append("")
        out[-1] = f"{out[-1]}\n\n{paragraph.strip()}".strip()
    return [piece for piece in out if piece]


def as_text(row: dict) -> str:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{row['output']}"


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
