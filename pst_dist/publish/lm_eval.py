"""The rows of `pst evaluate` as a task for the lm-evaluation-harness, to score an export with an independent program.

The task is written next to the export, never into it: test rows do not belong in a folder that may be published. The
scoring rules are this package's own source, copied into the task's `utils.py`, so the harness does not need this
package. The harness must score every row as `evaluate` does when it asks one question at a time.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.tasks import Task, get_task, number_answers, number_markup, numbers, scoring
from pst_dist.errors import ConfigError, InputError
from pst_dist.evaluation.scores import rows_to_score
from pst_dist.publish.export import expected_prompt
from pst_dist.storage.atomic import atomic_directory, write_text
from pst_dist.storage.manifest import canonical_json
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.contexts import max_positions
from pst_dist.student.saved import LoadedStudent, load_student

_ROWS = "rows.jsonl"
_SCHEMA = "from pst_dist.data.sample import AnswerType"


def task_name(config: Config) -> str:
    """The task's name in the harness, for example `pst_svamp`."""
    return f"pst_{config.task or config.data.answer_type or 'text'}"


def write_lm_eval_task(config: Config) -> Path:
    """Write `RUN/lm_eval` for the export of a run and return its path, replacing an older one.

    Its rows are those that `pst evaluate` scores with this config. Raises InputError when there is no export or there
    are no rows, and ConfigError for a student that cannot be asked by a plain prompt.
    """
    run = run_dir(config)
    student = load_student(run.export, device="cpu")
    fetch_data(config)
    split = config.evaluate.split
    samples = rows_to_score(ShardSet.open(run.shards).split(split), config.evaluate.max_rows)
    if not samples:
        raise InputError(f"there are no {split} rows in these shards", "see data.test", path=run.shards)
    fmt, seq2seq = student.format, bool(student.model.config.is_encoder_decoder)
    if seq2seq and fmt.semantic_before and fmt.semantic_tokens > 1:
        raise ConfigError("the harness cannot start a decoder with several semantic tokens", "use `pst evaluate`")
    if any(sample.part for sample in samples):
        raise ConfigError(
            "a task of the harness has one kind of answers, and this run is a mixture", "use `pst evaluate`"
        )
    task = get_task(config.task, config.data.answer_type)
    if task.rule == "math":
        raise ConfigError(
            "mathematical answers need math-verify, which the harness's task does not have", "use `pst evaluate`"
        )
    folder = run.path / "lm_eval"
    refuse_foreign_folder(folder, "lm_eval")
    with atomic_directory(folder) as partial:
        write_text(partial / _ROWS, "".join(canonical_json(_row(sample, fmt, seq2seq)) + "\n" for sample in samples))
        write_text(partial / "utils.py", utils_source(task, fmt))
        settings = task_settings(task_name(config), student, samples, config.evaluate.max_new_tokens)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        # The harness's tag for a function; YAML would otherwise quote it as a string.
        for name in ("process_results", "rows"):
            text = text.replace(f"'!function utils.{name}'", f"!function utils.{name}")
        write_text(partial / f"{task_name(config)}.yaml", f"# {_command(run.export, folder, config)}\n{text}")
    return folder


def lm_eval_command(config: Config) -> str:
    """The command line that runs the harness on this run's export and task."""
    run = run_dir(config)
    return _command(run.export, run.path / "lm_eval", config)


def _command(export: Path, folder: Path, config: Config) -> str:
    return (
        f"lm_eval --model hf --model_args pretrained={export} --include_path {folder} --tasks {task_name(config)} "
        "--batch_size 1"
    )


def _row(sample: ReasoningSample, fmt: AnswerFormat, seq2seq: bool) -> dict[str, Any]:
    prompt = fmt.render(fmt.asked(sample))
    if fmt.semantic_before and not seq2seq:
        prompt += fmt.semantic_token * fmt.semantic_tokens
    return {"id": sample.id, "prompt": prompt, "gold": sample.answer}


def task_settings(
    name: str, student: LoadedStudent, samples: list[ReasoningSample], max_new_tokens: int
) -> dict[str, Any]:
    """The task's YAML: greedy decoding up to the answer stop, within the model's positions.

    The harness cuts the beginning of a prompt that leaves too little room for new tokens, so the limit on new tokens
    leaves room for the longest prompt.
    """
    positions = max_positions(student.model)
    seq2seq = bool(student.model.config.is_encoder_decoder)
    most = max_new_tokens
    if positions is not None:
        longest = (
            1 if seq2seq else max(len(expected_prompt(student, student.format.asked(sample))) for sample in samples)
        )
        most = max(1, min(most, positions - longest))
    generation: dict[str, Any] = {"until": [student.format.stop_token], "do_sample": False, "max_gen_toks": most}
    if seq2seq:
        # Otherwise the harness would add the encoder's input length to the decoder's limit.
        forced = student.model.generation_config.forced_bos_token_id is not None
        generation["max_length"] = most + 1 + forced
    return {
        "task": name,
        "custom_dataset": "!function utils.rows",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
        "generation_kwargs": generation,
        "process_results": "!function utils.process_results",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }


def utils_source(task: Task, fmt: AnswerFormat) -> str:
    """A self-contained Python module: this package's scoring rules, applied to one task and format."""
    rules = "\n\n".join(inspect.getsource(module) for module in (number_markup, numbers, number_answers, scoring))
    # A dataclass with string annotations looks its module up by name, and the harness has not registered it yet.
    rules = rules.replace("from __future__ import annotations\n", "").replace(_SCHEMA, "AnswerType = str")
    # The modules are merged into one here, so their imports of each other are removed.
    rules = re.sub(r"^from pst_dist\.data\.tasks\.\w+ import .*\n", "", rules, flags=re.MULTILINE)
    # Expressions are compared in processes of this package; `write_lm_eval_task` refuses such tasks.
    refused = 'raise ValueError("mathematical expressions are not scored here")'
    rules = re.sub(
        r"^( +)from pst_dist\.data\.tasks\.math_answers import .*$", rf"\1{refused}", rules, flags=re.MULTILINE
    )
    marker = None if ARMS[fmt.arm].answers_first else fmt.answer_marker.strip()
    return f"""{rules}

TASK = Task(**{asdict(task)!r})
MARKER = {marker!r}
\"\"\"The text before the answer; None if the answer comes first.\"\"\"


def rows(**_):
    \"\"\"The rows to score.\"\"\"
    import datasets
    from pathlib import Path

    path = str(Path(__file__).with_name({_ROWS!r}))
    features = datasets.Features({{name: datasets.Value("string") for name in ("id", "prompt", "gold")}})
    return {{"test": datasets.Dataset.from_json(path, features=features)}}


def process_results(doc, results):
    \"\"\"Whether one generated text contains the gold answer.\"\"\"
    prediction = TASK.extract(results[0], MARKER)
    return {{"acc": float(TASK.is_correct(prediction, doc["gold"]))}}
"""
