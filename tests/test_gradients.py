"""Reference gradients against one-example-at-a-time autograd."""

from __future__ import annotations

import pytest
import torch
from loops import LORA, loss_of, parameters_of
from models import VOCABULARY, tiny_llama, tokens
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.encoding import Example
from peft_ogpsa.gradients import example_gradients
from peft_ogpsa.modes import switch_to_evaluation
from peft_ogpsa.reference import answer_loss, collate


def ragged(count: int = 5) -> list[Example]:
    """Examples of different lengths, with prompts of different lengths masked."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (4 + 2 * i,), generator=generator).tolist()
        examples.append(Example(ids, 1 + i % 3))
    return examples


def model_with_random_adapter(base=None, **knobs):
    settings = {"rows": 8, **LORA, **knobs}
    model = get_peft_model(tiny_llama() if base is None else base, OGPSAConfig(**settings))
    if base is None:
        model.double()  # so that what is compared is the method, not the rounding of a tiny model's attention
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters_of(model):
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def raw_rows(model) -> list[list[torch.Tensor]]:
    """The stored rows times their norms: one gradient per example, as a list over parameters."""
    subspace = model.projector.subspace
    scaled = [
        rows * norms.unsqueeze(-1).to(rows.dtype)
        for rows, norms in zip(subspace.rows, subspace.blocks.spread(subspace.norms), strict=True)
    ]
    shapes = [parameter.shape for parameter in subspace.blocks.flat_parameters()]
    views = [view.reshape(-1, *shape) for view, shape in zip(subspace.blocks.views(scaled), shapes, strict=True)]
    return [[view[i] for view in views] for i in range(subspace.filled)]


def one_at_a_time(model, examples, loss=answer_loss) -> list[list[torch.Tensor]]:
    switch_to_evaluation(model)
    parameters = model.projector.subspace.blocks.flat_parameters()
    return [
        [g.float() for g in torch.autograd.grad(loss(model, collate([example], 0, "cpu")), parameters)]
        for example in examples
    ]


def assert_rows_equal(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for row, reference in zip(got, expected, strict=True):
        for g, e in zip(row, reference, strict=True):
            assert (g - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("scope", ["slice", "tensor", "module", "model"])
def test_rows_of_a_padded_batch(scope):
    model = model_with_random_adapter(scope=scope, lora_dropout=0.5)
    model.train()
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    assert_rows_equal(raw_rows(model), one_at_a_time(model, examples))


@pytest.mark.parametrize("rows_from", ["example", "batch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_with_gradient_checkpointing(reentrant, rows_from):
    model = model_with_random_adapter(lora_dropout=0.5, rows_from=rows_from)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    examples = ragged()
    runs = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    # The layers' inner values are computed again in the backward pass, where that is possible.
    assert len(runs) == (1 if reentrant else 2)
    assert all(module.training for module in model.modules())
    expected = one_at_a_time(model, examples)
    if rows_from == "batch":
        expected = [[sum(pieces) / len(expected) for pieces in zip(*expected, strict=True)]]
    assert_rows_equal(raw_rows(model), expected)


class Dtypes:
    """A sink that only looks."""

    def __init__(self):
        self.seen = set()

    def add(self, piece, gradients, first=0):
        self.seen.add(gradients.dtype)

    def add_products(self, piece, outputs, inputs, factor):
        self.seen |= {outputs.dtype, inputs.dtype}


def test_gradients_stay_float32_where_the_loop_is_under_autocast():
    model = get_peft_model(tiny_llama(), OGPSAConfig(rows=8, **LORA))
    model.projector.refresh({"set": [collate(ragged(), 0, "cpu")]}, answer_loss)
    sink, projector = Dtypes(), model.projector
    with torch.autocast("cpu", torch.bfloat16):
        example_gradients(
            model, collate(ragged(), 0, "cpu"), answer_loss, projector.subspace.blocks, sink, projector._linears
        )
    assert sink.seen == {torch.float32}


@pytest.mark.parametrize(
    "knobs",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_rows_of_lora_variants(knobs):
    model = model_with_random_adapter(**knobs)
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    assert_rows_equal(raw_rows(model), one_at_a_time(model, examples))


def test_rows_on_a_four_bit_base(tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    model = model_with_random_adapter(base)
    model.train()
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)

    # Single precision all through, so compare an example's gradient as a whole.
    def whole(rows):
        return [[torch.cat([part.flatten() for part in row])] for row in rows]

    assert_rows_equal(whole(raw_rows(model)), whole(one_at_a_time(model, examples)))


def test_token_mean_loss_gives_the_same_directions():
    # transformers' own loss is a mean over all tokens of the batch; unit rows do not see the difference.
    model, reference = model_with_random_adapter(), model_with_random_adapter()
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, loss_of)
    reference.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    for rows, expected in zip(model.projector.subspace.rows, reference.projector.subspace.rows, strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_mix_examples_fall_back_to_one_at_a_time():
    torch.manual_seed(0)

    class Flat(torch.nn.Module):
        """Passes its second layer all tokens of all examples in one list, token by token, as routed experts do."""

        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            listed = self.first(x).tanh().transpose(0, 1).flatten(0, 1)
            return self.second(listed).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    model = get_peft_model(Flat(), OGPSAConfig(r=2, target_modules=["first", "second"], rows=8))
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter.data)
    x = torch.randn(4, 3, 6)

    def loss(net, inputs):
        return net(inputs).square().mean()

    model.projector.refresh({"set": [x]}, loss)
    parameters = model.projector.subspace.blocks.flat_parameters()
    expected = [list(torch.autograd.grad(loss(model, x[i : i + 1]), parameters)) for i in range(4)]
    assert_rows_equal(raw_rows(model), expected)


def test_rows_from_batches_and_sets():
    examples = ragged(6)
    batches = [collate(examples[:4], 0, "cpu"), collate(examples[4:], 0, "cpu")]
    by_batch = model_with_random_adapter(rows_from="batch")
    by_batch.projector.refresh({"set": batches}, answer_loss)
    singles = one_at_a_time(by_batch, examples)

    def mean(rows):
        return [torch.stack(parts).mean(0) for parts in zip(*rows, strict=True)]

    assert_rows_equal(raw_rows(by_batch), [mean(singles[:4]), mean(singles[4:])])
    by_set = model_with_random_adapter(rows_from="set", rows=3)
    by_set.projector.refresh({"set": batches, "other": batches[:1]}, answer_loss)
    assert by_set.projector.subspace.capacity == 2
    assert_rows_equal(raw_rows(by_set), [mean(singles), mean(singles[:4])])


def test_oldest_rows_are_replaced():
    model = model_with_random_adapter(rows=4, rows_from="batch")
    for seed in range(6):
        model.projector.refresh(
            {f"set{seed}": [{"input_ids": tokens(2, seed=seed), "labels": tokens(2, seed=seed)}]}, loss_of
        )
    subspace = model.projector.subspace
    assert subspace.sets == ["set4", "set5", "set2", "set3"]
    alone = model_with_random_adapter(rows=1, rows_from="batch")
    alone.projector.refresh({"a": [{"input_ids": tokens(2, seed=5), "labels": tokens(2, seed=5)}]}, loss_of)
    for rows, expected in zip(subspace.rows, alone.projector.subspace.rows, strict=True):
        torch.testing.assert_close(rows[:, 1:2], expected)
