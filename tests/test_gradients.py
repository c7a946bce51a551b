"""Reference gradients against one-example-at-a-time autograd."""

from __future__ import annotations

from collections import namedtuple

import peft
import pytest
import torch
from loops import LORA, batch, loss_of, ogpsa_model, parameters_of
from models import VOCABULARY, tiny_llama, tiny_mixtral, tokens
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_ogpsa import FullParameterConfig, OGPSAConfig, attach
from peft_ogpsa.core.gradients import example_gradients, examples_of
from peft_ogpsa.core.isolation import switch_to_evaluation
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.references.losses.kl import KLLoss
from peft_ogpsa.text.tokenization import Example


def ragged(count: int = 5) -> list[Example]:
    """Examples of different lengths, with prompts of different lengths masked."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (4 + 2 * i,), generator=generator).tolist()
        examples.append(Example(ids, 1 + i % 3))
    return examples


def model_with_random_adapter(base=None, **overrides):
    settings = {"subspace": "gradients", "rows": 8, **LORA, **overrides}
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
        for rows, norms in zip(subspace.rows.stack, subspace.blocks.spread(subspace.rows.norms), strict=True)
    ]
    shapes = [parameter.shape for parameter in subspace.blocks.flat_parameters()]
    views = [view.reshape(-1, *shape) for view, shape in zip(subspace.blocks.views(scaled), shapes, strict=True)]
    return [[view[i] for view in views] for i in range(subspace.rows.filled)]


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


class Offloaded(torch.autograd.Function):
    """Checkpointing of its own, as tools have it: its backward pass leaves the weights' gradients in `.grad`."""

    @staticmethod
    def forward(ctx, function, hidden, *others):
        ctx.save_for_backward(hidden)
        ctx.function, ctx.others = function, others
        with torch.no_grad():
            return function(hidden, *others)

    @staticmethod
    def backward(ctx, gradient):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.others)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad, *(None for _ in ctx.others)


def always_reentrant(function, *arguments, use_reentrant=None, **options):
    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=True, **options)


def of_the_layer(function, *arguments, use_reentrant=None, **options):
    """As in tools that look at the layer whose method they get, which a function of ours is not."""
    assert next(function.func.__self__.parameters()) is not None
    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False, **options)


CHECKPOINTS = {
    "non-reentrant": torch.utils.checkpoint.checkpoint,
    "reentrant": torch.utils.checkpoint.checkpoint,
    "made reentrant": always_reentrant,
    "offloaded": lambda function, *arguments, use_reentrant: Offloaded.apply(function, *arguments),
    "of the layer": of_the_layer,
}


