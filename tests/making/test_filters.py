"""Filters of one row: what passes, what does not, and the reason."""

import itertools
import random
import zlib
from fractions import Fraction

import pytest

from llmkd.making.filters import answers, balance, consistency, contamination, duplicates, repetition, scripts
from llmkd.making.filters.words import jaccard, shingles, words


def test_words_of_spaced_and_unspaced_scripts():
    assert words("Don’t stop: it's 3.5 km!") == ["don't", "stop", "it's", "3", "5", "km"]
    assert words("水はH2Oです") == ["水", "は", "h2o", "で", "す"]
    assert words("... !? — ✓") == []
    assert words("हिन्दी का दिन; العَرَبِيَّة, q\u0301, \u2764\ufe0f 1\ufe0f") == ["हिन्दी", "का", "दिन", "العَرَبِيَّة", "q\u0301", "1"]
    assert words("दिन") != words("दीन")  # day and poor
    assert words("می\u200cخواهم ක්\u200dරියා") == ["می\u200cخواهم", "ක්\u200dරියා"]  # Persian and Sinhala words with joiners


@pytest.mark.parametrize(("text", "is_empty"), [("", True), (" \n\t\u200b\x00\ufeff", True), ("0", False), ("✓", False), ("?", False)])
def test_only_what_is_not_seen_is_empty(text, is_empty):
    assert (answers.empty(text) == ("empty", "")) is is_empty


def test_length_counts_words_and_includes_its_limits():
    assert answers.length("one two, three", 3, 3) is None
    assert answers.length("one two, three", 4, None) == ("too_short", "3 words, fewer than 4")
    assert answers.length("one two, three", None, 2) == ("too_long", "3 words, more than 2")
    assert answers.length("?!", 1, None) == ("too_short", "0 words, fewer than 1")
    assert answers.length("?!", None, None) is None


def test_an_answer_that_did_not_stop_by_itself_is_cut_off():
    assert answers.cut_off("Half a sent", "length") == ("cut_off", "finish is length")
    assert answers.cut_off("Whole.", "content_filter") == ("cut_off", "finish is content_filter")
    assert answers.cut_off("The steps are these:\n", "stop") and answers.cut_off("步骤如下：", None)
    assert answers.cut_off("Whole.", "stop") is None and answers.cut_off("Whole.", None) is None


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("As an AI language model, I have no body.", True),
        ("Sure! However, I  CANNOT\nassist with this.", True),
        ("Paris. " * 60 + "I'm sorry, but that is all.", False),  # not at its beginning
        ("Whereas an airline may refuse, trains do not.", False),  # "as an ai" within words
        ("She said sorry and left.", False),
    ],
)
def test_refusals(text, refused):
    assert bool(answers.refusal(text)) is refused
    assert answers.refusal(text, ("leider kann ich",)) is None and answers.refusal("Leider kann ich nicht.", ("leider kann ich",))


def test_an_echo_is_the_question_or_begins_with_it():
    question = "List three rivers of Europe that are longer than 1000 km."
    assert answers.echo(question, question.upper(), 0.8) == ("echo", "1.00 of the question")
    assert answers.echo(question, question + " They are the Volga, the Danube and the Ural.", 0.8)
    assert answers.echo(question, "The Volga, the Danube and the Ural.", 0.8) is None
    assert answers.echo("What is Paris?", "What is Paris?", 0.8) is None  # three words


def test_the_compression_ratio_is_that_of_whisper_over_windows():
    assert repetition.compression_ratio("to be or not " * 20) == pytest.approx(260 / len(zlib.compress(b"to be or not " * 20)))
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(300)]
    prose = " ".join(draw.choices(vocabulary, k=5000))
    assert len(prose) / len(zlib.compress(prose.encode())) > 2.4 > repetition.compression_ratio(prose)
    loop = prose[:3000] + "and so on " * 60 + prose[3000:6000]
    assert "compression ratio" in repetition.repetition(loop, 2.4, None)[1] and repetition.repetition(prose, 2.4, None) is None


def test_repeated_words_by_hand():
    alphabet = [chr(97 + i) * 2 for i in range(20)]
    assert repetition.repeated_words(" ".join(alphabet)) == 0
    assert repetition.repeated_words(" ".join(alphabet[:12] + ["x"] + alphabet[:12])) == 24 / 25
    assert repetition.repeated_words(" ".join(alphabet[:10] * 2 + alphabet[10:])) == 20 / 30
    assert repetition.repeated_words(" ".join(["x"] * 9)) == 0 and repetition.repeated_words("") == 0
    assert repetition.repeated_words(" ".join(["x"] * 11)) == 1  # two sequences of ten, overlapping
    assert repetition.repetition(" ".join(alphabet[:10] * 2 + alphabet[10:15]), None, 0.5)[1].startswith("80% ")


