"""The config: precedence, refusals with their place, and a round trip through text."""

import pytest

from pst_dist.config.keys import known_keys
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.locate import ready_made_configs
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, InputError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path):
    path = write(tmp_path, "train:\n  learning_rate: 1e-3\n  weight_decay: 0.5\n")
    config = load_config(str(path), ["train.learning_rate=2e-4"])
    assert (config.train.learning_rate, config.train.weight_decay, config.train.max_grad_norm) == (2e-4, 0.5, 1.0)


def test_an_unknown_key_names_its_line_and_the_nearest_key(tmp_path):
    path = write(tmp_path, "seed: 1\ntrain:\n  learning_rat: 1e-3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value) == (
        f"error[CONFIG] {path}:3: unknown key 'train.learning_rat'; did you mean 'train.learning_rate'?"
    )


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("epochs", "train.num_train_epochs"),
        ("train.epochs", "train.num_train_epochs"),
        ("batch_size", "train.global_batch_size"),
        ("train.bs", "train.global_batch_size"),
        ("student.model", "student.model_name_or_path"),
        ("max_seq_length", "layout.max_length"),
        ("data.question", "data.columns"),
        ("train.optimizer", "train.optim"),
    ],
)
def test_other_programs_names_lead_to_our_keys(word, key):
    with pytest.raises(ConfigError, match=rf"unknown key '{word}'; did you mean '{key}'"):
        load_config(None, [f"{word}=1"])


def test_a_config_beside_a_name_and_an_arm_that_is_not_trained_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "seed: 1\n").rename(tmp_path / "mine.yaml")
    with pytest.raises(InputError, match=r"did you mean mine\.yaml\?"):
        load_config("mine")
    with pytest.raises(InputError, match="no trained student here; run `pst train` first"):
        load_config(str(tmp_path / "pst"))