@pytest.mark.parametrize("rows_from", ["example", "batch"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_rows_with_gradient_checkpointing(kind, rows_from, monkeypatch):
    """Tools replace what transformers checkpoints with, whatever the keyword says."""
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", CHECKPOINTS[kind])
    model = model_with_random_adapter(lora_dropout=0.5, rows_from=rows_from)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    model.train()
    examples = ragged()
    runs = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    # The layers' inner values are computed again in the backward pass, where that is possible.
    assert len(runs) == (2 if kind == "non-reentrant" else 1)
    assert all(module.training for module in model.modules())
    expected = one_at_a_time(model, examples)
    if rows_from == "batch":
        expected = [[sum(pieces) / len(expected) for pieces in zip(*expected, strict=True)]]
    assert_rows_equal(raw_rows(model), expected)


@pytest.mark.parametrize("rows_from", ["example", "batch"])
def test_a_graph_that_is_cut_is_an_error(rows_from):
    model = model_with_random_adapter(rows_from=rows_from)
    other = torch.ones((), requires_grad=True)

    def cut(model, batch):
        return answer_loss(model, batch).detach() * other

    with pytest.raises(RuntimeError, match=r"no gradient for any projected parameter\. .*use_reentrant"):
        model.projector.refresh({"set": [collate(ragged(), 0, "cpu")]}, cut)


class Dtypes:
    """A sink that only looks."""

    def __init__(self):
        self.seen = set()

    def add(self, index, gradients, first=0):
        self.seen.add(gradients.dtype)

    def add_products(self, index, outputs, inputs, factor):
        self.seen |= {outputs.dtype, inputs.dtype}


def test_gradients_stay_float32_where_the_loop_is_under_autocast():
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", rows=8, **LORA))
    model.projector.refresh({"set": [collate(ragged(), 0, "cpu")]}, answer_loss)
    sink, projector = Dtypes(), model.projector
    with torch.autocast("cpu", torch.bfloat16):
        example_gradients(
            model,
            collate(ragged(), 0, "cpu"),
            answer_loss,
            projector.subspace.blocks,
            sink,
            projector._refresher._linears,
        )
    assert sink.seen == {torch.float32}


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_rows_of_lora_variants(overrides):
    model = model_with_random_adapter(**overrides)
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    assert_rows_equal(raw_rows(model), one_at_a_time(model, examples))


def test_rows_on_a_four_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
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
    for rows, expected in zip(
        model.projector.subspace.rows.stack, reference.projector.subspace.rows.stack, strict=True
    ):
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

    model = get_peft_model(Flat(), OGPSAConfig(subspace="gradients", r=2, target_modules=["first", "second"], rows=8))
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
    assert by_set.projector.subspace.rows.capacity == 2
    assert_rows_equal(raw_rows(by_set), [mean(singles), mean(singles[:4])])


def test_oldest_rows_are_replaced():
    model = model_with_random_adapter(rows=4, rows_from="batch")
    for seed in range(6):
        model.projector.refresh(
            {f"set{seed}": [{"input_ids": tokens(2, seed=seed), "labels": tokens(2, seed=seed)}]}, loss_of
        )
    subspace = model.projector.subspace
    assert subspace.rows.sets == ["set4", "set5", "set2", "set3"]
    alone = model_with_random_adapter(rows=1, rows_from="batch")
    alone.projector.refresh({"a": [{"input_ids": tokens(2, seed=5), "labels": tokens(2, seed=5)}]}, loss_of)
    for rows, expected in zip(subspace.rows.stack, alone.projector.subspace.rows.stack, strict=True):
        torch.testing.assert_close(rows[:, 1:2], expected)


def rows_equal_those_of_single_examples(model, batch, loss, count):
    """Compares the rows of one batch with autograd, an example at a time."""
    model.projector.refresh({"set": [batch]}, loss)
    switch_to_evaluation(model)
    parameters = model.projector.subspace.blocks.flat_parameters()
    expected = [
        [
            torch.zeros_like(p) if g is None else g.float()
            for g, p in zip(
                torch.autograd.grad(loss(model, examples_of(batch, [i])), parameters, allow_unused=True),
                parameters,
                strict=True,
            )
        ]
        for i in range(count)
    ]
    assert min(float(torch.stack([row[k].norm() for row in expected]).max()) for k in range(len(parameters))) > 0
    assert_rows_equal(raw_rows(model), expected, 1e-4)


def mixtral(**overrides):
    return model_with_random_adapter(tiny_mixtral(), task_type="CAUSAL_LM", **overrides)


@pytest.mark.parametrize(
    "build",
    [
        lambda: mixtral(target_modules=["q_proj", "w1", "w2", "w3"]),
        lambda: mixtral(
            target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
        lambda: model_with_random_adapter(tiny_llama(), target_modules=[], target_parameters=["q_proj.weight"]),
        lambda: model_with_random_adapter(
            tiny_llama(), target_modules=["q_proj", "v_proj"], monteclora_config=peft.MontecloraConfig()
        ),
    ],
    ids=["experts by their old names", "experts", "a parameter", "MonteCLoRA"],
)
def test_rows_of_weights_that_are_used_without_a_call_of_their_module(build):
    rows_equal_those_of_single_examples(build(), collate(ragged(), 0, "cpu"), answer_loss, 5)


def test_rows_of_attention_that_reads_its_weights_itself():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model = get_peft_model(Net(), OGPSAConfig(subspace="gradients", r=2, target_modules=["attention", "head"], rows=4))
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter.data, std=0.3)
    rows_equal_those_of_single_examples(model, torch.randn(3, 5, 16), lambda net, x: net(x).square().mean(), 3)


def small(network, targets, rows=8):
    model = get_peft_model(
        network, OGPSAConfig(subspace="gradients", r=2, target_modules=targets, rows=rows, reference_weight=0.0)
    )
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter.data)
    return model


def test_rows_of_a_weight_read_beside_a_call_that_reaches_no_loss():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            self.first(x)  # to no end
            a, b = (getattr(self.first, name)["default"].weight for name in ("lora_A", "lora_B"))
            return self.head((x @ a.T @ b.T).tanh())

    torch.manual_seed(0)
    model = small(Net(), ["first", "head"])
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)


