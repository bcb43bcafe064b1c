"""The student: its loss against the plain model's logits, whatever is supervised and however the batch is cut."""

import gc

import pytest
import torch
import torch.nn.functional as F
import zoo
from tiny import ROWS, Tiny, TinyTeacher

from pst_dist.arms import ARMS, Segment
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.student.tokenizer import build_tokenizer, with_special_tokens
from pst_dist.training.batching.batches import Collator
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student, build_student, vocabulary_of

KEYS = [(row.id, 0) for row in ROWS]


def collator(tiny):
    return Collator(
        loss=tiny.config.loss,
        pad_id=tiny.tokenizer.pad_token_id,
        decoder_start_id=tiny.student.decoder_start_id,
        teacher=TinyTeacher() if ARMS[tiny.config.arm].aligned else None,
    )


def batch_of(tiny, rows, *, muted=False):
    sequences = [sequence for row in rows for sequence in tiny.layout.sequences(row)]
    return collator(tiny)(sequences, keys=KEYS, key_groups=range(len(KEYS)), muted=muted)


def gradient(tiny, cut):
    """Loss and the flat gradient of the rows as one global batch, cut into forward passes."""
    tiny.student.zero_grad()
    batches = [batch_of(tiny, rows or ROWS[:1], muted=not rows) for rows in cut]
    scales = TermWeights.of(tiny.config.loss, tiny.config.arm).scales(sum(batch.counts for batch in batches))
    total = 0.0
    for batch in batches:
        loss = tiny.student(batch, scales.float()).loss
        loss.backward()
        total += loss.item()
    grads = [p.grad for p in tiny.student.parameters()]
    assert all(grad is not None for grad in grads), "every parameter must be connected to the loss"
    return total, torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("arm", list(ARMS))
def test_head_on_supervised_rows_equals_cross_entropy_over_all_logits(arm, architecture):
    tiny = Tiny(arm, architecture)
    tiny.student.eval()
    batch = batch_of(tiny, ROWS)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.encoder_input_ids is not None:
        inputs = {
            "input_ids": batch.encoder_input_ids,
            "attention_mask": batch.encoder_attention_mask,
            "decoder_input_ids": batch.input_ids,
            "decoder_attention_mask": batch.attention_mask,
        }
    with torch.no_grad():
        logits = tiny.model(**inputs).logits.flatten(0, 1)[batch.supervised.rows].double()
        sums = tiny.student(batch, torch.ones(3)).sums
    nll = F.cross_entropy(logits, batch.supervised.targets, reduction="none")
    assert sums[0].item() == pytest.approx(nll[batch.is_answer].sum().item(), rel=1e-5)
    assert sums[1].item() == pytest.approx(nll[~batch.is_answer].sum().item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "loss",
    [{}, {"alignment": "info_nce"}, {"alignment": "smooth_l1", "pooling": "span"}, {"denominator": "per_token"}],
    ids=["cosine", "info_nce", "span", "per_token"],
)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(architecture, loss):
    tiny = Tiny("pst", architecture, loss=loss)
    tiny.student.eval()
    whole_loss, whole = gradient(tiny, [ROWS])
    for cut in ([ROWS[:2], ROWS[2:]], [ROWS[:1], (), ROWS[1:2], ROWS[2:]]):
        loss_value, cut_gradient = gradient(tiny, cut)
        assert loss_value == pytest.approx(whole_loss, rel=1e-5)
        assert (cut_gradient - whole).norm() <= 1e-5 * whole.norm()