def test_a_key_without_its_section_is_traced_to_the_section(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'train\.learning_rate'"):
        load_config(None, ["learning_rate=1"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.learning_rate=fast", "train.learning_rate: input should be a valid number"),
        ("train.global_batch_size=0", "train.global_batch_size: input should be greater than 0, got 0"),
        ("arm=cot", "arm: input should be 'answer_only'"),
        ("train.save_total_limit=1", "train.save_total_limit: input should be greater than or equal to 2"),
        ("train.gradient_accumulation_steps=4", "train.gradient_accumulation_steps is computed from"),
        ("student.fresh.num_heads=3", "not a multiple of num_heads 3"),
        ("train", "is not key.sub=value"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(word, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("seed: 1\nseed: 2\n", "2: duplicate key 'seed'"), ("seed: [1\n", ":2:"), ("- a\n", "not a mapping")],
)
def test_broken_yaml_names_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(str(write(tmp_path, text)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!null [a]", "0b_"]
)
def test_a_value_that_does_not_fit_its_yaml_tag_is_refused_in_one_line(tmp_path, value):
    with pytest.raises(ConfigError, match=r"cannot be read|expected"):
        load_config(None, [f"seed={value}"])
    path = tmp_path / "config.yaml"
    path.write_text(f"seed: {value}\n")
    with pytest.raises(ConfigError):
        load_config(str(path))


def test_a_missing_config_names_the_nearest_ready_made_one():
    with pytest.raises(InputError, match="did you mean demo"):
        load_config("demos")


def test_the_resolved_config_reads_back_as_the_same_config(tmp_path):
    config = load_config("demo", ["train.learning_rate=1e-5", "data.columns={question: q}"])
    assert load_config(str(write(tmp_path, dump_config(config)))) == config


def test_every_key_has_a_sentence_of_help():
    def fields(model, prefix=""):
        for name, info in model.model_fields.items():
            yield prefix + name, info.description
            if isinstance(info.annotation, type) and hasattr(info.annotation, "model_fields"):
                yield from fields(info.annotation, f"{prefix}{name}.")

    silent = [name for name, text in fields(Config) if not text]
    assert silent == []
    assert "train.learning_rate" in set(known_keys())


@pytest.mark.parametrize("name", ready_made_configs())
def test_every_ready_made_config_is_valid(name):
    config = load_config(name)
    assert config.task or (config.data.mixture and all(source.task for source in config.data.mixture))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1\n", "run.yaml:1: a key is not a plain word"),
        ("train:\n  lr: 1\n", "run.yaml:2: unknown key 'train.lr'"),
        ("train.max_steps: 4\n", "write max_steps on a line of its own below train:"),
        ("arms: pst\n", "write arms=[pst]"),
        ("train: 5\n", "train is a section, got 5; write train.KEY=value"),
        ("output_dir: ''\n", "output_dir"),
    ],
)
def test_a_slip_in_the_file_is_answered_with_what_to_write(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load_config(str(write(tmp_path, text)))
    assert words in str(caught.value) and "did you mean 'train'?" not in str(caught.value)


def test_a_section_without_keys_means_its_defaults(tmp_path):
    assert load_config(str(write(tmp_path, "train:\nembed:\n  ray:\nseed: 3\n"))) == Config(seed=3)


def test_a_tilde_is_the_home_directory_also_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load_config(str(write(tmp_path, "output_dir: ~/runs/a\ndata_cache: ~/cache\n")), ["data_dir=~/data"])
    folders = (config.output_dir, config.data_dir, config.data_cache)
    assert folders == ("/home/ann/runs/a", "/home/ann/data", "/home/ann/cache")
    assert load_config(None, ["data_dir=s3://bucket/~x"]).data_dir == "s3://bucket/~x"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("{reply: a}", "needs both reply and next"),
        ("{system: told}", r"system must contain \{system\} exactly once"),
        ("{reply: a, next: b, then: c}", "has the unknown key 'then'"),
    ],
)
def test_the_texts_around_turns_are_checked(turns, message):
    with pytest.raises(ConfigError, match=rf"layout\.turns: {message}"):
        load_config(None, [f"layout.turns={turns}"])


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("layout.prompt={question} ###", "layout", "prompt", "{question} ###"),
        ("layout.prompt=Q: {question} A:", "layout", "prompt", "Q: {question} A:"),
        ('layout.prompt="{question} ###"', "layout", "prompt", "{question} ###"),
        ("layout.answer_marker= -->", "layout", "answer_marker", " -->"),
        ("layout.answer_marker=#", "layout", "answer_marker", "#"),
        ("embed.prefix=query: ", "embed", "prefix", "query: "),
        ("embed.prefix=", "embed", "prefix", ""),
        ("layout.system=yes", "layout", "system", "yes"),
        ("layout.system=null", "layout", "system", None),
        ('layout.system="null"', "layout", "system", "null"),
        ("student.revision=1234567", "student", "revision", "1234567"),
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("data.columns={question: q}", "data", "columns", {"question": "q"}),
    ],
)
def test_a_key_that_takes_text_gets_the_words_of_the_command_line_as_they_are(word, section, key, value):
    assert getattr(getattr(load_config(None, [word]), section), key) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "data: {train: [{rows: a.jsonl, colums: {question: q}}]}",
            "unknown key 'data.train[0].colums'; did you mean 'columns'?",
        ),
        (
            "data: {train: [{rows: a.jsonl}, {rows: b.jsonl, weight: -1}]}",
            "data.train[1].weight: input should be greater",
        ),
        ("data: {train: [{columns: {question: q}}]}", "data.train[0].rows: field required"),
        ("data: {columns: {question: 3, answer: a}}", "data.columns.question: input should be a valid string, got 3"),
        ("data: {columns: [question, answer]}", "data.columns: input should be a valid string"),
        ("data: {test_size: 10%}", "data.test_size: input should be a valid number"),
        ("arms: [pst, foo]", "arms[1]: input should be 'answer_only'"),
    ],
)
def test_an_error_within_a_value_names_its_place(text, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(str(write(tmp_path, text)))
    assert f"run.yaml:1: {words}" in str(caught.value)


@pytest.mark.parametrize("word", ["seed=yes", "train.max_steps=true", "data.test_size=true", "data.max_bad=no"])
def test_true_and_false_are_no_numbers(word):
    with pytest.raises(ConfigError, match=r"input should be a number, got (True|False)"):
        load_config(None, [word])
    assert load_config(None, ["train.bf16=true"]).train.bf16 is True


def test_a_section_on_the_command_line_changes_only_its_keys(tmp_path):
    path = str(write(tmp_path, "train: {max_steps: 7}"))
    assert load_config(path, ["train={learning_rate: 2e-4}"]).train.max_steps == 7
    for word in ("train=", "train=null"):
        with pytest.raises(ConfigError, match=f"'{word}' would reset a whole section; write train.KEY=value"):
            load_config(path, [word])


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.txt"])
def test_a_table_in_another_form_is_not_read_as_yaml(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('{"question": "q"}\n{"question": "r"}\n')
    with pytest.raises(InputError, match="these are rows, not a config"):
        load_config(name)


def test_a_folder_of_rows_gets_a_pattern_that_reads_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(InputError) as caught:
        load_config(str(tmp_path))
    assert f"to read the files in it as rows use '{tmp_path}/*.jsonl'" in str(caught.value)
