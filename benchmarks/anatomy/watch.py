# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The training run on which everything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from peft_ogpsa.core.gradient_subspace import GradientSubspace
from peft_ogpsa.core.layout import Stack
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.text.tokenization import Example
from peft_ogpsa.tuner.model import projector_of

from . import angles
from .ages import MATRICES, Ages
from .places import place
from .probe import Probe
from .rules import OPTIMIZERS, RULES, Rules
from .shares import Shares

ANCHORS = (0, 1, 5, 10)
"""The steps whose gradients are compared with those of later steps."""

CLIP = 1.0
"""The largest length of the training gradient, as in transformers' `Trainer`."""


def watch(
    model: Any,
    training: Sequence[Sequence[Example]],
    sets: Mapping[str, Sequence[Example]],
    *,
    probed: int,
    rate: float,
    pad: int,
    anchors: Sequence[int] = ANCHORS,
) -> dict[str, Any]:
    """Train an OGPSA adapter with AdamW. Measure before every step, and once after the last one.

    Args:
        model: A model with an OGPSA adapter. The adapter must project the update, have the scope `tensor`, and set
            `refresh_samples`.
        training: Training batches.
        sets: Reference examples by set. Rows are made from all but the first `probed` examples of each set.
        probed: Number of examples of each set that are measured at every step.
        rate: The learning rate.
        pad: The token to pad with.
        anchors: See `Ages`.

    Returns:
        `shares`, `cosines`, `rules`, `ages` and `losses`, ready for JSON.
    """
    projector, config, batch = projector_of(model), projector_of(model).config, len(training[0])
    assert config.projection == "update"
    assert config.scope == "tensor"
    assert config.refresh_samples is not None
    loader = ReferenceLoader({name: own[probed:] for name, own in sets.items()}, config.refresh_samples, batch)
    probe = Probe({name: own[:probed] for name, own in sets.items()}, pad, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    cosines: dict[str, list[Any]] = {name: [] for name in ("gradient", "proposed", "made")}
    rules: dict[str, dict[str, dict[str, list[Any]]]] = {
        name: {rule: {"whole": [], "worst": []} for rule in RULES} for name in OPTIMIZERS
    }
    watched: tuple[Shares, Ages, Rules] | None = None
    model.train()
    for step, examples in enumerate(tqdm(training, "Steps", delay=5)):
        if projector.due:
            drawn = loader.draw()
            refreshing = {name: [collate(part, pad, model.device) for part in own] for name, own in drawn.items()}
            projector.refresh(refreshing, answer_loss)
            assert projector.subspace is not None
            subspaces = {"cone": projector.subspace, "orthogonal": _orthogonal(projector.subspace)}
            blocks = projector.subspace.blocks
        if watched is None:
            places = [place(name) for name in blocks.names()]
            watched = Shares(places), Ages(places, probe.owners, anchors), Rules(blocks, len(sets), rate)
        shares, ages, followers = watched
        references = probe.gradients(model, blocks)
        means = probe.means(references)
        ages.add(step, references)
        loss = answer_loss(model, collate(examples, pad, model.device))
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        with torch.no_grad():
            before = blocks.stack()
            gradient = blocks.stack([parameter.grad for parameter in blocks.flat_parameters()])
            proposed: Stack = []
            for name, rule, change in followers.changes(before, gradient, means):
                rules[name][rule]["whole"].append(angles.plain(angles.whole(means, change)))
                rules[name][rule]["worst"].append(angles.worst(means, change))
                if (name, rule) == ("AdamW", "no projection"):
                    proposed = change  # up to rounding, the step of `optimizer`, which got the same gradients
            descent = [-part.float() for part in proposed]
            removed = {name: own.coefficients(own.directed(descent))[1] for name, own in subspaces.items()}
            shares.add(angles.squares(proposed), removed)
        optimizer.step()  # the projector's hooks run before and after it
        optimizer.zero_grad()
        with torch.no_grad():
            made = [now - then for now, then in zip(blocks.stack(), before, strict=True)]
        for name, own in {"gradient": [-part for part in gradient], "proposed": proposed, "made": made}.items():
            cosines[name].append(angles.plain(angles.whole(means, own)))
    assert watched is not None
    shares, ages, _ = watched
    ages.add(len(training), probe.gradients(model, blocks))
    return {
        "losses": losses,
        "shares": {
            "all": shares.by(lambda where: "all"),
            "matrix": shares.by(lambda where: where.matrix),
            "kind": shares.by(lambda where: where.kind),
            "layer": shares.by(lambda where: f"{where.matrix}{where.layer}"),
            "step": {matrices: shares.along(matrices) for matrices in (*MATRICES, "AB")},
        },
        "cosines": {"sets": probe.names, **cosines},
        "rules": {"sets": probe.names, **rules},
        "ages": {
            "cosines": {
                matrix: {str(anchor): [angles.plain(now) for now in later] for anchor, later in own.items()}
                for matrix, own in ages.cosines.items()
            },
            "others": {matrix: angles.plain(torch.stack(own)) for matrix, own in ages.others.items()},
            "lengths": ages.lengths,
        },
    }


def _orthogonal(cone: GradientSubspace) -> GradientSubspace:
    """Return a subspace with the same rows and the orthogonal constraint."""
    twin = GradientSubspace(cone.blocks, cone.rows.capacity, "orthogonal")
    twin.load_state_dict(*cone.state_dict())
    return twin
