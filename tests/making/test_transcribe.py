"""Transcripts of sounds: what a model here writes, which are kept, and rows that train as they are."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import torch
import transformers

from llmkd.config.data import Source
from llmkd.config.make import Writer as Settings
from llmkd.config.make import load_make
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError
from llmkd.making.asks import Answer, Ask
from llmkd.making.filters.transcripts import WordErrors
from llmkd.making.rows import Sound
from llmkd.making.writers.command import ProgramWriter
from llmkd.making.writers.recorded import RecordedWriter
from llmkd.making.writers.writer import writer_of
from llmkd.rollouts.sampling import Sampling
from tests.kit.making import Function, lines, run_make, write_make
from tests.kit.sequences import saved, speech_model, speech_rows

TONES = (150, 700, 2000, 3500)
TRANSCRIBE, ANSWER, TEXT = [{"do": "transcribe"}], [{"do": "answer"}], {"seeds.format": "alpaca"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transcribe")
    model = speech_model()
    with torch.no_grad():  # so that the sound and the tokens before count
        for conv in (model.model.encoder.conv1, model.model.encoder.conv2):
            conv.weight *= 30
        for layer in model.model.decoder.layers:
            for attention, size in ((layer.encoder_attn, 2), (layer.self_attn, 3)):
                attention.out_proj.weight *= size
                attention.v_proj.weight *= size
    model.generation_config.suppress_tokens = list(range(94, 256))  # bytes that are no character by themselves
    saved(model, folder / "model")
    speech_rows(folder)
    return folder


def written(folder: Path, into: Path, stages: list[dict], rows: list[dict], **settings) -> Path:
    """A file of stages whose seeds are sounds next to them."""
    into.mkdir()
    path = write_make(into, stages, rows, **({"writer": {"model": str(folder / "model"), "max_new_tokens": 6}} | settings))
    data = json.loads(path.read_text())
    (folder / f"{into.name}.jsonl").write_text((into / "seeds.jsonl").read_text())
    data["seeds"] = {"path": str(folder / f"{into.name}.jsonl"), "format": "speech"}
    path.write_text(json.dumps(data))
    return path


def test_a_model_writes_what_transformers_generates_and_sounds_that_cannot_be_read_are_named(folder, tmp_path, monkeypatch):
    for i, hertz in enumerate(TONES):
        soundfile.write(folder / f"tone_{i}.wav", 0.3 * np.sin(2 * np.pi * hertz * np.arange(8000 - i) / 8000), 8000)
    soundfile.write(folder / "long.wav", np.zeros(8001, np.float32), 8000)
    (folder / "cut.wav").write_bytes((folder / "0.wav").read_bytes()[:-100])
    rows = [{"audio": f"tone_{i}.wav", "text": "two", "speaker": "a"} for i in range(4)] + [{"audio": "long.wav"}, {"audio": "cut.wav"}]
    path = written(folder, tmp_path / "local", TRANSCRIBE, rows)
    settings = load_make(path, {"writer.batch_size": 2})
    writer = writer_of(settings.make.writer, lambda: "cpu", lambda: False, settings.sounds)
    done = run_make(path, writer)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder / "model")
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder / "model")
    reader = transformers.WhisperTokenizer.from_pretrained(folder / "model")
    for i, row in enumerate(made := lines(tmp_path / "local/out/train.jsonl")):
        clip = soxr.resample(soundfile.read(folder / f"tone_{i}.wav", dtype="float32")[0], 8000, 16000)
        features = extractor([clip], sampling_rate=16000, return_tensors="pt").input_features
        ids = reader.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
        with torch.no_grad():
            for _ in range(6):
                logits_V = model(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1, : len(reader)]
                logits_V[94:256] = -torch.inf
                ids = [*ids, int(logits_V.argmax())] if ids[-1] != reader.eos_token_id else ids
        assert row["text"] == reader.decode(ids, skip_special_tokens=True).strip() != ""
        assert row["audio"] == str(folder / f"tone_{i}.wav") and row["speaker"] == "a"
        assert row["made"]["reference"] == "two" and row["made"]["finish"] == ("length" if ids[-1] != reader.eos_token_id else "stop")
        assert row["made"]["sha256"] == hashlib.sha256((folder / f"tone_{i}.wav").read_bytes()).hexdigest()
    assert len(made) == 4 and len({row["text"] for row in made}) >= 3 and done.counts[0].reasons == {"no_answer": 2}
    said = " ".join(row["detail"] for row in lines(tmp_path / "local/out/rejected.jsonl"))
    assert "the clip is 1.00 s long, and the writer reads 1 s" in said and "local.jsonl:6: the file is cut short" in said
    assert writer.most == 47  # of 48 positions the decoder is given two tokens, and none follows the last
    sounds = [{"role": "user", "content": row["made"]["sha256"]} for row in made]
    heard = [Sound(row["audio"], f"rows.jsonl:{i + 1}", 9) for i, row in enumerate(made)]
    asks = [Ask(key, (sounds[i],), Sampling(0.0, 6), audio=heard[i]) for i, key in enumerate("ab")]
    ((ask, answer),) = writer.write(asks, {"a"})
    assert ask is asks[1] and answer.text == made[1]["text"]
    other = Sound(str(folder / "0.wav"), "rows.jsonl:7", 9)
    changed = Ask("key", ({"role": "user", "content": "0" * 64},), Sampling(0.0, 6), audio=other)
    assert f"rows.jsonl:7: {other.file}: the file was changed" in next(writer.write([changed], ()))[1].problem
    Path(heard[1].file).rename(tmp_path / "gone.wav")
    (_, there), (_, gone) = sorted(writer.write(asks, ()), key=lambda one: one[0].key)
    assert there.text == made[0]["text"] and gone.problem.startswith(f"rows.jsonl:2: {heard[1].file}: No such file or directory")
    (tmp_path / "gone.wav").rename(heard[1].file)
    read = read_source(Source(path=str(tmp_path / "local/out/train.jsonl"), format="speech"), "data.train")
    assert [row["text"] for row in read.rows] == [row["text"] for row in made] and read.unread == Counter(speaker=4)
    read_by = folder / "model/preprocessor_config.json"
    read_by.write_text((before := read_by.read_text()).replace('"padding_value": 0.0', '"padding_value": 0.5'))
    assert writer_of(settings.make.writer, lambda: "cpu", lambda: False, settings.sounds).identity != writer.identity
    read_by.write_text(before)
    config = json.loads((folder / "model/generation_config.json").read_text())
    (folder / "model/generation_config.json").write_text(json.dumps(config | {"is_multilingual": True}))
    with pytest.raises(UserError, match=r"writer.target_prefix: not given, and the model knows several languages"):
        writer_of(settings.make.writer, lambda: "cpu", lambda: False, settings.sounds)
    (folder / "model/generation_config.json").write_text(json.dumps(config))


SAYS = ["la la la la", "one, two: three FOUR", "one too three four", "", Answer("one two", "length", 3, 2), "one two three four"]


def test_transcripts_are_asked_by_their_sounds_and_kept_below_a_word_error_rate(folder, tmp_path, capsys):
    """Of four words: four errors, none, one, no transcript, two missing; and a row with none of its own."""
    rows = [{"audio": f"{i}.wav", "text": "one two three four", "prompt": f"of {i}"} for i in range(5)] + [{"audio": "5.wav", "text": None}]
    names = {hashlib.sha256((folder / f"{i}.wav").read_bytes()).hexdigest(): i for i in range(6)}
    writer = Function(lambda ask: SAYS[names[ask.messages[0]["content"]]])
    stages = [*TRANSCRIBE, {"do": "keep", "wer_below": 0.26, "finish": "stop"}]
    path = written(folder, tmp_path / "kept", stages, rows)
    done = run_make(path, writer)
    assert [one.reasons for one in done.counts[:2]] == [{"empty": 1}, {"cut_off": 1, "word_errors": 1}]
    kept = [(row["text"], row.get("prompt")) for row in lines(tmp_path / "kept/out/train.jsonl")]
    assert kept == [(SAYS[1], "of 1"), (SAYS[2], "of 2"), (SAYS[5], None)]
    said = capsys.readouterr().err
    assert "word error rate (basic) 0.417 of 3 transcripts, 0.125 of the 2 below 0.26" in said and "1 row of 4 have no transcript" in said
    rejected = {row["reason"]: row for row in lines(tmp_path / "kept/out/rejected.jsonl")}
    assert "word error rate 1.00 (basic), and its own transcript is 'one two three four'" in rejected["word_errors"]["detail"]
    assert "text" not in rejected["empty"] and rejected["empty"]["made"]["reference"] == "one two three four"
    assert all(ask.audio.file == str(folder / f"{names[ask.messages[0]['content']]}.wav") for ask in writer.asked)
    train = (tmp_path / "kept/out/train.jsonl").read_bytes()
    run_make(path, RecordedWriter(Settings(recorded=str(tmp_path / "kept/out/answers.jsonl"))), output_dir=str(tmp_path / "recorded"))
    assert [row["text"] for row in lines(tmp_path / "recorded/train.jsonl")] == [SAYS[1], SAYS[2], SAYS[5]]
    program = ProgramWriter(Settings(command=("program",)), lambda: False)
    program._process = "started"
    program._send(writer.asked[0])
    assert json.loads(program._asks.get())["audio"] == writer.asked[0].audio.file
    (folder / "elsewhere").mkdir()
    for i in range(6):
        (folder / "elsewhere" / f"{i}.wav").write_bytes((folder / f"{i}.wav").read_bytes())
    (folder / "elsewhere/rows.jsonl").write_text((folder / "kept.jsonl").read_text())
    run_make(path, again := Function(), seeds__path=str(folder / "elsewhere/rows.jsonl"))
    assert not again.asked and (tmp_path / "kept/out/train.jsonl").read_bytes() == train.replace(
        str(folder).encode(), str(folder / "elsewhere").encode()
    )
    run_make(path, Function(), stages=[*TRANSCRIBE, {"do": "keep", "wer_below": 0.25}])
    assert [row["text"] for row in lines(tmp_path / "kept/out/train.jsonl")] == [SAYS[1], SAYS[5]]
    with pytest.raises(UserError, match=r"stages.1 \(keep\): wer_below: no row has a transcript of its own"):
        run_make(path, Function(), stages=[*TRANSCRIBE, {"do": "keep", "wer_below": 0.1}], seeds__where={"text": None})


def test_of_a_reference_without_a_word_a_transcript_without_one_stays():
    found = WordErrors(0.5, None).reasons([("...", ""), ("...", "la"), ("one", "one"), (None, "la")], "keep")
    assert [one and one[0] for one in found] == [None, "word_errors", None, None]


def test_seeds_are_folders_and_names_too_and_what_holds_no_file_is_refused(folder, tmp_path, monkeypatch):
    (clips := tmp_path / "clips" / "deep").mkdir(parents=True)
    for name in ("1_ann.wav", "2_bob.wav"):
        (clips / name).write_bytes((folder / f"{name[0]}.wav").read_bytes())
    path = written(folder, tmp_path / "folders", TRANSCRIBE, [])
    named = {"seeds__path": str(tmp_path / "clips"), "seeds__pattern": r"(?P<label>\d)_(?P<who>[a-z]+)\.wav"}
    run_make(path, Function(lambda ask: Path(ask.audio.file).name), **named, seeds__where={"who": "bob"})
    (row,) = lines(tmp_path / "folders/out/train.jsonl")
    assert row["audio"] == str(clips / "2_bob.wav") and (row["label"], row["who"], row["text"]) == ("2", "bob", "2_bob.wav")
    run_make(path, Function(lambda ask: Path(ask.audio.file).name), seeds__path=str(tmp_path / "clips"))
    assert [row["text"] for row in lines(tmp_path / "folders/out/train.jsonl")] == ["1_ann.wav", "2_bob.wav"]
    texts = Source(path=str(tmp_path / "clips"), format="speech", pattern=r"(?P<text>\d)_(?P<who>[a-z]+)\.wav")
    read = read_source(texts, "data.train")
    assert [row["text"] for row in read.rows] == ["1", "2"] and not read.unread
    bad = [{"audio": "absent.wav"}, {"audio": 3}, {"text": "no sound"}]
    with pytest.raises(UserError) as caught:
        run_make(written(folder, tmp_path / "bad", TRANSCRIBE, bad))
    assert len(caught.value.problems) == 3 and "bad.jsonl:1: " in str(caught.value) and "No such file" in str(caught.value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"stages.1 \(keep\): wer_below: needs jiwer"):
        patch.setitem(sys.modules, "jiwer", None)
        run_make(path, stages=[*TRANSCRIBE, {"do": "keep", "wer_below": 0.1}])


def test_sounds_that_rows_hold_become_files_of_the_folder(folder, tmp_path):
    """Once, however often the command runs; one file for equal bytes, and none in a dry run."""
    raw, out = [(folder / f"{i}.wav").read_bytes() for i in (0, 1, 0)], tmp_path / "held/out"
    pq.write_table(pa.table({"audio": raw}), tmp_path / "bytes.parquet")
    path, given = written(folder, tmp_path / "held", TRANSCRIBE, []), {"seeds__path": str(tmp_path / "bytes.parquet")}
    run_make(path, dry_run=True, **given)
    assert not out.exists()
    read = Function(lambda ask: str(len(Path(ask.audio.file).read_bytes())))
    run_make(path, read, **given)
    made, times = lines(out / "train.jsonl"), {one: one.stat().st_mtime_ns for one in (out / "sounds").iterdir()}
    assert [row["audio"] for row in made] == [str(out / f"sounds/{hashlib.sha256(one).hexdigest()}.wav") for one in raw]
    assert [row["text"] for row in made] == [str(len(one)) for one in raw] and len(read.asked) == len(times) == 2
    assert [Path(row["audio"]).read_bytes() for row in made] == raw
    run_make(path, again := Function(), **given)
    assert not again.asked and lines(out / "train.jsonl") == made
    assert {one: one.stat().st_mtime_ns for one in (out / "sounds").iterdir()} == times


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds.format": "alpaca"}, "stages.0: is transcribe, and no seeds are sounds"),
        ({"stages": [{"do": "answer"}]}, "stages.0: is answer, which reads no sounds"),
        ({"stages": [*TRANSCRIBE, *TRANSCRIBE]}, "stages.1: is a second transcribe"),
        (
            {"seeds": [{"path": "a.jsonl", "format": "speech"}, {"path": "b.jsonl"}]},
            "seeds.1.format: found alpaca with others of format speech",
        ),
        ({"stages": [*TRANSCRIBE, {"do": "keep", "balance": {"max_share": 0.5}}]}, "balance: set without a column for sounds"),
        ({**TEXT, "stages": [*ANSWER, {"do": "keep", "wer_below": 0.1}]}, "stages.1.wer_below: set, and no seeds are sounds"),
        ({**TEXT, "stages": ANSWER, "writer.target_prefix": "<|en|>"}, "writer.target_prefix: set, and no seeds are sounds"),
        ({"stages": [{"do": "keep", "wer_below": 0.1}, *TRANSCRIBE]}, "wer_below: set before the stage transcribe"),
        ({"stages": [*TRANSCRIBE, {"do": "keep", "wer_normaliser": "none"}]}, "wer_normaliser: set without wer_below"),
        ({"stages": [*TRANSCRIBE, {"do": "keep", "near_duplicate": 0.7}]}, "near_duplicate: set for sounds.*near_duplicate_of: answer"),
        ({"writer.temperature": 1.0}, "writer.temperature: found 1, and transcripts are the most likely tokens"),
        ({"writer.server": "http://localhost:1"}, "writer.server: set with seeds of format speech"),
    ],
)
def test_what_does_not_go_with_sounds_is_refused_by_name(folder, tmp_path, changes, said):
    path = written(folder, tmp_path / "refused", TRANSCRIBE, [])
    with pytest.raises(UserError, match=said):
        load_make(path, changes)
