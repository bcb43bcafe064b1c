"""Bad steps on one of two ranks: all ranks leave the weights alone together, skip, go back or stop alike, and resume.

One launch of two gloo ranks trains every case on real faults; one process trains the same with the same faults.
"""

from pathlib import Path

import pytest
import torch
from injections import injected
from ranks import launch, stop_at
from run_files import curve, state
from safetensors.torch import load_file
from small_run import small_config

from pst_dist.config.loading import load_config
from pst_dist.config.schema import TrainConfig
from pst_dist.errors import DivergedError, StaleError
from pst_dist.storage.manifest import read_json, read_lines
from pst_dist.training.bad_steps import Answer, after_good_step, after_rollback, after_skip, answer_to, spike_fault
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.fingerprint import check_changes, training_settings
from pst_dist.training.trainer import train

ranks_and_data = [pytest.mark.distributed, pytest.mark.encoder, pytest.mark.timeout(1500)]
STAGES = ("zero0", "zero1", "zero2", "zero3")
# Two passes a rank, so that gradients of several passes have to be forgotten.
BASE = {"train__save_steps": 2, "train__save_total_limit": 9, "train__per_device_train_batch_size": 2}
SKIP = {"train__skip_bad_steps": 4, **BASE}
BACK = {"train__max_rollbacks": 1, **BASE}
FAULTS = {3: "inf", 6: "nan"}


def bad(step=0, *, skipped=(), rollbacks=(), **train):
    """The answer to a bad step after `step`."""
    run = RunState(
        "f", "single", 1, step=step, skipped_steps=list(skipped), rollbacks=[list(pair) for pair in rollbacks]
    )
    return answer_to(run, TrainConfig(**train))


def test_the_first_bad_step_stops_unless_a_budget_allows_it():
    assert bad(4) is Answer.STOP
    assert bad(4, skip_bad_steps=1) is Answer.SKIP
    assert bad(9, skip_bad_steps=1, skipped=[5]) is Answer.STOP
    assert bad(9, skip_bad_steps=2, skipped=[5]) is Answer.SKIP


def test_three_in_a_row_are_too_many_whatever_the_budget():
    assert bad(6, skip_bad_steps=9, skipped=[6]) is Answer.SKIP
    assert bad(6, skip_bad_steps=9, skipped=[5, 6]) is Answer.STOP
    assert bad(7, skip_bad_steps=9, skipped=[5, 6]) is Answer.SKIP
    assert bad(6, skip_bad_steps=9, skipped=[5, 6], max_rollbacks=1) is Answer.ROLL_BACK


def test_after_going_back_the_budget_is_whole_again_and_the_number_of_rollbacks_is_not():
    settings = {"skip_bad_steps": 2, "max_rollbacks": 1}
    assert bad(8, skipped=[5, 6], rollbacks=[(4, 7)], **settings) is Answer.SKIP
    assert bad(9, skipped=[5, 6, 8, 9], rollbacks=[(4, 7)], **settings) is Answer.STOP


def test_a_spike_is_judged_by_the_median_of_a_full_window():
    train_config = TrainConfig(spike_factor=2, spike_window=3)
    run = RunState("f", "single", 1)
    for loss in (1.0, 9.0):
        run = after_good_step(run, loss, train_config)
    assert spike_fault(1e9, run, train_config) is None, "two of three steps"
    run = after_good_step(run, 3.0, train_config)
    assert spike_fault(6.0, run, train_config) is None
    assert "over 2 times 3, the median of 3 steps" in spike_fault(6.01, run, train_config)
    assert after_good_step(run, 4.0, train_config).recent_losses == [9.0, 3.0, 4.0]
    assert spike_fault(1e9, run, TrainConfig()) is None


def test_the_state_tells_what_was_skipped_and_passed_over():
    run = after_skip(RunState("f", "single", 1, step=4))
    assert (run.step, run.skipped_steps) == (5, [5])
    back = after_rollback(run, RunState("f", "single", 1, step=2))
    assert (back.step, back.rollbacks, back.skipped_steps) == (6, [[2, 6]], [5])