class Tied(torch.nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return torch.nn.functional.linear(self.encoder(x).tanh(), self.encoder.weight.T)


class ReadByItsHook(torch.nn.Sequential):
    """A hook on a layer reads the layer's weight, too."""

    def __init__(self, register):
        super().__init__(torch.nn.Linear(6, 6, bias=False), torch.nn.Tanh())
        getattr(self[0], register)(getattr(self, register[len("register_") :]))

    def forward_hook(self, layer, args, output):
        return output + 2 * args[0] @ layer.weight

    def forward_pre_hook(self, layer, args):
        return (args[0] @ layer.weight).tanh()


@pytest.mark.parametrize(
    "build",
    [Tied, lambda: ReadByItsHook("register_forward_hook"), lambda: ReadByItsHook("register_forward_pre_hook")],
    ids=["tied autoencoder", "forward hook", "forward pre-hook"],
)
def test_rows_of_a_weight_that_its_module_uses_and_other_code_too(build):
    torch.manual_seed(0)
    rows_equal_those_of_single_examples(
        whole_weights(build()), torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4
    )


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_rows_of_layers_with_hooks_that_scale(register):
    def scale(module, args, output=None):
        sizes.append(len(args[0]))
        return 3 * (args[0] if output is None else output)

    torch.manual_seed(0)
    sizes = []
    model = small(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)), ["0", "2"])
    getattr(model.base_model.model[0].lora_A["default"], register)(scale)
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)
    assert sizes == [4, 1, 1, 1, 1]  # one pass for all examples, and then those of the oracle


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_layer_leaves_its_weight_in_training(error):
    def fail(*_):
        raise error

    model = whole_weights(torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False)))
    weight = model[0].weight
    model[0].forward = fail
    with pytest.raises(error):
        model.projector.refresh({"set": [torch.randn(4, 3, 6)]}, lambda net, x: net(x).square().mean())
    assert model[0].weight is weight
    assert weight.requires_grad
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("length", [3, 4, 5])
def test_rows_of_layers_with_the_sequence_first(length):
    # Of four examples of four tokens, the shape does not say which axis is which.
    class SequenceFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.second(self.first(x.transpose(0, 1)).tanh()).transpose(0, 1)

    torch.manual_seed(0)
    model = small(SequenceFirst(), ["first", "second"])
    rows_equal_those_of_single_examples(model, torch.randn(4, length, 6), lambda net, x: net(x).square().mean(), 4)


class WithRelu(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Masked(torch.nn.Linear):
    """Uses a part of its weight, as in sparse training."""

    def forward(self, x):
        mask = torch.arange(self.weight.numel()).view_as(self.weight) % 2
        return torch.nn.functional.linear(x, self.weight * mask)


def whole_weights(network, rows=4):
    network.projector = attach(network, FullParameterConfig(rows_from="example", rows=rows))
    return network


@pytest.mark.parametrize("layer", [WithRelu, Masked])
def test_rows_of_linear_layers_with_a_forward_of_their_own(layer):
    torch.manual_seed(0)
    model = whole_weights(torch.nn.Sequential(layer(6, 5, bias=False), torch.nn.Linear(5, 2, bias=False)))
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)


