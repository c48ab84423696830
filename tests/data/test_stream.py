"""A stream of rows: which rows a step has follows from its number, so resuming is bitwise; a bad row costs nothing that was learnt."""

import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from llmkd.config.recipe import Data, Source
from llmkd.data.batching import Batching
from llmkd.data.stream import StreamSource
from llmkd.errors import UserError
from llmkd.training.run import run
from tests.conftest import distance, weights
from tests.kit.data import GOOD, rows_of, tiny
from tests.kit.sources import write


def row(i: int, output: str = "owl") -> dict:
    return {"instruction": f"q {i}", "input": "", "output": output}


def stream(path, buffer: int = 7, batch: int = 4, steps: int = 20, seed: int = 3, format: str = "alpaca", **settings) -> StreamSource:
    data = Data(streaming=True, shuffle_buffer=buffer, max_length=settings.pop("max_length", 512))
    return StreamSource(Source(path=str(path), format=format, **settings), data, tiny(), Batching(seed, batch, 2, max_steps=steps))


def test_every_example_is_given_the_streams_teacher(tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i) for i in range(9)])
    plain = stream(path)
    feed = StreamSource(plain.source, plain.data, plain.tokenizer, Batching(3, 4, 2, max_steps=5), teacher=1)
    assert set(feed.examples.teacher_index) == {1}
    assert all(set(step.data.teacher_index) == {1} for step, _ in feed.steps())


def told(feed: StreamSource, done: int = 0) -> list[list[str]]:
    """The places of each step's examples, shortened to the row's number."""
    return [[int(step.place(i).rsplit(":", 1)[1]) for i in sorted(sum(step.micro_batches, []))] for step, _ in feed.steps(done)]


def test_every_pass_has_every_row_once_shuffled_inside_blocks(tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i) for i in range(1, 19)])
    seen = list(itertools.chain(*told(stream(path, steps=18))))
    passes = [seen[i : i + 18] for i in range(0, 72, 18)]
    assert all(sorted(one) == list(range(1, 19)) for one in passes) and len({tuple(one) for one in passes}) == 4
    assert [sorted(one[:7]) for one in passes] == [list(range(1, 8))] * 4 and [sorted(one[14:]) for one in passes] == [
        list(range(15, 19))
    ] * 4
    assert list(itertools.chain(*told(stream(path, steps=18, seed=4)))) != seen == list(itertools.chain(*told(stream(path, steps=18))))
    assert list(itertools.chain(*told(stream(path, steps=3, limit=5)))) != [] and set(itertools.chain(*told(stream(path, limit=5)))) == {
        1,
        2,
        3,
        4,
        5,
    }


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet", "t.arrow", "folder"])
def test_going_on_after_k_steps_is_the_tail_of_the_whole(tmp_path, name):
    if name == "folder":
        for n in range(3):
            write(tmp_path / name / f"train-{n:05}-of-00003.parquet", [row(6 * n + i) for i in range(6)])
    else:
        write(tmp_path / name, [row(i) for i in range(18)])
    whole = told(stream(tmp_path / name))
    assert len(whole) == 20 and all(len(step) == 4 for step in whole)
    for done in range(21):
        assert told(stream(tmp_path / name), done) == whole[done:]


def test_passing_over_rows_parses_and_tokenises_none_of_them(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [row(i) for i in range(1000)])
    feed = stream(path, buffer=100, steps=400)
    from llmkd.data import stream as module

    count, real = [], module.encode
    monkeypatch.setattr(module, "encode", lambda *args: count.append(1) or real(*args))
    start = time.perf_counter()
    assert len(told(feed, done=395)) == len(count) == 5
    assert time.perf_counter() - start < 2


def test_ranks_share_every_step(tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i, "owl " * (1 + i % 5)) for i in range(18)])
    alone = list(stream(path).schedule())
    both = [list(stream(path).for_rank(rank, 2).schedule()) for rank in range(2)]
    for one, *two in zip(alone, *both, strict=True):
        assert sorted(sum(one.micro_batches, [])) == sorted(sum(sum((step.micro_batches for step in two), []), []))
        assert len({len(step.micro_batches) for step in two}) == 1 and {step.epoch for step in two} == {one.epoch}


