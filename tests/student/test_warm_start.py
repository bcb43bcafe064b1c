"""A student that starts from MiniLM's weights, causal and as an encoder-decoder: tokens, loss, generation, size."""

import pytest
import torch
import torch.nn.functional as F
from tiny import ROWS, TinyTeacher

from pst_dist.arms import ARMS, SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import get_task
from pst_dist.diagnostics.machine import models
from pst_dist.diagnostics.tokens import preview
from pst_dist.errors import ConfigError
from pst_dist.models.locate import locate_encoder
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.contexts import max_positions
from pst_dist.student.layout import Layout
from pst_dist.student.text_ids import TextIds
from pst_dist.student.tokenizer import build_tokenizer, check_marker, check_prompt_ending, unwritable_answers
from pst_dist.training.batching.batches import Collator
from pst_dist.training.loss import TermWeights
from pst_dist.training.memory.model_size import shape_of
from pst_dist.training.module import build_student

pytestmark = pytest.mark.encoder
SHAPES = ("causal", "encoder_decoder")


def config_of(shape, arm="pst", **student):
    return Config.model_validate(
        {
            "arm": arm,
            "layout": {"max_length": 96},
            "student": {"model_name_or_path": "minilm", "warm_start": shape, **student},
        }
    )


class Warm:
    """A warm-started student with what training builds around it."""

    def __init__(self, shape, arm="pst"):
        self.config = config_of(shape, arm)
        self.tokenizer = build_tokenizer(self.config.student, ROWS)
        torch.manual_seed(0)
        self.student = build_student(self.config, self.tokenizer, TinyTeacher.dimension).eval()
        self.model = self.student.model
        self.layout = Layout(
            self.tokenizer, AnswerFormat.of(self.config), is_encoder_decoder=self.student.is_encoder_decoder
        )

    def batch(self):
        collate = Collator(
            loss=self.config.loss,
            pad_id=self.tokenizer.pad_token_id,
            decoder_start_id=self.student.decoder_start_id,
            teacher=TinyTeacher() if ARMS[self.config.arm].aligned else None,
        )
        return collate([sequence for row in ROWS for sequence in self.layout.sequences(row)])


@pytest.fixture(scope="module", params=SHAPES)
def warm(request):
    return Warm(request.param)


@pytest.fixture(scope="module")
def encoder():
    """MiniLM as transformers loads it, with its own tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = locate_encoder("minilm")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_its_encoder_half_gives_the_hidden_states_of_minilm(encoder):
    theirs, tokenizer = encoder
    ids = tokenizer("the river has two banks .", return_tensors="pt")["input_ids"]
    warm = Warm("encoder_decoder")
    assert torch.equal(warm.tokenizer("The river has two banks.", return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        wanted = theirs(input_ids=ids).last_hidden_state
        given = warm.model.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_causal_one_sees_nothing_that_comes_later():
    warm = Warm("causal")
    ids = torch.tensor([[101, 2003, 2009, 7592]])
    changed = ids.clone()
    changed[0, -1] = 2748
    with torch.no_grad():
        one, two = (warm.model(input_ids=x).logits for x in (ids, changed))
    assert torch.equal(one[:, :-1], two[:, :-1]) and not torch.equal(one[:, -1], two[:, -1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arm", ["pst", "pre_thinking"])
def test_its_loss_is_cross_entropy_over_the_logits_of_the_plain_model(shape, arm):
    warm = Warm(shape, arm)
    batch = warm.batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if shape == "encoder_decoder":
        inputs = {f"decoder_{name}": value for name, value in inputs.items()}
        inputs |= {"input_ids": batch.encoder_input_ids, "attention_mask": batch.encoder_attention_mask}
    logits = warm.model(**inputs).logits.flatten(0, 1)[batch.supervised.rows]
    nll = F.cross_entropy(logits, batch.supervised.targets, reduction="none")
    scales = TermWeights.of(warm.config.loss, arm).scales(batch.counts).float()
    output = warm.student(batch, scales)
    assert output.sums[0].item() == pytest.approx(nll[batch.is_answer].sum().item(), rel=1e-5)
    assert output.sums[1].item() == pytest.approx(nll[~batch.is_answer].sum().item(), rel=1e-5)
    plain = (nll * torch.where(batch.is_answer, scales[0], scales[1])).sum()
    assert warm.student._fusible, "the head must not fall back to the slow way"
    named = [(name, value) for name, value in warm.model.named_parameters() if value.requires_grad]
    assert len(named) == len(list(warm.model.named_parameters())), "nothing of it is frozen"
    if arm == "pre_thinking":  # nothing is aligned: the gradients are those of the cross-entropies alone
        ours = torch.autograd.grad(output.loss, [value for _, value in named])
        theirs = torch.autograd.grad(plain, [value for _, value in named])
        for (name, _), one, two in zip(named, ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_bert_with_its_own_head_is_trained_through_the_heads_transform_too():
    """BertLMHeadModel has a layer and a norm between the last hidden state and the vocabulary's matrix."""
    from transformers import BertConfig, BertLMHeadModel

    from pst_dist.training.module import Student

    warm = Warm("causal", "pre_thinking")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertLMHeadModel(BertConfig(vocab_size=30592, is_decoder=True, **sizes)).eval()
    student, batch = Student(model, warm.config.loss, None).eval(), warm.batch()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    nll = F.cross_entropy(logits[batch.supervised.rows], batch.supervised.targets, reduction="sum")
    output = student(batch, torch.ones(3))
    assert output.sums[:2].sum().item() == pytest.approx(nll.item(), rel=1e-5)
    dense = model.cls.predictions.transform.dense.weight
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, dense)[0], torch.autograd.grad(nll, dense)[0], rtol=1e-3, atol=1e-6
    )