@pytest.mark.parametrize(
    "first",
    [
        lambda layer, x: torch.nn.functional.relu(layer(x), inplace=True),
        lambda layer, x: layer(x).mul_(2).tanh(),
        lambda layer, x: layer(input=x).tanh(),
    ],
    ids=["ReLU in place", "product in place", "by keyword"],
)
def test_rows_of_layers_called_by_keyword_or_changed_in_place(first):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 2, bias=False)

        def forward(self, x):
            sizes.append(len(x))
            return self.head(first(self.first, x))

    torch.manual_seed(0)
    sizes = []
    rows_equal_those_of_single_examples(
        whole_weights(Net()), torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4
    )
    assert sizes == [4, 1, 1, 1, 1]  # one pass for all examples, and then those of the oracle


def test_a_fallback_forgets_what_the_hooks_have_added():
    # In the backward pass the second layer is seen first, and its examples are apart; those of the first are not.
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            listed = self.first(x.transpose(0, 1).flatten(0, 1)).tanh()
            return self.second(listed.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1))

    torch.manual_seed(0)
    model = small(Net(), ["first", "second"])
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)


def test_rows_of_a_weight_that_two_modules_share():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
    model = small(network, ["0", "2"])
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)


def test_products_of_rows_are_taken_without_autocast():
    model = model_with_random_adapter().float()
    examples = collate(ragged(), 0, "cpu")
    model.projector.refresh({"set": [examples]}, answer_loss)

    class Watcher(Dtypes):
        def add_products(self, index, outputs, inputs, factor):
            self.seen.add(torch.is_autocast_enabled("cpu"))

    sink = Watcher()
    with torch.autocast("cpu", torch.bfloat16):
        example_gradients(
            model, examples, answer_loss, model.projector.subspace.blocks, sink, model.projector._refresher._linears
        )
    assert sink.seen == {False}


def model_that_drops_out(checkpointing: bool, **settings):
    """A model in training mode whose layers pass their own mode to dropout."""
    torch.manual_seed(0)
    base = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.5,
        )
    )
    model = model_with_random_adapter(base, target_modules=["q_proj", "v_proj"], **settings)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_of_the_kl_loss_does_not_drop_out(checkpointing):
    """Its pass is without gradients, for which transformers does not call the checkpointing function."""
    model = model_that_drops_out(checkpointing)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # the adapter changes nothing
    modes = {name: module.training for name, module in model.named_modules()}
    model.projector.refresh({"set": [collate(ragged(), 0, "cpu")]}, KLLoss().loss)
    assert not any(part.any() for row in raw_rows(model) for part in row)
    assert model.projector.diagnostics._losses == {"set": 0.0}
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_drop_out_by_their_own_mode_do_not_in_a_reference_pass(checkpointing):
    model = model_that_drops_out(checkpointing)
    layers = model.get_base_model().model.decoder.layers
    functions = [layer.__dict__.get("_gradient_checkpointing_func") for layer in layers]
    runs = []
    layers[0].fc1.register_forward_hook(lambda *_: runs.append(layers[0].training))
    examples = ragged()
    model.projector.refresh({"set": [collate(examples, 0, "cpu")]}, answer_loss)
    assert runs == [False] * (2 if checkpointing else 1)  # computed again in the backward pass
    assert all(module.training for module in model.modules())
    assert [layer.__dict__.get("_gradient_checkpointing_func") for layer in layers] == functions
    rows = raw_rows(model)
    assert_rows_equal(rows, one_at_a_time(model, examples), 1e-4)


