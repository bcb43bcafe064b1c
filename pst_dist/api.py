"""The Python API: what `pst` does, as functions that take a config and return typed results.

    import pst_dist

    config = pst_dist.load_config(arm="pst", output_dir="runs/mine", data={"train": rows, "test": held_out})
    result = pst_dist.run(config)
    result.to_frame()
    pst_dist.load_student("runs/mine").ask("How many letters does 'reason' have?", explain=True)

The functions and the command line share runs: each can resume what the other started. Every error that a user can
cause is a `PstError`. Importing this module does not import torch; each function imports what it needs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from pst_dist.config import loading
from pst_dist.config.effect import WHAT_A_RUN_IS, given_keys, names_other_rows, refuse_without_effect
from pst_dist.config.run_dir import check_lasting, expand_arms, recorded, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS
from pst_dist.errors import ConfigError, InputError, PstError, missing_package
from pst_dist.logs import progress, shown_by_default
from pst_dist.results import ArmResult, EvaluationResult, RunResult, ScoredRow, TeachResult, TrainResult
from pst_dist.student.answer import Answer

if TYPE_CHECKING:
    from pst_dist.data.sample import Turns
    from pst_dist.data.sources.in_memory import RowsFile
    from pst_dist.student.layout import AnswerFormat
    from pst_dist.student.saved import LoadedStudent

log = logging.getLogger(__name__)

__all__ = [
    "Answer",
    "ArmResult",
    "Config",
    "EvaluationResult",
    "PstError",
    "RunResult",
    "ScoredRow",
    "Student",
    "TeachResult",
    "TrainResult",
    "as_dataset",
    "evaluate",
    "expand_arms",
    "export",
    "load_config",
    "load_student",
    "run",
    "teach",
    "train",
]

Conversation = Sequence[Mapping[str, Any]]
"""Turns as {"role": ..., "content": ...}: perhaps a system turn, then user and assistant turns, the question last."""
Source = Config | str | Path | None
"""A config, the path of a YAML file or run directory, the name of a ready-made config, or None for the defaults."""


def load_config(source: Source = None, *overrides: str, **keys: Any) -> Config:
    """A checked config: `source`, then `overrides`, then `keys`, each taking precedence over the previous ones.

    `overrides` are words as on the command line, "train.learning_rate=1e-3" or "+paper_t5". `keys` are Python values:
    sections as dicts (`train={"max_steps": 100}`) and plain settings (`seed=1`).

    `data={"train": rows, "test": rows}` also accepts the rows themselves: a list of dicts, a pandas frame or a
    `datasets.Dataset`. They are written once, as JSON Lines, to `rows/` in the run's data directory, and the config
    names that file, so the command line can resume the run, and an error in row 7 names line 7.

    Raises InputError when the config does not exist, ConfigError naming the key for a setting that is unknown, of the
    wrong type or contradictory, and DataError naming the row for rows that cannot be written.
    """
    with _our_errors():
        config, files = _checked(source, overrides, keys)
        _write(config, files)
    return config


def run(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> RunResult:
    """All stages for every arm: shards, embeddings, training, evaluation, export and report.

    A stage that is complete for the same inputs is skipped, and an interrupted training resumes from its newest
    checkpoint, so the same call resumes; `run("runs/mine")` resumes from the directory alone. `rebuild` replaces
    artefacts made from other inputs. The arguments are those of `load_config`.

    Raises as `load_config` and the stages do (see `pst_dist.errors`). Ctrl-C during training saves a checkpoint after
    the current step and raises KeyboardInterrupt; a second Ctrl-C ends the process at once.
    """
    from pst_dist.pipeline import run_all

    with _our_errors(), shown_by_default():
        config = load_config(source, *overrides, **keys)
        check_lasting(config)
        pages = run_all(config, rebuild=rebuild, command=_command("run", config))
        arms = tuple(_arm_result(arm) for arm in expand_arms(config))
    return RunResult(config=config, output_dir=Path(config.output_dir), arms=arms, report=pages[-1])


def train(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> TrainResult:
    """Train one arm, making missing shards and embeddings first; resumes like `run`.

    With several ranks (a script under torchrun), every rank calls this, and shards and embeddings must already exist.
    Raises ConfigError for a config with several arms.
    """
    from pst_dist.embedding.targets import needs_embeddings
    from pst_dist.pipeline import make_embeddings, make_shards, make_student

    with _our_errors(), shown_by_default():
        config = _one_arm(load_config(source, *overrides, **keys), "train")
        check_lasting(config)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        is_main = int(os.environ.get("RANK", "0")) == 0
        with recorded(config, command=_command("train", config)) if is_main else contextlib.nullcontext():
            if alone:
                make_shards(config, rebuild=rebuild)
                if needs_embeddings(config):
                    make_embeddings(config, rebuild=rebuild)
            record = make_student(config, rebuild=rebuild)
        return TrainResult.of(config, record)


def evaluate(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> EvaluationResult:
    """Decode and score one split with a trained student; done once for the same student, rows and settings.

    `data={"test": rows}` scores other rows (a path, or the rows themselves) into a folder of their own; `task` and
    data.answer_type, columns, root, max_bad and duplicates then apply to them. The run's own scores stay.

    It uses the settings of `evaluate` (`evaluate={"split": "validation"}`, or `{"backend": "ray"}` for a cluster),
    `embed`, the task and the directories. Any other given setting that differs from the run's own has no effect and
    raises ConfigError; so do student, layout and loss of a given `Config` that differ, and a config with several arms.
    """
    from pst_dist.pipeline import make_scores

    with _our_errors(), shown_by_default():
        config, others = _of_finished("evaluate", source, overrides, keys)
        results = make_scores(config, rebuild=rebuild, other_rows=others)
        assert results is not None, "only the ranks of a process group have none"
        return EvaluationResult.of(config, results)


def export(
    source: Source,
    *overrides: str,
    rebuild: bool = False,
    adapter: bool = False,
    gguf: bool | str = False,
    compare_rows: int = 200,
    licence: str | None = None,
    **keys: Any,
) -> Path:
    """Write the student as a folder that plain transformers loads, with its model card; returns the folder.

    `gguf` names a type ("f32", "f16", "q8_0", "q4_k_m"; True is "q8_0") and writes a GGUF file for llama.cpp too. Then
    that file is returned; a Modelfile and a card are beside it, and the log says how many of `compare_rows` scored
    test rows it answers differently. `adapter` writes the adapter of a LoRA student alone, as a PEFT folder. `licence`
    is named in the cards.

    It uses `evaluate.max_new_tokens`, the task and the directories; other settings are refused as in `evaluate`. Raises
    ConfigError for an unknown type or a student that llama.cpp does not compute in the same way, and EnvironmentFault
    without the package gguf.
    """
    from pst_dist.publish.adapter import export_adapter
    from pst_dist.publish.export import export
    from pst_dist.publish.gguf.types import TYPES

    kind = "q8_0" if gguf is True else gguf
    if kind and kind not in TYPES:
        raise ConfigError(f"gguf={gguf!r} is not a type of GGUF file", f"use one of {', '.join(TYPES)}")
    if adapter and (kind or licence):
        raise ConfigError(f"{'gguf' if kind else 'licence'} has no effect on an adapter alone", "leave out one of them")
    with _our_errors(), shown_by_default():
        config = _of_finished("export", source, overrides, keys)[0]
        if adapter:
            return export_adapter(config, rebuild=rebuild)
        folder = export(config, rebuild=rebuild, licence=licence)
        if not kind:
            return folder
        from pst_dist.publish.gguf.artefact import export_gguf

        made = export_gguf(config, kind, compare_rows=compare_rows, rebuild=rebuild)
        for line in made.lines():
            log.info("%s", line.strip())
        return made.file


def as_dataset(source: Source, split: str | None = None, *, streaming: bool = False) -> Any:
    """The rows of finished shards as a Hugging Face dataset; all splits as a `DatasetDict` without `split`.

    `source` is a shard directory, a data or run directory, or a config. Columns: id, question, answer, rationales,
    answer_type, choices, turns (`{"role", "content"}`, ending with the question); None for a row without rationales,
    choices or earlier turns. With `streaming`, rows are read from the shards as they are needed. Raises InputError when
    there are no finished shards.
    """
    from pst_dist.data.interchange import dataset_of
    from pst_dist.data.shards import ShardSet

    with _our_errors(), shown_by_default():
        directory = _shards_of(source)
        if split is not None:
            return dataset_of(directory, split, streaming=streaming)
        counts = ShardSet.open(directory).manifest.extra["counts"]
        made = {name: dataset_of(directory, name, streaming=streaming) for name, count in counts.items() if count}
        import datasets

        return datasets.IterableDatasetDict(made) if streaming else datasets.DatasetDict(made)


def _shards_of(source: Source) -> Path:
    """The shard directory that a folder is or contains, or that a config names."""
    from pst_dist.storage.manifest import MANIFEST, kind_written_in

    if isinstance(source, str | Path):
        folder = Path(source)
        if (folder / MANIFEST).is_file() and kind_written_in(folder) == "shards":
            return folder
        if (folder / "shards" / MANIFEST).is_file():
            return folder / "shards"
    return run_dir(load_config(source)).shards


def teach(rows: Any, output: str | Path, *overrides: str, config: Source = None, **settings: Any) -> TeachResult:
    """Ask a teacher for rationales (and new questions) for the rows; what `pst teach` does.

    `rows` is what data.train takes (paths, or the rows themselves), or None for the training rows of `config`.
    `overrides` are words as in `load_config` ("task=gsm8k"). `settings` are those of the command, with underscores:
    `endpoint=..., model=..., prompts=["few_shot"], samples=4, max_cost=5.0`; see `teacher.settings.TeachSettings`.
    The same call resumes an interrupted one, and pays for no reply twice.

    Raises ConfigError for a wrong setting, EnvironmentFault when the teacher does not answer, and StaleError when the
    journal beside `output` belongs to other settings. Reaching a cap is not an error: see `TeachResult.cap`.
    """
    from pst_dist.teacher.settings import TeachSettings
    from pst_dist.teacher.teach import teach

    with _our_errors(), shown_by_default():
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        for name in ("prompts", "avoid", "omit"):
            if isinstance(given.get(name), str):  # one of them, as on the command line
                given[name] = (given[name],)
        try:
            asked = TeachSettings(output=Path(output), **given)
        except TypeError as error:
            raise ConfigError(f"teach: {str(error).partition(') ')[2] or error}", "see `pst teach --help`") from error
        keys: dict[str, Any] = {} if rows is None else {"data": {"train": rows}}
        if rows is not None:
            # Rows given as Python objects are written beside the journal.
            keys |= {"data_dir": str(asked.folder)}
        outcome = teach(load_config(config, *overrides, **keys), asked)
        return TeachResult(
            path=asked.output,
            folder=asked.folder,
            rows=outcome.rows,
            report=outcome.report,
            cap=outcome.cap,
        )


def load_student(folder: str | Path, *, device: str | None = None) -> Student:
    """The trained student of a run directory, or of a folder with a student or an export, ready to answer questions.

    `device` is a torch device name; it defaults to the best one available. Every file is first compared with its
    digest. Raises InputError when there is no student, or several (naming the arms), and IntegrityError for a damaged
    one.
    """
    with _our_errors(), shown_by_default():
        from pst_dist.evaluation.asking import student_folder
        from pst_dist.student.saved import load_student

        if not isinstance(folder, str | Path):
            raise InputError(f"expected the path of a student's folder, got {type(folder).__name__}", "give its path")
        return Student(load_student(student_folder(Path(folder)), device))


class Student:
    """A trained student that answers questions. It may be shared between threads; calls are served one at a time."""

    def __init__(self, loaded: LoadedStudent) -> None:
        self._loaded, self._turn = loaded, threading.Lock()

    def __repr__(self) -> str:
        return f"<Student {self.arm} in {self.directory} on {self.device}>"

    @property
    def arm(self) -> str:
        """The arm it was trained with."""
        return self._loaded.format.arm

    @property
    def directory(self) -> Path:
        """The folder it was loaded from."""
        return self._loaded.directory

    @property
    def device(self) -> str:
        """The torch name of its device."""
        return str(self._loaded.model.device)

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._loaded.tokenizer

    def ask(
        self,
        question: str | Conversation,
        *,
        explain: bool = False,
        think_below: float | None = None,
        max_new_tokens: int = 256,
    ) -> Answer:
        """Answer one question greedily; with `explain` the student also writes its rationale.

        A conversation is passed to the student as in training: as turns of its chat template, or else as one text.
        An adaptive student thinks first when the probability of its answer is below `think_below` (0 never, 2 always;
        defaults to the threshold that the evaluation chose). Raises InputError for a question that is empty or too
        long for the model, for turns that the student cannot be asked, and for `think_below` with a student of another
        arm.
        """
        return self._ask([question], explain, think_below, max_new_tokens, None)[0]

    def ask_many(
        self,
        questions: Iterable[str | Conversation],
        *,
        explain: bool = False,
        think_below: float | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 64,
    ) -> list[Answer]:
        """Answer many questions, `batch_size` at a time, showing progress; answers are in the order of `questions`.

        The arguments and errors are those of `ask`; an error names the question's number, and none is answered.
        """
        if isinstance(questions, str):
            raise InputError("questions is one string", "give a list of them, or use `ask`")
        questions = list(questions)
        if questions and all(isinstance(one, Mapping) for one in questions):
            raise InputError("questions is one conversation", "give a list of them, or use `ask`")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}", "give a whole number of at least 1")
        return self._ask(questions, explain, think_below, max_new_tokens, batch_size)

    def _ask(
        self,
        questions: list[str | Conversation],
        explain: bool,
        think_below: float | None,
        max_new_tokens: int,
        batch_size: int | None,
    ) -> list[Answer]:
        from pst_dist.evaluation.asking import threshold_of
        from pst_dist.student.ask import answer_question, answer_questions

        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens!r}", "give a whole number of at least 1")
        fmt, count = self._loaded.format, len(questions)
        with self._turn, _our_errors(), shown_by_default():
            asked = [
                _asked(fmt, one, f"question {n} of {count}" if count > 1 else "the question")
                for n, one in enumerate(questions, 1)
            ]
            settings: dict[str, Any] = {
                "explain": explain,
                "max_new_tokens": max_new_tokens,
                "think_below": threshold_of(self._loaded, think_below),
            }
            if batch_size is None:
                return [answer_question(self._loaded, asked[0], **settings)]
            if not asked:
                return []
            with progress(f"ask {self.arm}", total=len(asked), unit="questions") as bar:
                return answer_questions(self._loaded, asked, batch_size=batch_size, on_batch=bar.advance, **settings)


def _asked(fmt: AnswerFormat, question: Any, which: str) -> str | Turns:
    """A question as a student of this format is asked it; what is neither text nor turns is left to `student.ask`."""
    if isinstance(question, str) or not isinstance(question, Sequence) or not question:
        return cast("str", question)
    from pst_dist.data.sources.conversations import read_question
    from pst_dist.data.sources.rows import RowError

    try:
        read = read_question(list(question), which, {})
    except RowError as error:
        raise InputError(
            error.what, 'give text, or turns as {"role": …, "content": …} that end with a question'
        ) from None
    return fmt.put(cast("str", read.text), read.turns)


def _checked(source: Source, overrides: Sequence[str], keys: Mapping[str, Any]) -> tuple[Config, list[RowsFile]]:
    """The config, and the rows that must be written for it; writes nothing itself."""
    if not (source is None or isinstance(source, Config | str | Path)):
        raise ConfigError(
            f"expected the path or name of a config, or a Config, got {type(source).__name__}",
            'pass settings as keywords: load_config(train={"max_steps": 100})',
        )
    for word in overrides:
        if not isinstance(word, str):
            raise ConfigError(f"{word!r} is not key.sub=value", "pass Python values as keywords: seed=1")
    tree, files = _without_rows(_tree(keys))
    base = source if isinstance(source, Config) else None
    name = str(source) if isinstance(source, str | Path) else None
    config = loading.load_config(name, overrides, keys=tree, base=base)
    if files:
        paths = {file.split: str(_path_of(file, config)) for file in files}
        config = config.model_copy(update={"data": config.data.model_copy(update=paths)})
    return config, files


def _tree(keys: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested keywords as plain dicts of settings; paths become strings, and keys must be strings."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} in {place or 'the settings'} is not a string", "use a string")
        here = f"{place}.{key}" if place else key
        if isinstance(value, Mapping) and here not in _ROWS:
            value = _tree(value, here)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        tree[key] = value
    return tree


_ROWS = tuple(f"data.{split}" for split in SPLITS)


def _without_rows(tree: dict[str, Any]) -> tuple[dict[str, Any], list[RowsFile]]:
    """The settings with a placeholder for rows given as Python objects, and those rows."""
    from pst_dist.data.sources.in_memory import is_in_memory, rows_file

    files = []
    section = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    places = [(section, split, split) for split in SPLITS] + [(tree, key, key.removeprefix("data.")) for key in _ROWS]
    for holder, key, split in places:
        if key not in holder:
            continue
        if is_in_memory(holder[key]):
            files.append(rows_file(holder[key], split))
            holder[key] = f"{split}.jsonl"
        elif isinstance(holder[key], list):
            holder[key] = [str(word) for word in holder[key]]
    for name in ("data", *SPLITS):
        if name in tree and is_in_memory(tree[name]) and not isinstance(tree[name], dict | int | float):
            split = "train" if name == "data" else name
            raise ConfigError(f"{name} is {type(tree[name]).__name__}", f'pass rows as data={{"{split}": rows}}')
    return tree, files


def _path_of(file: RowsFile, config: Config) -> Path:
    """The path of a rows file as written in the config; absolute if data.root is set, else relative paths would be
    resolved against it.
    """
    path = file.path_in(run_dir(config).data)
    return path.absolute() if config.data.root or str(path).startswith("~") else path


def _write(config: Config, files: Iterable[RowsFile]) -> None:
    for file in files:
        file.write(run_dir(config).data)


def _of_finished(verb: str, source: Source, overrides: Sequence[str], keys: Mapping[str, Any]) -> tuple[Config, bool]:
    """(the config of a trained arm, whether it names other rows); raises ConfigError for a setting without effect."""
    config, files = _checked(source, overrides, keys)
    config = _one_arm(config, verb)
    given = [*given_keys(overrides), *loading.flat_keys(_tree(keys))]
    given += WHAT_A_RUN_IS if isinstance(source, Config) else ()
    refuse_without_effect(verb, config, given)
    others = names_other_rows(config, given)
    if others:
        _write(config, files)
    return config, others


def _one_arm(config: Config, verb: str) -> Config:
    """The config of the only arm; raises ConfigError for several."""
    arms = expand_arms(config)
    if len(arms) > 1:
        raise ConfigError(
            f"{verb} takes one arm, and this config has {len(arms)}: {', '.join(arm.arm for arm in arms)}",
            f"call it for each arm: `for arm in pst_dist.expand_arms(config): {verb}(arm)`",
            path=config.output_dir,
        )
    return arms[0]


def _arm_result(config: Config) -> ArmResult:
    """The results of a finished arm, from its run directory."""
    from pst_dist.evaluation.evaluate import finished_evaluation
    from pst_dist.storage.manifest import read_json
    from pst_dist.training.result import TrainingResult

    paths = run_dir(config)
    results = finished_evaluation(paths.evaluation(config.evaluate.split))
    if results is None:
        raise InputError("the run has not been evaluated", "run it again", path=paths.path)
    return ArmResult(
        arm=config.arm,
        config=config,
        output_dir=paths.path,
        training=TrainResult.of(config, TrainingResult(**read_json(paths.training))),
        evaluation=EvaluationResult.of(config, results),
        export=paths.export,
        report=paths.report,
    )


def _command(verb: str, config: Config) -> str:
    """The command in a run's record: the call that resumes it."""
    return f"pst_dist.{'api.' if verb == 'train' else ''}{verb}({config.output_dir!r})"


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Convert other libraries' errors that a user can cause to ours; bugs and KeyboardInterrupt pass through."""
    try:
        yield
    except ValidationError as error:
        raise loading.explain(error, None, {}, {}) from error
    except (ModuleNotFoundError, OSError) as error:
        ours = as_our_error(error)
        if ours is None:
            raise
        raise ours from error


def as_our_error(error: ModuleNotFoundError | OSError) -> PstError | None:
    """An EnvironmentFault for a missing package or a full or failing disk; None for other errors."""
    from pst_dist.storage.atomic import FAILING, OUT_OF_ROOM, fault_of

    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if error.errno not in (*OUT_OF_ROOM, *FAILING, errno.EROFS):
        return None
    # A file that we do not write ourselves: TensorBoard's, or a library's temporary file.
    return fault_of(error, Path(error.filename or os.environ.get("TMPDIR", "/tmp")))
