"""`pst probe`: what a linear probe finds where it is known what there is to be found."""

import json

import numpy as np
import pytest
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.data.sample import ReasoningSample
from pst_dist.diagnostics import probe as module
from pst_dist.diagnostics.linear_probe import (
    FOLDS,
    Share,
    closeness,
    fold_of_rows,
    majority_rows,
    predicted,
    remainder,
    right_rows,
)
from pst_dist.diagnostics.probe import probe
from pst_dist.diagnostics.probe_labels import Label, labels_of
from pst_dist.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
N, D = 300, 20
CLASSES = RNG.integers(0, 3, N)
TOPIC = RNG.normal(size=(N, D))
FOLD = fold_of_rows(N)


def coded(strength: float) -> np.ndarray:
    """[N, D]: noise, with the class in three directions."""
    vectors = RNG.normal(size=(N, D))
    vectors[:, :3] += strength * np.eye(3)[CLASSES]
    return vectors


def test_folds_are_of_equal_size_and_the_same_every_time():
    assert sorted(np.bincount(fold_of_rows(103)).tolist()) == [20, 20, 21, 21, 21]
    assert (fold_of_rows(103) == fold_of_rows(103)).all() and FOLDS == 5


def test_a_class_that_is_there_is_read_and_one_that_is_not_stays_at_chance():
    assert right_rows(coded(5), CLASSES, FOLD).mean() > 0.95
    guessed = right_rows(RNG.normal(size=(N, 200)), CLASSES, FOLD).mean()
    assert abs(guessed - 1 / 3) < 0.09, "more directions than a fit can bear, and still no row is seen before"


def test_the_regularisation_is_chosen_by_exact_leave_one_out():
    from sklearn.linear_model import RidgeCV

    vectors, target = RNG.normal(size=(60, 5)), RNG.normal(size=(60, 1))
    target += vectors[:, :1]
    folds = fold_of_rows(60)
    ours = predicted(vectors, target, folds, closeness)
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        power = np.square(vectors[train] - vectors[train].mean(0)).sum()
        stock = RidgeCV(alphas=[power * strength for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)])
        stock.fit(vectors[train], target[train])
        assert np.allclose(ours[test], stock.predict(vectors[test]).reshape(-1, 1))


def test_the_remainder_is_what_the_question_does_not_predict():
    map_ = RNG.normal(size=(D, D))
    answer = np.zeros((N, D))
    answer[:, :3] = 3 * np.eye(3)[CLASSES]
    left = remainder(TOPIC @ map_ + answer, TOPIC, FOLD)
    assert left.explained > 0.8 and left.cosine.mean > 0.9
    assert right_rows(left.vectors, CLASSES, FOLD).mean() > 0.95
    only_topic = remainder(TOPIC @ map_, TOPIC, FOLD)
    assert only_topic.explained > 0.999
    nothing = remainder(RNG.normal(size=(N, D)), TOPIC, FOLD)
    assert abs(nothing.explained) < 0.15


def test_the_majority_is_never_under_a_half_of_two_and_errors_are_those_of_a_mean():
    assert majority_rows(np.array([0] * 60 + [1] * 40)).mean() == 0.6
    assert majority_rows(np.array([0, 1] * 50)).mean() == 0.5
    share = Share.of(np.array([1, 0, 1, 1]))
    assert share.mean == 0.75 and share.stderr == pytest.approx(0.25)
    assert Share(0.3, 0.1).is_positive and not Share(0.15, 0.1).is_positive


@pytest.mark.parametrize(
    ("question", "rationale", "verdict"),
    [(0.0, 4.0, "yes"), (0.0, 0.0, "no"), (4.0, 4.0, "no")],
    ids=["the rationale knows it", "nobody knows it", "the question knows as much"],
)
def test_the_verdict_says_whether_the_targets_know_more_than_the_question(question, rationale, verdict):
    one = module._probe_encoder("e", coded(question), coded(rationale), [Label("answer", CLASSES)], FOLD)
    # Where the question knows the answer too, its part of the rationale is removed: the remainder knows nothing.
    if question == 4.0:  # a rationale that says the question again
        both = coded(4)
        one = module._probe_encoder("e", both, both @ RNG.normal(size=(D, D)), [Label("answer", CLASSES)], FOLD)
    assert one.verdict == verdict


def rows(answers: list[str], kind: str) -> list[ReasoningSample]:
    return [
        ReasoningSample(id=f"r{k}", question=f"q{k}", answer=answer, rationales=("r",), answer_type=kind)
        for k, answer in enumerate(answers)
    ]


def test_every_kind_of_answer_gives_labels_or_a_reason():
    (label,), why = labels_of(rows(["yes", "no", "no"] * 20, "bool"))
    assert (label.name, label.classes.tolist()[:3], why) == ("answer", [1, 0, 0], "")
    (label,), _ = labels_of(rows([str(k) for k in range(100)], "number"))
    assert label.name == "answer above 49.5" and label.classes.sum() == 50
    letters = [a + b for a in "abcde" for b in "xyz"] * 4
    assert [one.name for one in labels_of(rows(letters[:60], "text"))[0]] == ["first character", "second character"]
    for answers, kind, said in (
        (["yes"] * 60, "bool", "every row has the same answer, 'yes'"),
        (["7"] * 60, "number", "one number is too frequent"),
        ([f"{chr(945 + k)}" for k in range(60)], "text", "60 different answers in 60 rows are too many classes"),
    ):
        labels, why = labels_of(rows(answers, kind))
        assert labels == [] and said in why


@pytest.mark.encoder
def test_the_verb_takes_vectors_of_a_run_and_compares_encoders(tmp_path, capsys):
    import zoo

    from pst_dist.config.loading import dump_config
    from pst_dist.config.locate import RESOLVED
    from pst_dist.pipeline import make_embeddings, make_shards

    rows_ = {
        "data__train": "gen:coin_flip?rows=70&seed=0",
        "data__validation_size": 10,
        "task": "coin_flip",
        "data__test": "gen:coin_flip?rows=12&seed=0",
    }
    config = small_config(tmp_path / "run" / "data", tmp_path / "run", **rows_)
    make_shards(config)
    make_embeddings(config)
    (tmp_path / "run" / RESOLVED).write_text(dump_config(config))
    other = zoo.make("gpt2", tmp_path / "gpt2")
    assert run_verb(["probe", str(tmp_path / "run"), "--json", "--encoder", f"{other},layer=1"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [one["encoder"] for one in found["encoders"]] == ["minilm", "gpt2,layer=1"]
    assert found["rows"] == 70 and "probe: 70 of 70 rationales were embedded before" in err
    assert "probe: 0 of 70 rationales were embedded before" in err
    assert all(one["readings"] for one in found["encoders"])
    for one in found["encoders"]:
        assert one["verdict"] in ("yes", "no", "unclear")
        for reading in one["readings"]:
            assert {"majority", "question", "rationale", "remainder"} < reading.keys()
    assert run_verb(["probe", str(tmp_path / "run"), "-n", "60"]) == 0
    text = capsys.readouterr().out
    assert "verdict for minilm: the targets" in text and "lower bound" in text


def test_what_cannot_be_probed_is_refused():
    config = load_config(None, ["data.train=gen:last_letters?rows=20&seed=0&words=2"])
    with pytest.raises(DataError, match=r"20 rows have a rationale; a probe needs at least 50"):
        probe(config)
    with pytest.raises(ConfigError, match=r"'layer' is not key=value"):
        probe(config, ["smollm2,layer"])