def test_nine_equal_digits_are_a_repetition_and_eight_are_not():
    assert repetition.repetition("pi is 3.141111111111", None, None) == ("repetition", "the digit 1 nine times in a row")
    assert repetition.repetition("pi is 3.1 11111111", None, None) is None


@pytest.mark.parametrize(
    ("text", "allowed", "reason"),
    [
        ("Ça va très bien: 12 € — ok", ["latin"], None),
        ("Привет, world", ["latin"], ("script", "45% of the letters are latin, and most are cyrillic")),
        ("Привет, world", ["latin", "cyrillic"], None),
        ("これは水です", ["hiragana", "han"], None),
        ("これは水です", ["latin"], ("script", "0% of the letters are latin, and most are hiragana")),
        ("1 + 1 = 2", ["latin"], None),
        ("ＦＵＬＬ", ["latin"], None),
    ],
)
def test_scripts(text, allowed, reason):
    assert scripts.other_script(text, allowed, 0.9) == reason


# ---- near-duplicates


def variants(count: int, seed: int) -> list[str]:
    """Sentences and changed copies of them: every overlap from none to all."""
    draw, made = random.Random(seed), []
    vocabulary = ["river", "stone", "apple", "seven", "north", "cloud", "paper", "green", "horse", "music", "winter", "a", "of", "to"]
    for _ in range(count):
        if made and draw.random() < 0.6:
            text = draw.choice(made).split()
            for _ in range(draw.randint(0, 4)):
                text[draw.randrange(len(text))] = draw.choice(vocabulary)
        else:
            text = [draw.choice(vocabulary) for _ in range(draw.randint(1, 25))]
        made.append(" ".join(text))
    return made


@pytest.mark.parametrize("threshold", [0.5, 0.7, 1.0])
def test_no_pair_of_near_duplicates_stays_and_none_is_dropped_without_one_that_stays(threshold):
    texts = [*variants(297, 0), "", " ", "long " * 3]
    dropped = duplicates.near_duplicates(texts, threshold)
    sets = [{text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in map(str.strip, texts)]
    exact, stays = Fraction(str(threshold)), []
    for i, own in enumerate(sets):  # all pairs, earlier first
        alike = [j for j in stays if own != {""} and Fraction(len(own & sets[j]), len(own | sets[j])) >= exact]
        if alike:
            assert dropped[i] == (alike[0], len(own & sets[alike[0]]) / len(own | sets[alike[0]]))
        else:
            assert i not in dropped
            stays.append(i)
    assert 20 < len(dropped) < 280


def test_a_pair_at_the_threshold_itself_is_a_duplicate():
    one, other = "abcdefghijkl", "abcdefghijklm"  # 8 and 9 strings of five
    assert jaccard(shingles(one), shingles(other)) == 8 / 9
    assert duplicates.near_duplicates([one, other], 8 / 9) == {1: (0, 8 / 9)}
    assert not duplicates.near_duplicates([one, other], 0.8889)


# ---- contamination


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not():
    held_out = "One day the small brown fox went over the wide river, and back to its den."
    index = contamination.HeldOutTexts([("test.jsonl:3", held_out), ("test.jsonl:4", "What is 2 + 2?"), ("test.jsonl:5", "...")])
    thirteen = "ONE day, the small brown fox: went over the wide river and back"
    assert index.contaminated("Tell a story.", f"Well. {thirteen}!") == (
        "contamination",
        f"test.jsonl:3 has {' '.join(words(thirteen))!r} too",
    )
    assert index.contaminated("Tell a story.", thirteen.removesuffix(" back")) is None
    assert index.contaminated("what is 2 2", "4") == ("contamination", "it asks what test.jsonl:4 has")
    assert index.contaminated("What is 2 + 2 + 2?", "What is 2 + 2?") is None
    assert index.contaminated("", "") is None


# ---- consistency


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("6 * 7 = 42, so #### 42", "42"),
        ("#### $1,200.00", "1200"),
        (r"It is \boxed{\frac{1}{2}} of 7", "frac 1 2"),
        (r"\boxed{3} or rather \boxed{ 4\% } of 7", "4"),
        (r"7 is \boxed{4", "4"),
        ("First 3, then -.5", "-0.5"),
        ("007.50 is ٧,5", "5"),
        ("-0.0", "0"),
        ("It is ٣", "3"),
        ("0" + "7" * 5000 + ".50", "7" * 5000 + ".5"),
        ("Because.\nIt is PARIS.\n", "it is paris"),
        ("", ""),
    ],
)
def test_final_answers(text, final):
    assert consistency.final_answer(text) == final


