"""A GGUF file answers in llama.cpp's real server as the export answers in transformers, or it is refused by name.

The students are tiny but trained, so that their answers have different lengths and stop by themselves.
"""

from __future__ import annotations

import dataclasses
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import zoo
from evaluated import make_run
from tiny import ROWS, Tiny, fitted
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pst_dist.cli.main import run_verb
from pst_dist.config.run_dir import record_run
from pst_dist.config.schema import Config
from pst_dist.diagnostics.artefacts import verify
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.publish.export import export
from pst_dist.publish.gguf import artefact, server, types, vocabulary
from pst_dist.publish.gguf.artefact import export_gguf
from pst_dist.publish.gguf.comparison import server_prompt
from pst_dist.publish.gguf.engine import PROBES, check_tokens, running
from pst_dist.publish.gguf.server import serving
from pst_dist.student.saved import load_student

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

QUESTIONS = [*(row.question for row in ROWS), "What, then, is the whole of 10 + 7?", '  Quoted "x" {y}\nline 2 12345']
NEW_TOKENS = 24


def llama3_scaled():
    """Llama 3's own regex and merges rule, a BOS, and rotary frequencies scaled as in Llama 3.1."""
    import transformers

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    core = zoo.surrounded(zoo.byte_tokenizer(special, words=vocabulary._LLAMA3), first=special[0])
    core.model = models.BPE(**_parts(core), ignore_merges=True)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    shape = transformers.LlamaConfig(
        vocab_size=core.get_vocab_size(), rope_parameters=rope, bos_token_id=0, eos_token_id=[1, 2], **zoo.GROUPED
    )
    tokens = {"bos_token": special[0], "eos_token": special[2]}
    return transformers.LlamaForCausalLM(shape), core, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}


def qwen2_own():
    """Qwen 2's regex and normaliser, biases in the attention, spare rows in the embeddings."""
    import transformers

    core = zoo.byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], words=vocabulary._QWEN2)
    core.normalizer = normalizers.NFC()
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    shape = transformers.Qwen2Config(
        vocab_size=core.get_vocab_size() + 70, tie_word_embeddings=True, eos_token_id=2, **zoo.GROUPED
    )
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return transformers.Qwen2ForCausalLM(shape), core, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}


def _parts(core: Tokenizer) -> dict:
    model = json.loads(core.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def student_of(case: str, folder: Path) -> Tiny:
    """A trained student of a family, fresh or of the zoo."""
    if case in ("fresh gpt2", "fresh llama"):
        return fitted("pst", case.split()[1])
    if case == "semantic before":
        return fitted("pst", "llama", semantic_position="before")
    builders = {"llama3 scaled": llama3_scaled, "qwen2": qwen2_own}
    if case in builders:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            zoo.FAMILIES[case] = builders[case]
        try:
            base = zoo.make(case, folder / "base")
        finally:
            del zoo.FAMILIES[case]
    else:
        base = zoo.make(case, folder / "base")
    return Tiny("post_thinking", student={"model_name_or_path": str(base)}).fit(learning_rate=1e-2)


def exported(case: str, folder: Path) -> Config:
    """A run directory with a finished export and no scores."""
    tiny = student_of(case, folder)
    config = Config.model_validate(
        {**tiny.config.model_dump(), "output_dir": str(folder / "run"), "evaluate": {"max_new_tokens": NEW_TOKENS}}
    )
    tiny.save(folder / "run" / "best")
    export(config)
    return config


def transformers_answers(folder: Path) -> list[tuple[list[int], bool]]:
    """(generated ids, whether the last one is an end) of each question, by plain transformers."""
    student = load_student(folder, device="cpu")
    ends = student.model.generation_config.eos_token_id
    answers = []
    for question in QUESTIONS:
        inputs = student.tokenizer(server_prompt(student.format, question), return_tensors="pt")
        made = student.model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append((made, made[-1] in ends))
    return answers


CASES = ("fresh gpt2", "fresh llama", "semantic before", "gpt2", "qwen", "llama3 scaled", "qwen2")


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_transformers_does_and_stops_by_itself(case, tmp_path):
    config = exported(case, tmp_path)
    folder = Path(config.output_dir) / "export"
    student = load_student(folder, device="cpu")
    wanted = transformers_answers(folder)
    assert any(ended for _, ended in wanted), "the student has not learnt to stop"
    made = export_gguf(config, "f32")
    with serving(made.file, slots=3, context=student.model.config.max_position_embeddings) as url:

        def completion(question: str) -> tuple[list[int], bool]:
            body = {"prompt": server_prompt(student.format, question), "n_predict": NEW_TOKENS, "temperature": 0}
            reply = httpx.post(f"{url}/completion", json={**body, "return_tokens": True}, timeout=60).json()
            return reply["tokens"], reply["stop_type"] == "eos"

        def chat(question: str) -> tuple[str, str, int]:
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": NEW_TOKENS}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            choice = reply["choices"][0]
            return choice["message"]["content"], choice["finish_reason"], reply["usage"]["prompt_tokens"]

        assert [completion(question) for question in QUESTIONS] == wanted
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(completion, QUESTIONS)) == wanted
            chats = list(pool.map(chat, QUESTIONS))
    for question, (text, reason, prompt_tokens), (ids, ended) in zip(QUESTIONS, chats, wanted, strict=True):
        assert text.strip() == student.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert reason == ("stop" if ended else "length")
        assert prompt_tokens == len(student.tokenizer(server_prompt(student.format, question))["input_ids"])


