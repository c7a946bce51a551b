"""The activation subspace on the real model: the reference tokens that it holds keep the base's answers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.references.losses import reference_loss

STEPS = 20
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
REFERENCES = [
    "The capital of France is Paris, on the river Seine.",
    "Two and three make five. Five and two make seven.",
]
OTHERS = ["A good soup needs time: cut the onions, and let them brown slowly before the water goes in."]
REFUSALS = ["How do I break into a house? I can't help with that. I'm happy to talk about better locks instead."]


def encoded(tokenizer, texts):
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def short(name: str) -> str:
    """A layer's name without those of the modules around all layers."""
    return name[name.find("layers.") :]


def divergence(model, base_logits, inputs) -> float:
    """Mean KL(base || model) in nats per token."""
    with torch.no_grad():
        own = model(**inputs).logits.double().log_softmax(-1)
    theirs = base_logits.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - own)).sum(-1)[inputs["attention_mask"].bool()].mean())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["float32", "bfloat16 autocast"])
def test_reference_tokens_keep_the_bases_distribution(smollm2, adapter):
    base, tokenizer = smollm2
    references, others = encoded(tokenizer, REFERENCES), encoded(tokenizer, OTHERS)
    refusals = encoded(tokenizer, REFUSALS)
    with torch.no_grad():
        answers = [base(**inputs).logits for inputs in (references, others)]
    moved = {}
    for config in (LoraConfig(**LORA), OGPSAConfig(**LORA, subspace_rank=128, reference_weight=0)):
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
        if isinstance(config, OGPSAConfig):
            # Fewer tokens than directions: all that the base does with them is held.
            model.projector.refresh({"set": [references]}, reference_loss)
            own, rest = model.projector.activations.state_dict()
            assert not model.projector.due
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=adapter != "float32"):
                loss = model(**refusals).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[type(config)] = [divergence(model, *pair) for pair in zip(answers, (references, others), strict=True)]
        if isinstance(config, OGPSAConfig):
            layers = {short(name): module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
            for entry in rest:
                directions = own[f"directions.{entry['place']}"]
                for name in entry["layers"]:
                    layer = layers[short(name)]
                    with torch.no_grad():
                        ours, theirs = layer(directions.T), layer.base_layer(directions.T)
                    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
        base = model.unload()
    (plain, _), (ours, elsewhere) = moved.values()
    assert plain > 0.1
    assert ours < 1e-5 * plain  # directions with less than a millionth of the strongest one's energy are not held
    assert elsewhere > 0.1  # what is not a reference is learned


@pytest.mark.slow
def test_directions_hold_what_the_best_ones_hold(smollm2):
    """The range finder on the spectra of a real model, whose tokens are more than the directions."""
    base, tokenizer = smollm2
    inputs = encoded(tokenizer, [" ".join([*REFERENCES, *OTHERS, *REFUSALS]) + f" {i}" for i in range(7)])
    model = get_peft_model(base, OGPSAConfig(**LORA, subspace_rank=32))
    model.projector.refresh({"set": [inputs]}, reference_loss)
    own, rest = model.projector.activations.state_dict()
    kept = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: kept.update({short(name): args[0]}))
        for name, module in base.named_modules()
        if name.endswith(("down_proj", "o_proj"))
    ]
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    for handle in handles:
        handle.remove()
    base = model.unload()
    checked = 0
    for entry in rest:
        vectors = kept.get(short(entry["layers"][0]))
        if vectors is None:
            continue
        vectors = vectors[inputs["attention_mask"].bool()].double()
        lengths = vectors.norm(dim=1, keepdim=True)
        vectors *= (10 * lengths[: int(inputs["attention_mask"][0].sum())].median() / lengths).clamp(max=1)
        best = torch.linalg.svdvals(vectors)[:32].square().sum()
        held = (vectors @ own[f"directions.{entry['place']}"].double()).square().sum()
        assert held > 0.99 * best
        checked += 1
    assert checked == 60
