"""Every parser of text that comes from outside, as a function of bytes, with valid inputs to start from."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import StudentConfig, TrainConfig
from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks.number_markup import NotANumber

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Parser:
    """One parser."""

    name: str
    read: Read
    """Of the input and an empty folder in which it may be put; raises PstError, and nothing else, for a bad one."""
    seeds: Sequence[bytes]
    """Valid inputs."""
    weight: float = 1.0
    """Its share of the inputs; less for a slow one."""


PARSERS: list[Parser] = []


def parser(name: str, *seeds: bytes | str | dict[str, Any], weight: float = 1.0) -> Callable[[Read], Read]:
    """List a function as a parser; a seed that is no bytes is written as UTF-8 or JSON."""
    valid = [
        seed if isinstance(seed, bytes) else (seed if isinstance(seed, str) else json.dumps(seed)).encode()
        for seed in seeds
    ]

    def listed(read: Read) -> Read:
        PARSERS.append(Parser(name, read, valid, weight))
        return read

    return listed


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _text(content: bytes) -> str:
    """As the system decodes arguments and the output of programs that we read as text."""
    return content.decode("utf-8", "surrogateescape")


# ---- settings


@parser(
    "config",
    "arm: pst\noutput_dir: runs/x\ndata:\n  train: rows.jsonl\n  columns: {question: q, answer: a}\ntrain:\n"
    "  learning_rate: 1.0e-3\n  max_steps: 10\nloss: {alignment_weight: 0.5}\narms: [pst, answer_only]\n",
    {"task": "svamp", "seed": 3, "train": {"bf16": True}, "evaluate": {"max_rows": 4}, "data": {"test_size": 0.1}},
    weight=2,
)
def _config(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import dump_config, load_config

    return dump_config(load_config(str(_file(folder, "config.yaml", content))))


@parser(
    "override",
    "train.learning_rate=1e-3",
    "arms=[pst,answer_only]",
    "data.columns={question: q, answer: a}",
    "data.train=[a.jsonl, b.jsonl]",
    "layout.prompt=Q {question}",
    weight=2,
)
def _override(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import load_config

    return load_config(None, [_text(content)])


@parser(
    "experiment",
    "name: mine\ntasks:\n  letters: {task: last_letter_concatenation, data.train: 'gen:letters'}\n"
    "variants: {a: {arm: answer_only}, b: {arm: pst, loss.centre: false}}\nvary: {train.max_steps: [1, 2]}\n"
    "seeds: [0, 1]\npairs: [[a, b]]\nsettings: {train: {max_steps: 3}}\n",
    {
        "name": "x",
        "tasks": {"t": {"config": "demo"}},
        "variants": {"v": {"arm": "pst"}},
        "overrides": {"train.max_steps": 1},
    },
    weight=0.5,
)
def _experiment(content: bytes, folder: Path) -> object:
    from pst_dist.experiment.spec import load_experiment, runs_of

    wanted = load_experiment(str(_file(folder, "experiment.yaml", content)))
    return runs_of(wanted)


_DEEPSPEED = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": None},
    "comms_logger": {"enabled": False},
    "wall_clock_breakdown": False,
}


@parser(
    "deepspeed", _DEEPSPEED, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
)
def _deepspeed(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.cost import _bucket_elements, zero_stage
    from pst_dist.training.deepspeed_config import deepspeed_settings

    path = str(_file(folder, "ds.json", content))
    stage = zero_stage(path)
    return _bucket_elements(path, 1_000, stage or 0), deepspeed_settings(TrainConfig(deepspeed=path), 2)


@parser("hostfile", "one slots=8\ntwo slots=8\n# three\n10.0.0.1 slots=1\n")
def _hostfile(content: bytes, folder: Path) -> object:
    from pst_dist.distributed.hostfile import read_hostfile

    return read_hostfile(_file(folder, "hostfile", content))


@parser("slurm words", "nodes=2 gpus=a100:8 time=04:00:00 arms=[pst] seeds=[0,1] sbatch.comment=x train.bf16=true")
def _slurm_words(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.script import read_words, render
    from pst_dist.config.loading import load_config

    request, rest = read_words(_text(content).split(" "))
    return render(request, load_config(None, rest), folder / "config.yaml")


@parser("ray words", "address=http://127.0.0.1:8265 verb=train env.A=b cpus=2 gpus=0.5 name=x exclude=[a,b]")
def _ray_words(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.ray.submit import read_words

    return read_words(_text(content).split(" "))


# ---- what clusters and machines print


@parser(
    "scontrol",
    "JobId=12 JobName=pst-x\n   UserId=me(1000) JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0\n"
    "   NodeList=node[1-2]\n   Command=/x/50%/slurm/train.sbatch\n   StdOut=/x/slurm/12.log\n\n"
    "JobId=13 ArrayJobId=13 ArrayTaskId=1-5%2 JobState=FAILED ExitCode=0:9 Reason=NonZeroExitCode NodeList=(null)\n"
    "   StdOut=/x y/%A_%a.log\n",
)
def _scontrol(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.follow import _by_number, read_jobs

    tasks = read_jobs(content.decode("utf-8", "replace"))
    ended = [task.result for task in tasks if task.ended]
    return [task.line for task in sorted(tasks, key=lambda task: _by_number((task.number, task)))], ended


@parser("sinfo", "gpu|gpu*|up|4|gpu:a100:8(S:0-1),gpu:h100:4\ncpu|cpu|down|12|(null)\ngpu|gpu*|up|2|gpu:2\n")
def _sinfo(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.script import SlurmRequest
    from pst_dist.clusters.slurm.submit import check_room, read_partitions

    return check_room(SlurmRequest(nodes=1, gpus="8"), read_partitions(content.decode("utf-8", "replace")))


@parser("squeue", "12|pst /x/runs/demo\n13_4|(null)\n", weight=0.5)
def _squeue(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.submit import read_own_jobs

    return read_own_jobs(content.decode("utf-8", "replace"))


@parser(
    "nvidia-smi", "0, NVIDIA H200, 143771, 1, 9.0, 570.1, [N/A], 0\n1, NVIDIA H200, 143771, 1, 9.0, 570.1, Enabled, 2\n"
)
def _nvidia(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.machine.facts import read_gpus

    return read_gpus(content.decode("utf-8", "replace"))


@parser("mounts", "/dev/sda / ext4 rw 0 0\ntmpfs /tmp\\040x tmpfs rw 0 0\nnfs:/a /scratch nfs4 rw 0 0\n", weight=0.3)
def _mounts(content: bytes, folder: Path) -> object:
    from pst_dist.storage.mounts import filesystem_of

    return filesystem_of(folder, content.decode("utf-8", "replace"))


@parser("ray dashboard", {"ray_version": "2.50.0", "ray_commit": "x", "session_name": "s"}, weight=0.5)
def _dashboard(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.ray.dashboard import read_version

    return read_version(content, "http://127.0.0.1:8265")


@parser("peer hello", {"rank": 1, "host": "node-1"})
def _peer(content: bytes, folder: Path) -> object:
    from pst_dist.distributed.peer_link import LinkClosed, _parsed

    with contextlib.suppress(LinkClosed):  # the watcher's own signal
        return _parsed(content)
    return None


_NODE = {
    "kind": "pst doctor",
    "host": "a",
    "python": "3.11.7",
    "pst_dist": "0.1",
    "code": "0f",
    "packages": {"torch": "2.9", "ray": "2.50"},
    "torch_cuda": "13.0",
    "nccl": None,
    "gpus": [{"index": 0, "name": "H200", "memory_mib": 143771, "used_mib": 1, "capability": "9.0"}],
    "driver": "570",
    "cores": 8,
}


@parser("doctor report", _NODE, {**_NODE, "host": "b", "gpus": []})
def _doctor(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.machine.facts import differences, read_report

    reports = [read_report(_file(folder, "a.json", content)), _NODE]
    return [found.line() for found in differences(reports)]


# ---- models


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
_T5 = {"model_type": "t5", "d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 16, "vocab_size": 99}
_GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_positions": 64, "vocab_size": 99, "n_inner": None}
_BERT = {
    "model_type": "bert-generation",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    "max_position_embeddings": 32,
}


@parser(
    "model config",
    _LLAMA,
    _T5,
    _GPT2,
    {"text_config": _LLAMA},
    {"model_type": "encoder-decoder", "encoder": _BERT, "decoder": {**_BERT, "is_decoder": True}},
    weight=2,
)
def _model(content: bytes, folder: Path) -> object:
    from pst_dist.config.schema import Config
    from pst_dist.diagnostics.cost import rank_memory, teacher_width
    from pst_dist.diagnostics.model_size import shape_of

    _file(folder, "config.json", content)
    shape = shape_of(StudentConfig(model_name_or_path=str(folder)), max_length=64)
    config = Config()
    (folder / "model.safetensors").unlink(missing_ok=True)
    teacher_width(config.model_copy(update={"embed": config.embed.model_copy(update={"encoder": str(folder)})}))
    return rank_memory(config, shape, shape.parameters, 0, 1, micro_tokens=512).total


def _safetensors(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


_WEIGHTS = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}


@parser("weights", _WEIGHTS, _safetensors(_WEIGHTS, 24))
def _weights(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.model_size import _counted

    if content[:1] == b"{":  # the header alone, so that its values are changed and its length is right
        content = struct.pack("<Q", len(content)) + content + b"\0" * 24
    path = _file(folder, "model.safetensors", content)
    try:
        return _counted(folder)
    finally:
        path.unlink()


# ---- runs


_RESULTS = {
    "task": "svamp",
    "split": "test",
    "rows": 2,
    "accuracy": 0.5,
    "accuracy_stderr": 0.3,
    "unparsed": 0,
    "incomplete": 0,
    "contains_answer": 0.5,
    "tokens_to_answer": {"mean": 3.0, "median": 3.0, "p95": 4.0},
    "milliseconds_to_answer": {"median": 9.0, "p90": 10.0, "rows": 2},
    "arm": "pst",
    "variant": ["raw"],
    "seed": 0,
    "chance": 0.25,
    "majority": 0.5,
    "rows_per_second": 10.0,
    "rationale_similarity": {"mean": 0.5, "shuffled_mean": 0.1},
    "parameters": 1000,
    "device": "cpu (x86_64)",
    "student": {"digest": "0f", "step": 3},
    "shards": "0f",
    "training": {"steps": 3, "seconds": 1.5, "tokens": 99, "best_step": 3, "best_value": 0.5, "metric": "accuracy"},
}
_TRAINING = {"fingerprint": "0f", "steps": 3, "seconds": 1.5, "tokens": 99, "best_step": 2, "best_value": 0.1}


@parser("results", _RESULTS, {**_RESULTS, "milliseconds_to_answer": None, "rationale_similarity": None}, weight=1.5)
def _results(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.compare import ArmResult, Comparison, cells
    from pst_dist.evaluation.records import check_comparable, check_whole, read_results
    from pst_dist.publish import compare_page, run_page

    path = _file(folder, "results.json", content)
    results = read_results(path)
    check_comparable(results, path)
    arm = ArmResult("pst", folder, results, [], None, None)
    comparison = Comparison("svamp", "test", 2, "pst", [arm])
    check_whole(results, path)
    pieces = [run_page._headline([results], _TRAINING), run_page._scores([results]), comparison.table(), cells(arm)]
    return [*pieces, compare_page._comparison_headline(comparison), run_page._digests(None, [results])]


@parser("train.json", {**_TRAINING, "metric": "accuracy"}, weight=0.7)
def _training(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_training
    from pst_dist.publish import run_page

    return run_page._headline([], read_training(_file(folder, "train.json", content), whole=True))


@parser(
    "metrics",
    '{"step": 1, "answer_nll": 2.0, "alignment": 0.5, "cosine": 0.1, "gradient_share_answer": 0.4}\n'
    '{"step": 2, "answer_nll": 1.0, "alignment": 0.4, "cosine": 0.2, "gradient_share_alignment": 0.6}\n'
    '{"step": 2, "validation": {"answer_nll": 1.5, "accuracy": 0.5}}\n'
    '{"bad_step": "loss is nan", "outcome": "left out", "samples": ["a"], "step": 3}\n',
)
def _metrics(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_metrics
    from pst_dist.publish.plots import series, validation_series

    metrics = read_metrics(_file(folder, "metrics.jsonl", content))
    names = ("answer_nll", "alignment", "cosine", "gradient_share_answer")
    return [[float(value) for value in series(metrics, name)[1]] for name in names], [
        [float(value) for value in validation_series(metrics, name)[1]] for name in ("answer_nll", "accuracy")
    ]


@parser("curves", PARSERS[-1].seeds[0], weight=0.004)
def _curves(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_metrics
    from pst_dist.publish.plots import cosine_plot, gradient_plot, loss_plot, validation_plot

    metrics = read_metrics(_file(folder, "metrics.jsonl", content))
    pictures = loss_plot(metrics), cosine_plot(metrics), gradient_plot(metrics)
    return pictures, validation_plot(metrics, 2, "accuracy")


_SAMPLE = {"id": "a", "question": "q?", "gold": "7", "correct": True, "prediction": "7", "answer_text": " 7"}


@parser("samples", json.dumps(_SAMPLE) + "\n" + json.dumps({**_SAMPLE, "id": "b", "correct": False}) + "\n")
def _samples(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.compare import _same_rows
    from pst_dist.evaluation.records import read_rows

    rows = read_rows(_file(folder, "samples.jsonl", content))
    return _same_rows(folder, rows, folder, rows)


_OUTCOME = {
    "run": "letters / pst / seed 0",
    "config": {"arm": "pst", "seed": 0, "train": {"max_steps": 3}},
    "shards": "0f",
    "rows": "0f",
    "right": "0110",
    "results": {key: _RESULTS[key] for key in ("arm", "task", "split", "parameters", "unparsed", "device")}
    | {"tokens_to_answer": {"mean": 3.0}, "milliseconds_to_answer": {"median": 9.0}, "chance": 0.2},
}


@parser("outcomes", json.dumps(_OUTCOME) + "\n" + json.dumps({**_OUTCOME, "run": "other"}) + "\n")
def _outcomes(content: bytes, folder: Path) -> object:
    from pst_dist.experiment.outcomes import _read

    return {name: outcome.to_line() for name, outcome in _read(_file(folder, "outcomes.jsonl", content)).items()}


def _written(write: Callable[[Path], object], name: str) -> bytes:
    """The bytes of a file that one of our writers makes."""
    with tempfile.TemporaryDirectory(prefix="pst-fuzz-") as folder:
        write(Path(folder))
        return (Path(folder) / name).read_bytes()


def _write_manifest(folder: Path) -> None:
    from pst_dist.storage.manifest import Manifest, write_manifest

    files = {"a.tar": {"bytes": 3, "sha256": "0" * 64}}
    write_manifest(
        folder,
        Manifest(
            "shards", "0f", files, {"schema_version": 1, "samples_per_shard": 2, "counts": {"train": 2}, "shards": []}
        ),
    )


@parser("manifest", _written(_write_manifest, "manifest.json"))
def _manifest(content: bytes, folder: Path) -> object:
    from pst_dist.data.shards import ShardSet
    from pst_dist.storage.manifest import read_manifest
    from pst_dist.storage.outputs import refuse_foreign_folder

    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    _file(shards, "manifest.json", content)
    refuse_foreign_folder(shards, "shards")
    manifest = read_manifest(shards, "shards")
    return manifest is not None and ShardSet.open(shards, verify=False)


@parser(
    "forged manifest",
    {
        "fingerprint": "0f",
        "files": {"train-000000.tar": {"bytes": 3, "sha256": "0" * 64}},
        "extra": {
            "schema_version": 1,
            "counts": {"train": 2},
            "shards": [
                {
                    "name": "train-000000.tar",
                    "split": "train",
                    "samples": 2,
                    "bytes": 3,
                    "sha256": "0" * 64,
                    "rationales": 1,
                }
            ],
        },
    },
)
def _forged(content: bytes, folder: Path) -> object:
    """A manifest with a correct digest, as anyone who can write to the directory could forge one."""
    from pst_dist.storage.manifest import digest_of

    fields = {"kind": "shards", "fingerprint": "", "files": {}, "extra": {}}
    (folder / "shards").mkdir(exist_ok=True)
    _file(folder, "shards/train-000000.tar", b"tar")
    text = content
    with contextlib.suppress(ValueError, RecursionError, TypeError):  # no JSON, or none that has a digest
        fields |= json.loads(content)
        fields["digest"] = digest_of({key: fields[key] for key in ("kind", "fingerprint", "files", "extra")})
        text = (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    return _manifest(text, folder)


@parser("checkpoint state", {"step": 3, "fingerprint": "0f", "settings": {"a": 1}, "engine": "plain", "world_size": 1})
def _state(content: bytes, folder: Path) -> object:
    from pst_dist.storage.json_files import read_typed
    from pst_dist.training.state import RunState

    return read_typed(_file(folder, "run_state.json", content), RunState)


@parser("tracker ids", {"wandb": "abc", "mlflow": "def"}, weight=0.3)
def _trackers(content: bytes, folder: Path) -> object:
    from pst_dist.training.trackers import _IDS, TrackedRun

    _file(folder, _IDS, content)
    return TrackedRun(folder, "x", 3).known_id("wandb")


# ---- rows


_ROW = {"question": "How many?", "answer": "#### 7", "rationale": "3 + 4", "choices": ["a", "b"], "id": 1}


def _rows(suffix: str) -> Read:
    def read(content: bytes, folder: Path) -> object:
        from pst_dist.data.sources.readers import read_file

        return list(read_file(_file(folder, f"rows.{suffix}", content)).entries)

    return read


_LINES = json.dumps(_ROW) + "\n" + json.dumps({**_ROW, "id": 2, "answer": 3.5}) + "\n"
parser("rows.jsonl", _LINES)(_rows("jsonl"))
parser("rows.json", json.dumps([_ROW, _ROW]), {"data": [_ROW]}, {"question": ["a", "b"], "answer": ["c", "d"]})(
    _rows("json")
)
parser("rows.csv", 'question,answer\n"a, b",7\nc;d,8\n', "question;answer\na;7\n")(_rows("csv"))
parser("rows.tsv", "question\tanswer\na b\t7\n", weight=0.5)(_rows("tsv"))


@parser(
    "data survey",
    _LINES,
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "7"}]}\n',
    weight=0.5,
)
def _survey(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import load_config
    from pst_dist.diagnostics.rows import check

    path = _file(folder, "survey.jsonl", content)
    config = load_config(None, [f"data.train={path}", "data.validation_size=0", "data.max_bad=1000"])
    return check(config, folder / "rejects.jsonl").lines()


@parser("split file", {"train": [0, 1, 2], "test": [3], "validation": [4]}, weight=0.7)
def _split(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.splits import read_split_file

    return read_split_file(_file(folder, "split.json", content), 5)


@parser(
    "completions",
    json.dumps(["so 7. The answer is 7", "8"]),
    {
        "data": {
            "0": [{"sample_index": 0, "reasoning_completion": "so", "completion": "7", "question": "q", "answer": "7"}]
        },
        "metadata": {},
    },
)
def _completions(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.completions import read_completions

    return read_completions(str(_file(folder, "teacher.json", content)), folder)


@parser(
    "replies", "<think>3 + 4</think>\nso\n**Answer:** $\\boxed{7}$", "Reasoning. #### 7", "The answer is (C). Wait, D."
)
def _replies(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.replies import split_reply

    with contextlib.suppress(RowError):  # becomes a bad row
        return split_reply(content.decode("utf-8", "replace"))
    return None


@parser("numbers", "1,234.5", "$\\frac{1}{2}$", "-3 %", "1.5e3", "12 1/2", "$3 million", "\\boxed{7}")
def _numbers(content: bytes, folder: Path) -> object:
    from pst_dist.data.tasks.numbers import read_number

    with contextlib.suppress(NotANumber):
        return read_number(content.decode("utf-8", "replace"))
    return None


# ---- shards and embeddings


def _write_shard(folder: Path) -> None:
    from pst_dist.data.sample import ReasoningSample
    from pst_dist.data.shard_tar import write_shard

    samples = [
        ReasoningSample(id=name, question=f"{name}?", answer="7", rationales=("3 + 4",), source="x:1") for name in "ab"
    ]
    write_shard(folder / "shard.tar", samples)


@parser("shard", _written(_write_shard, "shard.tar"))
def _shard(content: bytes, folder: Path) -> object:
    from pst_dist.data.shard_tar import read_shard

    return read_shard(_file(folder, "train-000000.tar", content))


@parser(
    "sample",
    {"id": "a", "question": "q?", "answer": "7", "rationales": ["r"], "answer_type": "text"}
    | {"choices": [], "source": ""},
)
def _sample(content: bytes, folder: Path) -> object:
    from pst_dist.data.shard_tar import parse_sample

    return parse_sample(content, "shard.tar")


def _write_vectors(folder: Path) -> None:
    import numpy as np

    from pst_dist.embedding.vector_file import ShardVectors, write_vectors

    vectors = np.array([[1, 0], [0, 1]], dtype="float32")
    content = ShardVectors(
        keys=[("a", 0), ("b", 0)], vectors=vectors, identity={"dimension": 2}, shard_sha256="0f", truncated=0
    )
    write_vectors(folder / "vectors.safetensors", content)


@parser("vectors", _written(_write_vectors, "vectors.safetensors"))
def _vectors(content: bytes, folder: Path) -> object:
    from pst_dist.embedding.vector_file import read_vectors

    return read_vectors(_file(folder, "train-000000.safetensors", content))


@parser(
    "answer format",
    {
        "arm": "pst",
        "prompt": "Q: {question}",
        "answer_marker": " so",
        "max_length": 64,
        "semantic_position": "after",
        "semantic_tokens": 1,
    },
    weight=0.7,
)
def _format(content: bytes, folder: Path) -> object:
    from pst_dist.storage.json_files import read_typed
    from pst_dist.student.layout import AnswerFormat

    return read_typed(_file(folder, "pst.json", content), AnswerFormat).problem()


PARSERS_BY_NAME = {one.name: one for one in PARSERS}
