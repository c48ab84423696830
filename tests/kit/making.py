"""`llmkd make` in tests: files of stages, and a writer that is a function."""

import json
from collections.abc import Callable
from pathlib import Path

from llmkd.config.make import load_make
from llmkd.making.asks import Answer, Ask, estimated_tokens
from llmkd.making.pipeline import Pipeline


class Function:
    """A writer: `says` gives a text, or an Answer, to each ask. `asked`: in order, what it was asked for."""

    label, identity = "function", {"function": 1}

    def __init__(self, says: Callable[[Ask], str | Answer] = lambda ask: f"To: {ask.messages[-1]['content']}"):
        self.says, self.asked, self.closed = says, [], False

    def check(self) -> None:
        pass

    def write(self, asks, known):
        for ask in [ask for ask in asks if ask.key not in known]:
            self.asked.append(ask)
            said = self.says(ask)
            read = estimated_tokens(*(one["content"] for one in ask.messages))
            yield ask, said if isinstance(said, Answer) else Answer(said, "stop", estimated_tokens(said), read)

    def close(self) -> None:
        self.closed = True


def write_make(folder: Path, stages: list[dict], questions: int | list = 3, **settings) -> Path:
    """A file of stages, and its seeds: so many questions without answers, or these rows."""
    rows = questions if isinstance(questions, list) else [{"instruction": f"Question {i}?"} for i in range(questions)]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "make.yaml"
    data = {"output_dir": str(folder / "out"), "writer": {"model": "m", "server": "http://127.0.0.1:9"}, "stages": stages}
    path.write_text(json.dumps(data | {"seeds": {"path": str(folder / "seeds.jsonl")}} | settings))
    return path


def run_make(path: Path, writer=None, dry_run: bool = False, **overrides) -> Pipeline:
    """The pipeline of a file, run with this writer."""
    pipeline = Pipeline(load_make(path, {key.replace("__", "."): value for key, value in overrides.items()}), writer or Function(), dry_run)
    pipeline.run()
    return pipeline


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