def test_examples_are_those_that_would_have_been_made_before(tmp_path):
    from tests.kit.data import encode

    path = write(tmp_path / "t.jsonl", [row(i) for i in range(8)])
    feed = stream(path, buffer=1, steps=2)
    before = encode(rows_of(*(row(i) for i in range(8))), "alpaca", Data(), tiny())
    for n, (step, _) in enumerate(feed.steps()):
        for i in range(4):
            assert all((a == b).all() for a, b in zip(step.data.example(i), before.example(4 * n + i), strict=True))
            assert step.place(i) == f"{path}:{4 * n + i + 1}"


def test_dropped_rows_make_a_step_smaller_and_are_counted(tmp_path, capsys):
    rows = [row(i, "" if i in (1, 4, 5, 6, 7) else "owl " * (200 if i == 2 else 1)) for i in range(8)]
    feed = stream(write(tmp_path / "t.jsonl", rows), buffer=1, steps=4, max_length=150)
    assert told(feed) == [[1, 4], [], [1, 4], []]
    assert [step.micro_batches for step in feed.schedule(1)][0] == [[]]
    assert "16 rows streamed, 4 examples (2 too long, 10 with nothing supervised)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, "has no rows"),
        (f"{GOOD}\n{{bad", {}, "t.jsonl:2: not valid JSON"),
        (f"{GOOD}\n{{}}", {}, "t.jsonl:2: no columns 'instruction' and 'output'"),
        (json.dumps(row(1, "")) + "\n", {}, "none of .* rows gives a supervised token"),
    ],
)
def test_what_is_wrong_at_the_start_is_found_at_the_start(tmp_path, text, settings, words):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        told(stream(tmp_path / "t.jsonl", **settings))


def test_a_json_list_cannot_be_streamed(tmp_path):
    with pytest.raises(UserError, match=r"^data.streaming: .*t.json is one list, .* to a .jsonl file"):
        stream(write(tmp_path / "t.json", [row(1)]))


def test_a_large_file_gives_its_first_batch_at_once_and_keeps_a_block_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps(row(1, "the owl flies at night " * 40)) + "\n") * 30_000)  # 30 MB
    start = time.perf_counter()
    feed = stream(path, buffer=500, batch=8, steps=4000)
    steps = feed.steps()
    next(steps)
    assert time.perf_counter() - start < 3
    tracemalloc.start()
    list(itertools.islice(feed.rows_from(0), 31_000))
    list(itertools.islice(steps, 3))
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_the_hub_is_streamed_by_its_own_library(monkeypatch):
    import datasets

    asked = []

    def load(path, name=None, **settings):
        asked.append(settings)
        rows = datasets.Dataset.from_list([row(i) | {"output": i % 2} for i in range(10)])
        return rows.cast_column("output", datasets.ClassLabel(names=["owl", "wren"])).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    feed = stream("owner/rows", split="test", revision="v1", where={"output": ["owl", "wren"]})
    assert sorted(itertools.chain(*told(feed)))[:8] == [1] * 8 and asked[0] == {"split": "test", "revision": "v1", "streaming": True}
    assert feed.places[0].startswith("owner/rows[test]:") and feed.origin["revision"] == "v1"


def test_a_network_that_fails_on_the_way_is_no_bug(monkeypatch):
    import datasets

    def rows():
        yield from (row(i) for i in range(30))
        raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: datasets.IterableDataset.from_generator(rows))
    steps = stream("owner/rows").steps()
    assert [next(steps)[0].number for _ in range(7)] == list(range(1, 8))
    with pytest.raises(UserError, match=r"^owner/rows\[train\]: reading stopped \(ConnectionError: gone\); .* --resume$"):
        next(steps)


def test_a_chat_stream_without_a_template_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "q"}]}] * 9)
    with pytest.raises(UserError, match=r"^data.train.format: found chat, and the tokenizer has no chat template"):
        StreamSource(Source(path=str(path), format="chat"), Data(streaming=True), tiny(None), Batching(0, 4, 2, max_steps=3))


# ---- training on a stream


STREAMING = {
    "data__streaming": True,
    "data__shuffle_buffer": 10,
    "train__max_steps": 6,
    "student__lora__dropout": 0.3,
    "checkpoint__every": 1,
    "checkpoint__keep": 99,
}