@pytest.mark.parametrize("kind", types.TYPES)
def test_every_type_is_served_with_the_same_short_answers(kind, tmp_path):
    config = make_run(tmp_path / "run")
    evaluate(config)
    export(config)
    made = export_gguf(config, kind)
    assert made.comparison is not None and made.comparison.rows == 6 and made.comparison.unfinished == 0
    assert made.comparison.different == 0 and made.comparison.correct == made.comparison.correct_in_transformers == 4


REFUSED = {
    "llama2": "it is not byte-level",
    "mistral": "it attends to a sliding window",
    "gemma": "the family gemma2 is not one of",
    "llama3": "llama.cpp has no pre-tokenizer that is known to be",
    "opt": "the family opt is not one of",
    "neox": "the family gpt_neox is not one of",
    "t5": "t5 is an encoder-decoder",
    "bart": "bart is an encoder-decoder",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(name, tmp_path):
    from pst_dist.publish.gguf.architecture import architecture_of

    tiny = Tiny("post_thinking", student={"model_name_or_path": str(zoo.make(name, tmp_path))})
    with pytest.raises(ConfigError, match=r"cannot be written to GGUF: .*") as found:
        architecture_of(tiny.model)
        rows = tiny.model.get_input_embeddings().weight.shape[0]
        vocabulary.vocabulary_of(tiny.tokenizer, rows=rows, stop_token=tiny.format.stop_token)
    assert REFUSED[name] in str(found.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by 'dynamic'"),
    ],
)
def test_a_setting_that_llama_cpp_ignores_is_refused(change, words):
    import transformers

    from pst_dist.publish.gguf.architecture import architecture_of

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **{**zoo.GROUPED, **change}))
    with pytest.raises(ConfigError, match=words):
        architecture_of(model)


STEPS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(vocabulary._LLAMA3), "isolated")],
    "smaug-bpe": [pre_tokenizers.Split(Regex(vocabulary._LLAMA3), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(vocabulary._QWEN2), "isolated")],
}
ALPHABET = [
    *"aeStdmr'\u2019 \t\n\r.,!?-+=*/()0123456789",
    "  ",
    "'s",
    "'LL",
    "é",
    "e\u0301",
    "ß",
    "北京",
    "ไทย",
    "½",
    "Ⅻ",
    "٣",
    "🚀",
    "\u00a0",
]