def test_generating_with_and_without_a_cache_gives_the_same_tokens(warm):
    ids = [warm.layout.prompt_ids(row.question) for row in ROWS]
    longest, pad = max(map(len, ids)), warm.tokenizer.pad_token_id
    left = not warm.student.is_encoder_decoder
    rows = [[pad] * (longest - len(x)) + x if left else x + [pad] * (longest - len(x)) for x in ids]
    inputs = torch.tensor(rows)
    mask = (inputs != pad).long()

    def generated(rows, **how):
        """(new tokens, the logits that each was chosen by)."""
        with torch.no_grad():
            given = warm.model.generate(
                inputs[rows],
                attention_mask=mask[rows],
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=[],
                return_dict_in_generate=True,
                output_logits=True,
                **how,
            )
        return given.sequences[:, longest if left else 1 :], torch.stack(given.logits, 1)

    ids, logits = generated(slice(None), use_cache=True)
    same_ids, same_logits = generated(slice(None), use_cache=False)
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(logits, same_logits, rtol=1e-4, atol=1e-3)
    assert (logits[0] - logits[1]).abs().max() > 0.1, "they are different questions"
    for k in range(len(ROWS)):  # a row in a batch, padded, and the same row alone
        alone_ids, alone = generated(slice(k, k + 1), use_cache=True)
        assert torch.equal(alone_ids[0], ids[k])
        torch.testing.assert_close(alone[0], logits[k], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    "1,051.50 -3 -0.5 43.5 04/30/2021 12:30 3/4 7 yes no C yajo 1000000 k".split(),
)
def test_answers_come_back_from_tokens_as_they_were(warm, text):
    ids = warm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    assert warm.tokenizer.unk_token_id not in ids
    assert warm.tokenizer.decode([*ids, warm.layout.stop_id], skip_special_tokens=True) == text


def test_neighbouring_numbers_are_not_glued_and_a_difference_is_no_negative_number(warm):
    def back(text):
        return warm.tokenizer.decode(warm.tokenizer(text, add_special_tokens=False)["input_ids"])

    task = get_task("gsm8k")
    for text in ("3, 4 and 5.", "10 - 5 = 5", "10-5 = 5", "it is -3. Then 7.", "a (C) or B --> 1,000"):
        marks = [("-", " - ")] if text == "10-5 = 5" else []  # "-5" in the raw text is what the rule reads there
        plain = text.replace(*marks[0]) if marks else text
        assert task.candidates(back(text)) == task.candidates(plain)
    assert "-->" in back("three and four --> 7")