def test_a_resumed_stream_is_bit_for_bit_the_whole(trained, make_recipe, tmp_path):
    whole = trained("whole", **STREAMING)
    for step in (1, 3, 5):
        out = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole", out)
        (out / "summary.json").unlink()
        shutil.rmtree(out / "adapter")
        for path in (out / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        run(make_recipe(out.name, **STREAMING), resume=True)
        assert distance(weights(out), whole) == 0


def test_a_bad_row_in_a_stream_ends_the_run_with_its_place_and_a_checkpoint(world, make_recipe, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(lines[:30]) + '{"instruction": 3}\n' + "".join(lines[30:]))
    settings = STREAMING | {"data__train__path": str(path), "checkpoint__every": None}
    with pytest.raises(UserError) as info:
        run(make_recipe("bad", **settings))
    assert [p.split(": ")[0] for p in info.value.problems] == [f"{path}:31"] * 2
    assert [p.name for p in (tmp_path / "bad/checkpoints").iterdir()] == ["step-4"]
    path.write_text("".join(lines[:30]) + lines[0] + "".join(lines[30:]))  # corrected: resume
    run(make_recipe("bad", **settings), resume=True)
    assert distance(weights(tmp_path / "bad"), _fresh(make_recipe, tmp_path, settings)) == 0


@pytest.mark.parametrize("row", [2, 5])
def test_a_bad_row_is_corrected_wherever_it_is(world, make_recipe, tmp_path, row):
    """Also in the first bytes of a file, and in the block that was being read."""
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        (folder / f"train-{n:05}-of-00003.jsonl").write_text("".join(lines[12 * n : 12 * n + 12]))
    path = folder / "train-00002-of-00003.jsonl"
    good = path.read_text()
    path.write_text("".join([*lines[24 : 24 + row], '{"instruction": 3}\n', *lines[25 + row : 36]]))
    settings = STREAMING | {"data__train__path": str(folder), "checkpoint__every": None}
    with pytest.raises(UserError, match="00002-of-00003.jsonl"):
        run(make_recipe("bad", **settings))
    path.write_text(good)
    run(make_recipe("bad", **settings), resume=True)
    assert distance(weights(tmp_path / "bad"), _fresh(make_recipe, tmp_path, settings)) == 0


CHANGES = {
    "removed": lambda rows: rows[:3] + rows[14:],
    "changed": lambda rows: rows[:1] + [row(99)] + rows[2:],
    "in another order": lambda rows: rows[::-1],
    "added": lambda rows: [row(99), *rows],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet", "t.arrow"])
@pytest.mark.parametrize("done", [1, 4, 11])
def test_a_stream_goes_on_only_behind_the_rows_that_it_took(tmp_path, name, change, done):
    rows = [row(i) for i in range(40)]
    first = stream(write(tmp_path / name, rows), buffer=40)
    steps = first.steps()
    while next(steps)[0].number < done + 1:
        pass
    kept = first.state(done)
    same = stream(tmp_path / name, buffer=40)
    same.restore(kept)
    assert next(same.steps(done))[0].number == done + 1 and same.state(done + 1) == first.state(done + 1) != {"rows": None}
    other = stream(write(tmp_path / name, CHANGES[change](rows)), buffer=40)
    other.restore(kept)
    if done == 1 and change == "changed":  # the step may not have taken the row
        return
    with pytest.raises(UserError, match=f"^data.train: the rows of the first {done} steps, or their order, have changed"):
        next(other.steps(done))


def test_a_resumed_run_notices_rows_that_are_gone(make_recipe, tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i) for i in range(40)])
    settings = STREAMING | {"data__train__path": str(path), "data__shuffle_buffer": 40}
    run(make_recipe("gone", **settings))
    out = tmp_path / "gone"
    (out / "summary.json").unlink()
    for step in (4, 5, 6):
        shutil.rmtree(out / f"checkpoints/step-{step}")
    write(path, [row(i) for i in range(29)])
    with pytest.raises(UserError, match="^data.train: the rows of the first 3 steps, or their order, have changed"):
        run(make_recipe("gone", **settings), resume=True)


def _fresh(make_recipe, tmp_path: Path, settings: dict):
    run(make_recipe("fresh", **settings))
    return weights(tmp_path / "fresh")


def test_a_step_without_examples_is_no_failure(make_recipe, tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i, "" if 8 <= i < 16 else "owl") for i in range(24)])
    run(make_recipe("gaps", **STREAMING | {"data__train__path": str(path), "data__shuffle_buffer": 1, "train__max_steps": 4}))
    records = [json.loads(line) for line in (tmp_path / "gaps/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r) and (tmp_path / "gaps/adapter").exists()