def test_samples_agree_where_enough_of_them_end_alike():
    assert consistency.agreeing(["so 4", "4.0", "#### 5"], 0.6) == [True, True, False]
    assert consistency.agreeing(["so 4", "4.0", "#### 5"], 0.7) == [False] * 3
    assert consistency.agreeing(["4", "5"], 0.5) == [False] * 2  # as frequent
    assert consistency.agreeing(["4"], 1.0) == [True] and consistency.agreeing(["", ""], 0.5) == [False] * 2


def test_token_f1_by_hand():
    assert consistency.token_f1("the cat sat", "The cat, the dog") == 2 * 2 / 7
    assert consistency.token_f1("", "?") == 1 and consistency.token_f1("a", "") == 0
    assert consistency.mean_f1(["a b", "a c", "a b"]) == [0.75, 0.5, 0.75] and consistency.mean_f1(["x"]) == [1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("48/2 = <<48/2=24>>24, and <<48+24=72>>72", None),
        ("<<1,200*.5=600>> <<(3+4)*-2=-14>> <<0.1+0.2=0.3>> <<05+1=6>>", None),
        ("<<10/3=3.33>> <<2/3=.67>> <<561//10=56>>", None),
        ("<<2/3=.66>>", ("wrong_sum", "'2/3=.66' is 0.666667")),
        ("<<10/4=2>>", ("wrong_sum", "'10/4=2' is 2.5")),
        ("<<3*4=13>>", ("wrong_sum", "'3*4=13' is 12")),
        ("<<9**9**9**9=1>>", ("wrong_sum", "'9**9**9**9=1' cannot be computed")),
        ("<<1+__import__('os').abort()=1>>", ("wrong_sum", "\"1+__import__('os').abort()=1\" cannot be computed")),
        ("<<1/0=0>>", ("wrong_sum", "'1/0=0' cannot be computed")),
        ('cout << "n = "; cin >> n;\nfor (int i = 0; i < 9; i++) cout << i << "=" << endl;\ncin >> m; <<3+4>>', None),
        ("<<1e99999999=1>>", ("wrong_sum", "'1e99999999=1' cannot be computed")),
        ("<<1=1e-99999999>>", ("wrong_sum", "'1=1e-99999999' cannot be computed")),
        ("<<2e3+.5=2000.5>>", None),
        ("<<1else 2=1>>", ("wrong_sum", "'1else 2=1' cannot be computed")),
        ("<<" + "(" * 5000 + "=1>>", ("wrong_sum", f"{'(' * 80!r} cannot be computed")),
        ("no sum", None),
    ],
)
def test_sums_are_computed_anew(text, reason):
    assert consistency.wrong_sum(text) == reason


# ---- balance


def test_balance_keeps_as_many_rows_as_can_be_under_the_cap():
    draw = random.Random(1)
    for _ in range(80):
        counts = {kind: draw.randint(0, 6) for kind in "abcd"[: draw.randint(1, 4)]}
        share = draw.choice([0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0])
        kept = balance.most_of_each(counts, share)
        total = sum(kept.values())
        assert all(kept[kind] <= counts[kind] and kept[kind] <= Fraction(repr(share)) * total for kind in counts)
        every = itertools.product(*(range(count + 1) for count in counts.values()))
        fits = [sum(one) for one in every if all(n <= Fraction(repr(share)) * sum(one) for n in one)]
        assert total == max(fits)


def test_which_rows_of_a_kind_stay_depends_on_the_seed_and_not_on_the_order():
    rows = [("a", f"a {i}") for i in range(20)] + [("b", f"b {i}") for i in range(6)]
    mixed = random.Random(0).sample(rows, len(rows))

    def stay(rows, seed):
        kept = balance.balanced([kind for kind, _ in rows], [text for _, text in rows], 0.5, seed)
        return {text for (_, text), one in zip(rows, kept, strict=True) if one}

    assert stay(rows, 0) == stay(mixed, 0) != stay(rows, 1) and len(stay(rows, 0)) == 12
    assert stay(rows[:20], 0) == set()