def layers_of(tiny, batch):
    """Every layer's output as the plain model gives it, the embedding first."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.encoder_input_ids is not None:
        decoder = {f"decoder_{name}": value for name, value in inputs.items()}
        inputs = {"input_ids": batch.encoder_input_ids, "attention_mask": batch.encoder_attention_mask, **decoder}
    made = tiny.model(**inputs, output_hidden_states=True)
    return made.decoder_hidden_states if batch.encoder_input_ids is not None else made.hidden_states


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("pooling", ["token", "span"])
def test_another_layer_is_aligned_where_the_config_says_so(architecture, pooling):
    def term(layer):
        tiny = Tiny("pst", architecture, loss={"layer": layer, "pooling": pooling}, seed=2)
        tiny.student.eval()
        batch = batch_of(tiny, ROWS)
        loss = tiny.student(batch, torch.tensor([0.0, 0.0, 1.0])).loss
        loss.backward()
        return tiny, batch, loss.item()

    tiny, batch, first = term(1)
    with torch.no_grad():
        states, parts = layers_of(tiny, batch), []
        wanted = Segment.SEMANTIC if pooling == "token" else Segment.RATIONALE
        for row, segments in zip(states[1], batch.segment_ids, strict=True):
            parts.append(row[segments == wanted].mean(0))
        cosines = F.cosine_similarity(tiny.student.head(torch.stack(parts)), batch.teacher_emb)
    assert first == pytest.approx((1 - cosines).sum().item(), rel=1e-4)
    assert len(states) == 3
    assert term(2)[2] == pytest.approx(term(None)[2], rel=1e-5) == pytest.approx(term(-1)[2], rel=1e-5)
    untouched = [name for name, value in tiny.model.named_parameters() if value.grad is None or not value.grad.any()]
    last = {"gpt2": "transformer.h.1.", "llama": "model.layers.1.", "t5": "decoder.block.1."}[architecture]
    assert any(name.startswith(last) for name in untouched), "what comes after the layer has no part in its loss"


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_the_student_does_not_have_is_refused(layer):
    tiny = Tiny("pst", loss={"layer": layer})
    with pytest.raises(ConfigError, match="layers 1 to 2"):
        tiny.student(batch_of(tiny, ROWS), torch.ones(3))


@pytest.mark.parametrize("loss", [{}, {"alignment": "info_nce", "symmetric": True}], ids=["cosine", "symmetric"])
def test_a_muted_batch_gives_a_zero_loss_connected_to_every_parameter(loss):
    tiny = Tiny("pst", loss=loss)
    loss, grads = gradient(tiny, [()])
    assert loss == 0 and not grads.any()


def hidden_gradient(student, batch, scales):
    """Gradient of the loss to the hidden state that the model hands to its head."""
    kept = []
    head = student.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    loss = student(batch, scales).loss
    handle.remove()
    return torch.autograd.grad(loss, kept[-1])[0]


@pytest.mark.parametrize("model", ["fused", "capped"])
def test_gradient_norms_of_the_terms_are_those_of_separate_backward_passes(model):
    tiny = Tiny("pst")
    student = tiny.student if model == "fused" else capped_student(tiny)
    student.eval()
    batch = batch_of(tiny, ROWS)
    weights = torch.tensor([1.0, 0.5, 2.0])
    student.watch_gradients = True
    (student(batch, weights).loss * 3).backward()
    measured = student.squared_gradients.sqrt() / 3
    student.watch_gradients = False
    for index in range(3):
        alone = hidden_gradient(student, batch, weights * torch.eye(3)[index])
        assert measured[index].item() == pytest.approx(alone.norm().item(), rel=1e-4)


def capped_student(tiny):
    """A Gemma-2 student, whose model caps the logits that its head returns."""
    torch.manual_seed(1)
    model = zoo.gemma_model(len(tiny.tokenizer), final_logit_softcapping=0.5, attn_implementation="eager")
    return Student(model, tiny.config.loss, TinyTeacher.dimension)


def test_a_model_that_caps_its_logits_is_trained_on_the_capped_ones(caplog):
    tiny = Tiny("pst")
    student = capped_student(tiny).eval()
    batch = batch_of(tiny, ROWS)
    with caplog.at_level("INFO"):
        output = student(batch, torch.tensor([1.0, 1.0, 0.0]))
    assert "its head runs unfused" in caplog.text
    logits = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.abs().max() <= 0.5
    nll = F.cross_entropy(logits.flatten(0, 1)[batch.supervised.rows], batch.supervised.targets, reduction="sum")
    assert output.loss.item() == pytest.approx(nll.item(), rel=1e-5)
    mine = torch.autograd.grad(output.loss, list(student.model.parameters()))
    for one, two in zip(mine, torch.autograd.grad(nll, list(student.model.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_finding_out_about_a_model_leaves_no_trace():
    """The first forward pass tries the model on a token; a resumed run must draw the same random numbers after it."""
    tiny = Tiny("pst")
    tiny.student.train()
    torch.manual_seed(7)
    tiny.student._returns_the_heads_logits(batch_of(tiny, ROWS))
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1)) and tiny.model.training
    assert "forward" not in vars(tiny.model.get_output_embeddings())


def test_a_watched_pass_leaves_nothing_alive_after_its_backward():
    """A hook that held what it hangs on would keep the pass until the collector runs: memory for nothing."""
    tiny = Tiny("pst")
    tiny.student.watch_gradients = True
    batch = batch_of(tiny, ROWS)

    def tensors_after_a_pass():
        tiny.student(batch, torch.ones(3)).loss.backward()
        # By type: `isinstance` also asks a weak proxy, and raises when what it stood for is gone.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    tensors_after_a_pass()  # gradients exist from here on
    gc.collect()
    gc.disable()
    try:
        assert tensors_after_a_pass() == tensors_after_a_pass()
    finally:
        gc.enable()


def test_the_alignment_head_is_not_part_of_the_exported_model():
    tiny = Tiny("pst")
    assert tiny.student.head is not None
    inside = {id(parameter) for parameter in tiny.model.parameters()}
    assert id(tiny.student.head.weight) not in inside


def test_a_pretrained_student_gets_rows_for_the_special_tokens(tmp_path):
    tiny = Tiny("pst")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    config = Config.model_validate({"student": {"model_name_or_path": str(tmp_path)}, "layout": {"max_length": 96}})
    tokenizer = build_tokenizer(config.student, [])
    student = build_student(config, tokenizer, 8)
    assert len(tokenizer) == len(tiny.tokenizer)
    assert student.model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_a_student_that_is_not_there_is_refused_in_one_line():
    config = Config.model_validate({"student": {"model_name_or_path": "no/such-model-anywhere"}})
    with pytest.raises(EnvironmentFault, match="cannot load the student's tokenizer"):
        build_tokenizer(config.student, [])


def test_a_tokenizer_that_cannot_hold_the_stop_token_is_refused():
    class Closed:
        """A tokenizer that takes no new tokens, as some byte-level ones do."""

        eos_token_id, pad_token_id, unk_token_id = 1, 0, 2

        def add_special_tokens(self, *_, **__):
            return 0

        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(letter) for letter in text]}

        def convert_tokens_to_ids(self, _):
            return 2

    with pytest.raises(ConfigError, match="does not accept the special token"):
        with_special_tokens(Closed())


def test_a_resized_head_is_as_wide_as_its_weight_whatever_its_attribute_says():
    # transformers 5.0 ties BART's head to the resized embeddings without changing out_features.
    head = torch.nn.Linear(4, 6, bias=False)
    head.out_features = 5
    assert vocabulary_of(head, None) == 6
    head.weight = torch.nn.Parameter(torch.empty(0))  # as under ZeRO-3, where another attribute has the shape
    assert vocabulary_of(head, None) == 5
    head.weight.ds_shape = torch.Size([6, 4])
    assert vocabulary_of(head, None) == 6