def test_rows_of_a_layer_that_is_given_windows_of_many_examples():
    # Twelve tokens, token by token, in two windows: neither axis is as long as there are examples.
    class Windowed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            count, length, _ = x.shape
            mixed = self.first(x).tanh().transpose(0, 1).flatten(0, 1)
            windows = mixed.unflatten(0, (2, -1)) if count > 1 else mixed.unsqueeze(0)
            return self.second(windows).flatten(0, 1).unflatten(0, (length, count)).transpose(0, 1)

    torch.manual_seed(0)
    model = small(Windowed(), ["first", "second"])
    rows_equal_those_of_single_examples(model, torch.randn(4, 3, 6), lambda net, x: net(x).square().mean(), 4)


def test_the_loss_of_examples_that_are_passed_one_at_a_time_is_their_mean():
    torch.manual_seed(0)
    model = small(torch.nn.Sequential(torch.nn.Linear(6, 4)), ["0"])
    x = torch.randn(4, 6)  # two axes, so that hooks do not tell examples from tokens
    found = model.projector.refresh({"set": [x]}, lambda net, inputs: net(inputs).square().mean())
    assert found["set"] == pytest.approx(float(model(x).square().mean()), rel=1e-5)


def test_every_batch_of_a_refresh_is_checkpointed():
    model = ogpsa_model(rows_from="batch")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    runs = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.projector.refresh({"set": [batch(1), batch(2), batch(3)]}, loss_of)
    assert len(runs) == 6


def test_batches_may_be_named_tuples():
    Pair = namedtuple("Pair", "ids labels")
    part = examples_of(Pair(torch.ones(3, 2), torch.ones(3)), [1])
    assert part.ids.shape == (1, 2)


@pytest.mark.parametrize("kind", [list, tuple])
def test_rows_of_examples_with_weights_in_a_list(kind):
    def loss(net, inputs):
        return (net(inputs["x"]).square().flatten(1).mean(1) * torch.tensor(inputs["weights"])).mean()

    torch.manual_seed(0)
    model = small(torch.nn.Sequential(torch.nn.Linear(6, 4)), ["0"])
    x, weights = torch.randn(3, 6), [1.0, 0.5, 2.0]  # two axes, so that examples are passed one at a time
    model.projector.refresh({"set": [{"x": x, "weights": kind(weights)}]}, loss)
    parameters = model.projector.subspace.blocks.flat_parameters()
    expected = [
        [weight * part for part in torch.autograd.grad(model(one).square().mean(), parameters)]
        for one, weight in zip(x, weights, strict=True)
    ]
    assert_rows_equal(raw_rows(model), expected)


def test_what_is_selected_of_a_batch():
    x = torch.arange(6.0).view(3, 2)
    batch = {
        "x": x,
        "texts": ["a", "b", "c"],
        "spans": ((0, 1), (2, 3), (4, 5)),
        "scalars": [torch.tensor(0), torch.tensor(1), torch.tensor(2)],
        "layers": (x, x + 1, x + 2),  # as many as there are examples, each with all examples
        "pairs": [{"x": x}, {"x": x + 1}, {"x": x + 2}],
        "sizes": [224, 224],
        "nested": {"names": ["d", "e", "f"]},
        "text": "abc",
        "scale": 2.0,
    }
    part = examples_of(batch, [2, 0])
    first = x[[2, 0]]
    torch.testing.assert_close(part["x"], first)
    torch.testing.assert_close(part["layers"], (first, first + 1, first + 2))
    torch.testing.assert_close([own["x"] for own in part["pairs"]], [first, first + 1, first + 2])
    assert part["texts"] == ["c", "a"]
    assert part["spans"] == ((4, 5), (0, 1))
    assert part["scalars"] == [torch.tensor(2), torch.tensor(0)]
    assert part["nested"] == {"names": ["f", "d"]}
    assert (part["sizes"], part["text"], part["scale"]) == ([224, 224], "abc", 2.0)