def test_budgets_may_be_changed_on_the_way_and_the_way_of_saving_always():
    def settings(**changes):
        return training_settings(
            load_config(None, [f"train.{key}={value}" for key, value in changes.items()]), "s", "e", 8
        )

    assert settings(save_in_background=True) == settings()
    changes = {"skip_bad_steps": 3, "max_rollbacks": 1, "spike_factor": 2.5, "spike_window": 9}
    with pytest.raises(StaleError, match=r"train\.max_rollbacks=0.*train\.accept_changes=true"):
        check_changes(settings(), settings(**changes), accept=False)
    assert check_changes(settings(), settings(**changes), accept=True) == [
        "train.max_rollbacks 0 -> 1",
        "train.skip_bad_steps 0 -> 3",
        "train.spike_factor null -> 2.5",
        "train.spike_window 100 -> 9",
    ]


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")

    def alone(name: str, faults: dict[int, str], **changes) -> None:
        (folder / name).mkdir()
        with injected(folder / name, faults, rank=0):
            train(small_config(small_data, folder / name, **changes))

    cases = []

    def case(name: str, faults: dict[int, str], resume: tuple[str, int] | None = None, **changes) -> None:
        raw = small_config(small_data, folder / name, **changes).model_dump(mode="json") | {"inject": faults}
        cases.append(raw | ({"resume": [str(folder / resume[0]), resume[1]]} if resume else {}))

    alone("skip", FAULTS, **SKIP)
    alone("back", {6: "inf"}, **BACK)
    for stage in STAGES:
        case(f"skip-{stage}", FAULTS, train__deepspeed=stage, **SKIP)
        case(f"skip-{stage}-bf16", FAULTS, train__deepspeed=stage, train__bf16=True, **SKIP)
        case(f"back-{stage}", {6: "inf"}, train__deepspeed=stage, **BACK)
        for fault in ("inf", "nan"):
            case(f"stop-{stage}-{fault}", {4: fault}, train__deepspeed=stage, **BASE)
    case("row-zero2", {3: "inf", 4: "nan", 5: "inf"}, train__deepspeed="zero2", **SKIP)
    # From before a skipped step, from after it with no fault left to find, and from after a rollback.
    case("skip-zero2-from-2", FAULTS, ("skip-zero2", 2), train__deepspeed="zero2", **SKIP)
    case("skip-zero3-from-4", {6: "nan"}, ("skip-zero3", 4), train__deepspeed="zero3", **SKIP)
    case("back-zero2-from-6", {99: "inf"}, ("back-zero2", 6), train__deepspeed="zero2", **BACK)
    case("back-from-4", {6: "inf"}, ("back", 4), train__deepspeed="zero1", **BACK)
    # Saving in the background: no fault, and one that goes back while a save may be in flight.
    for name, faults, stage in (("plain", {}, "zero3"), ("back", {6: "inf"}, "zero2")):
        beside = {"train__deepspeed": stage, "train__save_in_background": True, **(BACK if faults else BASE)}
        case(f"{name}-{stage}-beside", faults, **beside)
    case("plain-zero3", {}, train__deepspeed="zero3", **BASE)
    launch(cases, folder)
    return folder


def bad_steps(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_lines(run / "metrics.jsonl") if "bad_step" in row}


def check_untouched(run: Path, ranks: int = 2) -> None:
    """No rank took or moved anything in a bad step."""
    for rank in range(ranks):
        seen = read_json(run / f"injected-{rank}.json")
        assert seen and not any(step["taken"] or step["moved"] for step in seen), seen


def check_published(run: Path) -> None:
    """Every number in every tensor file under a final name is finite."""
    files = [path for path in run.rglob("*.safetensors") if ".partial" not in str(path)]
    assert files
    for path in files:
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path


