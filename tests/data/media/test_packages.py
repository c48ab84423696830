"""Packages that read or augment files: one that is not there is named once, before a file is read."""

import sys

import pytest

from llmkd.config.data import Data
from llmkd.data.audio.augment import SoundAugmentation
from llmkd.data.images.augment import PictureAugmentation
from llmkd.data.media.packages import refuse_missing_packages
from llmkd.errors import UserError
from llmkd.tasks.media import MediaOfRun


@pytest.mark.parametrize(("kind", "package"), [("audio", "soundfile"), ("audio", "soxr"), ("image", "PIL.Image")])
def test_a_package_that_reads_files(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    read = {"audio": MediaOfRun.sounds, "image": MediaOfRun.pictures}[kind]
    with pytest.raises(UserError) as caught:
        read(MediaOfRun(Data()), [{kind: "absent"}] * 3, kind, ["f:1", "f:2", "f:3"], "data.train")
    (said,) = caught.value.problems
    assert said.startswith("data.train: ") and f"need {package}, which cannot be loaded" in said and f'pip install "llmkd[{kind}]"' in said


def test_a_package_whose_library_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "soundfile.py").write_text("raise OSError('sndfile library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soundfile", raising=False)
    with pytest.raises(UserError, match=r"^writer.model: sounds need soundfile, .* \(.*sndfile library not found\); pip install"):
        refuse_missing_packages("audio", "writer.model")


@pytest.mark.parametrize(
    ("package", "made", "says"),
    [
        ("audiomentations", lambda: SoundAugmentation([{"Gain": {}}], 8_000, "data.augment.audio"), "data.augment.audio: .* needs audiom"),
        ("albumentations", lambda: PictureAugmentation([{"Blur": {}}], "data.augment.image"), "data.augment.image: .* needs? albument"),
    ],
)
def test_a_package_of_transforms(monkeypatch, package, made, says):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=says):
        made()