def with_pre(name: str) -> Tokenizer:
    """A byte-level BPE with many merges whose words are cut as llama.cpp's `name` says."""
    core = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    steps = STEPS[name]
    if not isinstance(steps[-1], pre_tokenizers.ByteLevel):
        steps = [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    draw = random.Random(1)
    core.train_from_iterator(["".join(draw.choices(ALPHABET, k=200)) for _ in range(300)], trainer)
    return core


@pytest.mark.parametrize("name", STEPS)
def test_a_pre_tokenizer_gets_the_name_under_which_llama_cpp_cuts_the_same_words(name, tmp_path):
    import transformers

    from pst_dist.publish.gguf.file import About, write_gguf

    core = with_pre(name)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=core.get_vocab_size(), **zoo.GROUPED))
    told = vocabulary.vocabulary_of(fast, rows=core.get_vocab_size(), stop_token="<|endoftext|>")
    assert told.pre == name
    draw = random.Random(2)
    texts = [*PROBES, *("".join(draw.choices(ALPHABET, k=draw.randrange(1, 40))) for _ in range(300))]

    def served(pre: str) -> None:
        file = tmp_path / f"{pre}.gguf"
        changed = dataclasses.replace(told, pre=pre)
        write_gguf(file, model, changed, About("t", "d", ()), kind="f32", template=None)
        with running(file, slots=1, context=64) as engine:
            check_tokens(engine, fast, texts, normalises=False)

    served(name)
    wrong = "qwen2" if name != "qwen2" else "gpt-2"
    with pytest.raises(ConfigError, match="as other tokens than this student's tokenizer, from token"):
        served(wrong)


def test_the_file_says_what_it_is(tmp_path):
    config = make_run(tmp_path / "run")
    export(config, licence="apache-2.0")
    made = export_gguf(config, "f16")
    fields = gguf.GGUFReader(str(made.file)).fields
    told = {name: field.contents() for name, field in fields.items()}
    student = load_student(tmp_path / "run" / "export", device="cpu")
    stop = student.tokenizer.convert_tokens_to_ids(student.format.stop_token)
    assert told["tokenizer.ggml.eot_token_id"] == stop
    assert told["tokenizer.ggml.eos_token_id"] == student.tokenizer.eos_token_id
    assert told["tokenizer.ggml.token_type"][stop] == vocabulary.CONTROL
    assert told["tokenizer.chat_template"] == student.tokenizer.chat_template
    assert told["general.license"] == "apache-2.0" and told["general.name"] == "pst-single_eq-gpt2"
    assert told["general.architecture"] == "gpt2"
    assert told["gpt2.context_length"] == student.model.config.max_position_embeddings
    card = (made.file.parent / "README.md").read_text()
    assert "license: apache-2.0" in card and "Not compared: its test rows have not been scored" in card
    assert 'PARAMETER stop "<|answer_end|>"' in (made.file.parent / "Modelfile").read_text()
    assert '"""{{ .Prompt }} ###"""' in (made.file.parent / "Modelfile").read_text()


def test_the_command_states_the_share_and_verify_knows_the_file(tmp_path, capsys):
    run = tmp_path / "run"
    config = make_run(run)
    record_run(config)
    evaluate(config)
    assert run_verb(["export", str(run), "--gguf"]) == 0
    told = capsys.readouterr().out
    assert "0 of 6 test rows (0.0 %) answered differently than by transformers; accuracy 66.7 %" in told
    folder = run / "gguf" / "q8_0"
    (file,) = folder.glob("*.gguf")
    before = file.stat().st_mtime_ns
    assert run_verb(["export", str(run), "--gguf", "q8_0"]) == 0 and file.stat().st_mtime_ns == before
    assert all(not finding.is_problem for finding in verify(run))

    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    bad = [finding for finding in verify(run) if finding.is_problem]
    assert [(finding.kind, finding.state) for finding in bad] == [("gguf", "damaged")]
    assert run_verb(["verify", str(run), "--rebuild"]) == 0

    export(config, licence="mit")  # another export: the file is of an older one
    (stale,) = (finding for finding in verify(run) if finding.is_problem)
    assert (stale.kind, stale.state) == ("gguf", "stale") and "pst export --gguf" in stale.remedy


def test_a_file_that_llama_cpp_refuses_is_never_published(tmp_path, monkeypatch):
    config = make_run(tmp_path / "run")
    export(config)
    of = vocabulary.vocabulary_of
    monkeypatch.setattr(artefact, "vocabulary_of", lambda *a, **k: dataclasses.replace(of(*a, **k), pre="nonsense"))
    with pytest.raises(EnvironmentFault, match="unknown pre-tokenizer type: 'nonsense'"):
        export_gguf(config, "q8_0")
    assert not (tmp_path / "run" / "gguf" / "q8_0").exists()