class TestOnRanks:
    pytestmark = ranks_and_data

    @pytest.mark.parametrize("stage", STAGES)
    def test_skipped_steps_move_no_weight_and_the_losses_are_those_of_one_process(self, runs, stage):
        one, two = runs / "skip", runs / f"skip-{stage}"
        check_untouched(one, ranks=1)
        check_untouched(two)
        check_published(two)
        assert [row["step"] for row in curve(two)] == [1, 2, 4, 5, 7, 8]
        assert [row["loss"] for row in curve(two)] == pytest.approx([row["loss"] for row in curve(one)], abs=1e-5)
        assert [row["learning_rate"] for row in curve(two)] == [row["learning_rate"] for row in curve(one)]
        assert read_json(two / "checkpoints" / "checkpoint-8" / "run_state.json")["skipped_steps"] == [3, 6]
        last, first = state(two, 8), state(one, 8)
        assert all(torch.allclose(first[key], last[key], atol=2e-4) for key in first)

    @pytest.mark.parametrize("stage", STAGES)
    def test_the_same_in_bfloat16(self, runs, stage):
        run = runs / f"skip-{stage}-bf16"
        check_untouched(run)
        check_published(run)
        assert [row["step"] for row in curve(run)] == [1, 2, 4, 5, 7, 8]
        assert [row["loss"] for row in curve(run)] == pytest.approx(
            [row["loss"] for row in curve(runs / "skip")], abs=2e-2
        )

    @pytest.mark.parametrize("stage", STAGES)
    def test_the_line_of_a_bad_step_names_what_was_wrong_and_its_samples(self, runs, stage):
        rows = bad_steps(runs / f"skip-{stage}")
        assert rows[3]["bad_step"] == "the gradient norm is inf" or rows[3]["bad_step"] == "the gradient norm is nan"
        assert rows[6]["bad_step"] == "the alignment loss is not finite"
        assert all(row["outcome"] == "skipped" for row in rows.values())
        # A gradient does not say whose it is: the whole global batch. A loss does: the first pass of the last rank.
        assert len(rows[3]["samples"]) == 8 and len(rows[6]["samples"]) == 2

    @pytest.mark.parametrize("fault", ["inf", "nan"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_without_a_budget_all_ranks_stop_with_the_same_words_before_any_weight_moved(self, runs, stage, fault):
        run = runs / f"stop-{stage}-{fault}"
        check_untouched(run)
        check_published(run)
        words = [(run / f"refusal-{rank}.txt").read_text() for rank in range(2)]
        assert words[0] == words[1] and words[0].startswith("DivergedError: error[DIVERGED] step 4: the "), words
        assert "no weight was changed" in words[0] and "train.skip_bad_steps" in words[0]
        assert not (run / "train.json").exists()
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]

    def test_three_in_a_row_stop_all_ranks(self, runs):
        check_untouched(runs / "row-zero2")
        words = (runs / "row-zero2" / "refusal-1.txt").read_text()
        assert "step 5" in words and "earlier skips: 2" in words

    @pytest.mark.parametrize("stage", STAGES)
    def test_going_back_takes_the_weights_of_the_checkpoint_and_the_batches_after_the_bad_one(self, runs, stage):
        one, two = runs / "back", runs / f"back-{stage}"
        check_published(two)
        assert bad_steps(two)[6]["outcome"] == "rolled back to the weights of step 4"
        saved = read_json(two / "checkpoints" / "checkpoint-6" / "run_state.json")
        assert saved["rollbacks"] == [[4, 6]]
        at_four, at_six = state(two, 4), state(two, 6)
        assert all(torch.equal(at_four[key], at_six[key]) for key in at_four)
        assert [row["step"] for row in curve(two)] == [1, 2, 3, 4, 5, 7, 8]
        assert [row["loss"] for row in curve(two)] == pytest.approx([row["loss"] for row in curve(one)], abs=1e-5)

    @pytest.mark.parametrize(
        ("whole", "again"),
        [
            ("skip-zero2", "skip-zero2-from-2"),
            ("skip-zero3", "skip-zero3-from-4"),
            ("back-zero2", "back-zero2-from-6"),
        ],
    )
    def test_a_run_resumed_around_a_bad_step_ends_with_the_same_bits(self, runs, whole, again):
        assert [row["loss"] for row in curve(runs / again)] == [row["loss"] for row in curve(runs / whole)]
        one, two = state(runs / whole, 8), state(runs / again, 8)
        assert all(torch.equal(one[key], two[key]) for key in one)
        kept = [read_json(runs / run / "checkpoints/checkpoint-8/run_state.json") for run in (whole, again)]
        for key in ("step", "skipped_steps", "rollbacks", "tokens"):
            assert kept[0][key] == kept[1][key]

    @pytest.mark.parametrize("case", ["plain-zero3", "back-zero2"])
    def test_ranks_that_save_in_the_background_leave_the_same_files(self, runs, case):
        one, two = runs / case / "checkpoints", runs / f"{case}-beside" / "checkpoints"
        files = sorted(path.relative_to(one) for path in one.rglob("state-*"))
        assert len(files) == 2 * 4 and files == sorted(path.relative_to(two) for path in two.rglob("state-*"))
        assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)
        assert not list(two.glob(".*")), "nothing is left of writing"
        assert curve_of(runs / case) == curve_of(runs / f"{case}-beside")

    def test_another_number_of_ranks_goes_back_alike(self, runs):
        one, two = runs / "back", runs / "back-from-4"
        assert [row["step"] for row in curve(two)] == [1, 2, 3, 4, 5, 7, 8]
        assert [row["loss"] for row in curve(two)] == pytest.approx([row["loss"] for row in curve(one)], abs=1e-5)


