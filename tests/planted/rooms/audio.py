"""Faults in sound and images: decoding, features, augmentation, transcripts, and edits of prompts."""

from tests.planted.fault import in_file

DECODE, MEL, AUGMENT = "data/audio/test_decode.py", "data/audio/test_log_mel.py", "data/audio/test_augment.py"
WORKERS, MEDIA, EDITS = "data/media/test_workers.py", "data/test_media.py", "data/test_prompt_edits.py"
TEXTS, TRANSCRIBE, CLASSES = "data/test_edited_texts.py", "making/test_transcribe.py", "data/test_class_names.py"
CNN, TRANSCRIPTS = "models/test_builtin_cnn.py", "tasks/test_transcripts.py"
PICTURES = "data/images/test_augment.py"
SOUND, IMAGES, RUNS = "tasks/test_sound.py", "data/images/test_decode.py", "tasks/test_sound_runs.py"


FAULTS = [
    *in_file(
        "llmkd/data/audio/decode.py",
        ("pitch", "a sound at another rate is taken as it is", "if own != rate:", "if False:", DECODE),
        ("one-channel", "the first channel stands for all", "if C == 1 else", "if True else", DECODE),
        ("cut-wav", "a WAV file that was cut short is read", "size not in _UNKNOWN and size > there", "False", DECODE),
        ("piped-wav", "a WAV file of unknown size is refused", "size not in _UNKNOWN and size > there", "size > there", DECODE),
    ),
    *in_file(
        "llmkd/data/audio/log_mel.py",
        ("areas", "mel filters have no areas of one", " * (2 / (high - low))", "", MEL),
        ("top-of-filters", "filters end elsewhere than at half the rate", "_to_mel(rate / 2)", "_to_mel(8000)", MEL),
        ("floor", "the floor follows no clip", "log_MF.max() - _RANGE", "-_RANGE", MEL),
    ),
    *in_file(
        "llmkd/data/media/augment.py",
        ("epochs-alike", "every epoch augments alike", '"{seed} {epoch} {content_hash}"', '"{seed} {content_hash}"', AUGMENT),
        ("numpy-unseeded", "numpy's generator is not seeded", "            np.random.seed(numpy)\n", "", AUGMENT),
        ("python-left", "Python's generator is left where augmentation ended", "            random.setstate(before[0])\n", "", AUGMENT),
        ("numpy-left", "numpy's generator is left where augmentation ended", "            np.random.set_state(before[1])\n", "", AUGMENT),
        (
            "library-before-setting",
            "a library of transforms that is not there is no line",
            "        self.setting = setting\n        known = self.known()\n",
            "        known = self.known()\n        self.setting = setting\n",
            "data/media/test_packages.py",
        ),
    ),
    *in_file(
        "llmkd/data/media/packages.py",
        (
            "library-of-a-package",
            "a package whose own library is not there is no line",
            "(ImportError, OSError)",
            "ImportError",
            "data/media/test_packages.py",
        ),
    ),
    *in_file(
        "llmkd/data/media/workers.py",
        (
            "order-of-clips",
            "clips come in the order of the processes",
            "answers[i % self.count][i // self.count]",
            "sum(answers, [])[i]",
            WORKERS,
        ),
        ("asked-by-two", "two threads that ask get each other's clips", "        with self._lock:\n", "        if True:\n", WORKERS),
    ),
    *in_file(
        "llmkd/data/media/worker.py",
        ("changed-clip", "a file that changes during a run is read", "if content_hash != job.content_hash:", "if False:", WORKERS),
    ),
    *in_file(
        "llmkd/data/reading/media.py",
        ("part-of-a-name", "a pattern matches a part of a name", "named.fullmatch(whole)", "named.search(whole)", MEDIA),
        ("rows-folder", "a path is relative to where the command runs", "parent / path", "parents[0].parents[0] / path", MEDIA),
    ),
    *in_file(
        "llmkd/data/prompt_edits.py",
        ("all-deleted", "a prompt may lose all words", "if len(gone) == len(places) and gone:", "if False:", EDITS),
        ("swapped-again", "a word that was swapped is swapped on", "i += 1 + chosen", "i += 1", EDITS),
    ),
    *in_file(
        "llmkd/data/encoding/edited_texts.py",
        ("edits-by-column", "both texts of a pair are edited alike", 'f"{key} {n}"', 'f"{key} 1"', TEXTS),
        ("edits-uncut", "an edited text is not cut", ", truncation=True, max_length=edits.max_length", "", TEXTS),
        ("edits-lost", "examples that are chosen have the edits of others", "[self.rows[i] for i in chosen]", "self.rows", TEXTS),
    ),
    *in_file(
        "llmkd/data/labelled.py",
        (
            "keys-of-clean-texts",
            "dropout follows the positions of a text before it was edited",
            'found["attention_mask"].sum(1).tolist()',
            "inputs.lengths[some].tolist()",
            TEXTS,
        ),
    ),
    *in_file(
        "llmkd/data/reading/class_names.py",
        ("no-class", "a row without a class is of the last one", "None if value == _UNKNOWN else known[value]", "known[value]", MEDIA),
        ("number-of-a-name", "a class has another number than the data set's", "enumerate(found)", "enumerate(found, 1)", CLASSES),
    ),
    *in_file(
        "llmkd/data/stream.py",
        (
            "numbers-in-a-stream",
            "a stream of the hub has numbers where its rows without streaming have names",
            "names = names_of_data(rows)",
            "names = {}",
            "data/test_stream.py::test_the_hub_is_streamed_by_its_own_library",
        ),
    ),
    *in_file(
        "llmkd/making/sounds.py",
        ("written-again", "a sound that is there is written again", "if not path.is_file():", "if True:", TRANSCRIBE),
        ("left-as-bytes", "a sound that a row holds is no file", "isinstance(row.audio.file, str)", "True", TRANSCRIBE),
    ),
    *in_file(
        "llmkd/models/builtin_cnn.py",
        (
            "norm-over-batch",
            "an example's logits follow from its batch",
            "self.norm(self.convolution(x))",
            "F.batch_norm(self.convolution(x), None, None, self.norm.weight, self.norm.bias, True)",
            CNN,
        ),
    ),
    *in_file(
        "llmkd/tasks/metrics/transcripts.py",
        (
            "empty-references",
            "what is written where nothing was said is no error",
            "found.insertions + inserted",
            "found.insertions",
            TRANSCRIPTS,
        ),
    ),
    *in_file(
        "llmkd/tasks/sound.py",
        ("rate-of-the-clips", "a model reads clips at another rate than its own", "if own != rate:", "if False:", SOUND),
        ("longest-of-whisper", "what Whisper cuts is not known", 'getattr(extractor, "n_samples", None)', "None", SOUND),
    ),
    *in_file(
        "llmkd/data/images/decode.py",
        ("first-frame", "the first of several frames is read", "if frames > 1:", "if False:", IMAGES),
        ("unturned", "an image is read as the camera held it", "ImageOps.exif_transpose(opened)", "opened", IMAGES),
    ),
    *in_file(
        "llmkd/data/images/augment.py",
        (
            "seeded-alike",
            "all transforms of images draw alike",
            "            transform.set_random_state(*draws)",
            "            transform.set_random_seed(own % 2**32)",
            PICTURES,
        ),
    ),
    *in_file(
        "llmkd/data/images/pictures.py",
        ("size-untried", "transforms are tried on an image of another size", "np.min([size for", "np.max([size for", PICTURES),
    ),
    *in_file(
        "llmkd/tasks/media.py",
        (
            "packages-per-file",
            "a package that is not there shows at the first file",
            "            refuse_missing_packages(kind, setting)\n",
            "",
            "data/media/test_packages.py",
        ),
        (
            "sources-backwards",
            "files of three sources are joined in another order than their rows",
            "first.files.joined([one.files for one in others])",
            "first.files.joined([one.files for one in others[::-1]])",
            "tasks/test_pictures.py",
        ),
        (
            "one-kind-of-folder",
            "an extractor in processor_config.json is not found",
            ' and not (folder / "processor_config.json").is_file()',
            "",
            SOUND,
        ),
        (
            "rate-of-the-last-model",
            "sounds are decoded at the last model's rate, also where another one's is higher",
            "self.rate = max(self.rate, extractor.sampling_rate)",
            "self.rate = extractor.sampling_rate",
            SOUND,
        ),
        (
            "tried-on-held-out-images",
            "a crop that fits all training images is refused for a held-out one",
            'workers.way.augment and setting.startswith("data.train")',
            "workers.way.augment",
            "tasks/test_pictures.py",
        ),
    ),
    *in_file(
        "llmkd/data/encoding/edited_prompts.py",
        (
            "first-turn-for-all",
            "of a row with several examples the first alone is edited",
            "        number[row] += 1\n",
            "",
            "data/test_edited_prompts.py",
        ),
    ),
    *in_file(
        "llmkd/data/reading/sounds.py",
        ("never-vague", "every description tells its class", "i % _VAGUE_EVERY == 0", "False", "data/test_sounds.py"),
    ),
    *in_file(
        "llmkd/tasks/readers.py",
        (
            "clean-for-nobody",
            "the teacher reads the augmented clip where it is to read the clean one",
            'data.augment.teacher_sees == "clean"',
            "False",
            RUNS,
        ),
    ),
]