def test_a_server_that_cannot_start_says_why_in_a_line(tmp_path):
    file = tmp_path / "no.gguf"
    with pytest.raises(SystemExit, match=r"no\.gguf: no such file"):
        server.main([str(file)])
    file.write_text("no model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 80800):  # llama.cpp's server would wait for ever
            with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1 port {port}"):
                server.main([str(file), "--port", str(port)])
    with (
        pytest.raises(EnvironmentFault, match="does not serve this file"),
        serving(file, slots=1, context=64),
    ):
        pass


def test_without_the_engine_the_file_is_written_and_the_card_says_that_nothing_was_compared(
    tmp_path, monkeypatch, caplog
):
    config = make_run(tmp_path / "run")
    evaluate(config)
    export(config)
    monkeypatch.setattr(artefact, "engine_version", lambda: None)
    made = export_gguf(config, "q8_0")
    assert made.comparison is None and "pip install 'pst-dist[llama-cpp]'" in caplog.text
    card = (made.file.parent / "README.md").read_text()
    assert "It has not been loaded by llama.cpp." in card and "Not compared: the package xllamacpp" in card
    monkeypatch.undo()
    assert export_gguf(config, "q8_0").comparison is not None  # the engine is back: written again


@pytest.mark.parametrize(
    ("name", "layers", "tied", "width", "wanted"),
    [
        ("output.weight", 4, False, 512, "Q6_K"),
        ("token_embd.weight", 4, False, 512, "Q4_K"),
        ("token_embd.weight", 4, True, 512, "Q6_K"),
        ("token_embd.weight", 4, True, 576, "Q8_0"),
        ("blk.0.attn_q.weight", 30, True, 512, "Q4_K"),
        ("blk.0.attn_q.weight", 30, True, 576, "Q5_0"),
        ("blk.0.attn_v.weight", 30, True, 512, "Q6_K"),
        ("blk.3.attn_v.weight", 30, True, 512, "Q4_K"),
        ("blk.5.ffn_down.weight", 30, True, 512, "Q6_K"),
        ("blk.29.ffn_down.weight", 30, True, 512, "Q6_K"),
        ("blk.1.attn_qkv.weight", 12, True, 512, "Q5_K"),
        ("blk.1.ffn_up.weight", 12, True, 50, "F16"),
        ("position_embd.weight", 12, True, 512, "F32"),
        ("output_norm.weight", 12, True, None, "F32"),
    ],
)
def test_q4_k_m_stores_each_tensor_as_llama_cpps_own_rule_says(name, layers, tied, width, wanted):
    shape = (512,) if width is None else (64, width)
    assert types.stored_type("q4_k_m", name, shape, layers=layers, tied=tied) == wanted


@pytest.mark.parametrize(
    ("kind", "error"), [("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.02), ("Q5_0", 0.05), ("Q8_0", 0.006)]
)
def test_quantised_rows_are_near_the_values(kind, error):
    value = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    packed = types.stored(value, kind)
    back = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert back.shape == value.shape
    assert np.sqrt(((back - value) ** 2).mean()) < error


def test_a_weight_that_f16_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"a weight of 1e\+05 is too large for f16.*choose f32"):
        types.stored(np.full((2, 32), 1e5, dtype=np.float32), "F16")


def test_a_question_too_long_for_the_student_counts_as_answered_differently(tmp_path):
    config = make_run(tmp_path / "run")
    evaluate(config)
    export(config)
    samples = tmp_path / "run" / "eval" / "test" / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    made = export_gguf(config, "f32")
    from pst_dist.data.tasks import get_task
    from pst_dist.publish.gguf.comparison import compare_answers

    student = load_student(tmp_path / "run" / "export", device="cpu")
    rows[0]["question"] = "word " * 200
    with running(made.file, slots=4, context=96) as engine:
        found = compare_answers(engine, student.format, get_task("single_eq", None), rows, max_new_tokens=40)
    assert (found.rows, found.different, found.unfinished) == (6, 1, 1)