class TestInOneProcess:
    pytestmark = pytest.mark.encoder

    def test_a_resumed_run_ends_with_the_same_bits_from_before_and_after_a_skipped_step(self, small_data, tmp_path):
        with injected(tmp_path, FAULTS, rank=0):
            train(small_config(small_data, tmp_path / "whole", **SKIP))
        for step in (2, 4, 6):
            stop_at(tmp_path / "whole", step, tmp_path / f"again-{step}")
            with injected(tmp_path, {bad: fault for bad, fault in FAULTS.items() if bad > step}, rank=0):
                train(small_config(small_data, tmp_path / f"again-{step}", **SKIP))
            one, two = state(tmp_path / "whole", 8), state(tmp_path / f"again-{step}", 8)
            assert all(torch.equal(one[key], two[key]) for key in one)
            assert curve_of(tmp_path / "whole") == curve_of(tmp_path / f"again-{step}")

    def test_a_spike_goes_back_and_the_run_learns_on(self, small_data, tmp_path):
        settings = {"train__spike_factor": 1.5, "train__spike_window": 3, "train__max_rollbacks": 2}
        settings |= {"train__max_steps": 20, "train__save_steps": 4, "train__save_total_limit": 9}
        config = small_config(small_data, tmp_path / "run", **settings)
        (tmp_path / "run").mkdir()
        with injected(tmp_path / "run", {14: "spike"}, rank=0):
            train(config)
        check_untouched(tmp_path / "run", ranks=1)
        rows = bad_steps(tmp_path / "run")
        assert list(rows) == [14] and rows[14]["outcome"] == "rolled back to the weights of step 12"
        assert "over 1.5 times" in rows[14]["bad_step"]
        losses = [row["loss"] for row in curve(tmp_path / "run")]
        assert losses[-1] < losses[12] < losses[0] - 4 and len(losses) == 19
        # A start from the checkpoint before it meets the same end.
        stop_at(tmp_path / "run", 12, tmp_path / "again")
        with injected(tmp_path, {14: "spike"}, rank=0):
            train(small_config(small_data, tmp_path / "again", **settings))
        assert curve_of(tmp_path / "again") == curve_of(tmp_path / "run")

    def test_a_rollback_without_a_checkpoint_stops(self, small_data, tmp_path):
        config = small_config(small_data, tmp_path, train__max_rollbacks=3)
        with injected(tmp_path, {2: "inf"}, rank=0), pytest.raises(DivergedError, match="step 2: the gradient norm"):
            train(config)

    def test_a_weight_that_is_not_finite_is_named_and_never_published(self, small_data, tmp_path, monkeypatch):
        """The optimizer itself spoils one weight, in a step whose loss and gradient are finite."""
        real = torch.optim.AdamW.step
        count = []

        def spoilt(optimizer, *arguments, **options):
            result = real(optimizer, *arguments, **options)
            count.append(1)
            if len(count) == 6:
                optimizer.param_groups[0]["params"][0].data.view(-1)[3] = float("inf")
            return result

        monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
        config = small_config(small_data, tmp_path, train__save_steps=2, train__eval_steps=8)
        with pytest.raises(DivergedError, match=r"checkpoint-6: weight \S+ is not finite; nothing was written here"):
            train(config)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
        check_published(tmp_path)
        monkeypatch.undo()
        assert train(config).steps == 8, "the same command goes on from before it"


def curve_of(run: Path) -> list[tuple]:
    """What a step measured, without the clock."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in curve(run)]