@pytest.mark.parametrize(
    ("task", "answer", "lost"),
    [
        ("svamp", "1051.5", False),
        ("gsm8k", "-12", False),
        ("aqua", "E", False),
        ("strategy_qa", "yes", False),
        ("last_letter_concatenation", "yajo", False),
        ("last_letter_concatenation", "yAJo", True),
    ],
)
def test_an_answer_that_the_tokenizer_cannot_write_is_found_before_training(warm, task, answer, lost):
    sample = ReasoningSample(id="x", question="?", answer=answer, rationales=("r",), answer_type="text")
    assert bool(unwritable_answers(TextIds(warm.tokenizer), [sample], get_task(task))) is lost


def test_a_marker_that_the_tokenizer_changes_is_refused(warm):
    check_marker(warm.tokenizer, " -->")
    with pytest.raises(ConfigError, match=r"turns layout\.answer_marker ' So The Answer:' into"):
        check_marker(warm.tokenizer, " So The Answer:")


def test_its_tokens_are_one_each_and_a_prompt_ends_where_an_answer_may_begin(warm):
    tokenizer, ids = warm.tokenizer, warm.layout.prompt_ids("2 + 3?")
    check_prompt_ending(tokenizer, is_encoder_decoder=warm.student.is_encoder_decoder)
    assert ids[0] == tokenizer.bos_token_id
    assert (ids[-1] == tokenizer.eos_token_id) is warm.student.is_encoder_decoder
    assert len({tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN, "C", "c")}) == 4
    rows = warm.model.get_input_embeddings().weight
    assert torch.equal(rows[tokenizer.convert_tokens_to_ids("C")], rows[tokenizer.convert_tokens_to_ids("c")])
    assert torch.equal(rows[tokenizer.convert_tokens_to_ids("##.")], rows[tokenizer.convert_tokens_to_ids(".")])


def test_its_size_is_known_without_building_it(warm, tmp_path):
    true = sum(parameter.numel() for parameter in warm.model.parameters())
    shape = shape_of(warm.config.student, max_length=96)
    assert (shape.parameters, shape.hidden_size, shape.exact) == (true, 384, True)
    assert shape.vocabulary == warm.model.get_output_embeddings().out_features
    assert max_positions(warm.model) == 512
    warm.model.save_pretrained(tmp_path)
    saved = config_of(None).student.model_copy(update={"model_name_or_path": str(tmp_path)})
    (tmp_path / "model.safetensors").unlink()
    assert shape_of(saved, max_length=96).parameters == true


def test_doctor_and_preview_know_it(warm):
    (finding,) = models.student(warm.config)
    assert finding.level == "ok"
    words = ["data.train=gen:last_letters?rows=4&seed=0&words=2", "student.model_name_or_path=minilm"]
    shape = warm.config.student.warm_start
    shown = preview(load_config(None, [*words, f"student.warm_start={shape}", "data.validation_size=0"]), 1)
    assert "(answer)" in shown and "(align)" in shown


def test_what_it_cannot_be_made_of_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"512 positions; set layout\.max_length=512"):
        config = Config.model_validate(
            {"layout": {"max_length": 600}, "student": {"model_name_or_path": "minilm", "warm_start": "causal"}}
        )
        build_student(config, build_tokenizer(config.student, []), None)
    with pytest.raises(ConfigError, match=r"student\.warm_start needs an encoder"):
        load_config(None, ["student.warm_start=causal"])
    encoder = {"model_name_or_path": str(locate_encoder("minilm"))}
    with pytest.raises(ConfigError, match=r"an encoder reads but does not write; set student\.warm_start"):
        config = Config.model_validate({"student": encoder})
        build_student(config, Warm("causal").tokenizer, None)
    Warm("causal").model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs a BERT encoder, but this is bert-generation"):
        config = config_of("causal", model_name_or_path=str(tmp_path))
        build_student(config, Warm("causal").tokenizer, None)
