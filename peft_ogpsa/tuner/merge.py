# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging an adapter into the right base model."""

from __future__ import annotations

import gc
import itertools
import os
import textwrap
import warnings
from typing import Any, cast

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import has_file

from .. import compat


def merge_adapter(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    *,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device_map: str | dict | None = None,
) -> PreTrainedModel:
    """Merge a saved adapter into the full weights of its base model.

    Do not merge an adapter that was trained on a 4-bit base (QLoRA) into that base. The sum would be rounded to 4 bits
    again, and most of what the adapter learned would be lost. So this function loads the base unquantized.

    Args:
        adapter (`str`): Folder or hub name of the adapter.
        output_dir (`str`, *optional*): Where to save the merged model and the tokenizer, which is the adapter's
            own, or else the base's.
        base (`str`, *optional*): Folder or hub name of the base; by default the one that the adapter names.
        dtype (`torch.dtype`): Dtype of the merged weights. The sum itself is computed in float32.
        device_map (*optional*): As in transformers.

    Returns:
        The merged model, without an adapter.

    Raises:
        ValueError: If the adapter is for another task than a causal language model, whose head would be lost, if it
            has no weights for some of the layers that it adapts, if the base itself is stored quantized, if the merged
            weights are not finite, or if the adapter's tokenizer cannot be loaded.
    """
    adapter = os.fspath(adapter)
    config = PeftConfig.from_pretrained(adapter)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"adapter={adapter!r} has task_type={config.task_type!r}, but merge_adapter loads the base as a causal "
            "language model and would lose the trained head. Load the base with the class of its task, then call "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload()."
        )
    source = os.fspath(base or config.base_model_name_or_path or "")
    revision = {"revision": config.revision} if base is None and config.revision else {}
    tokenizer = None  # loaded first, because it may be damaged
    if output_dir is not None:
        tokenizer = saved_tokenizer(adapter) or AutoTokenizer.from_pretrained(source, **revision)
    adapted = _adapted(adapter, source, revision, device_map)
    _untie(adapted.get_base_model())
    merged = _cast(adapted.merge_and_unload(safe_merge=True), dtype)
    if output_dir is not None and tokenizer is not None:
        merged.save_pretrained(os.fspath(output_dir))
        tokenizer.save_pretrained(os.fspath(output_dir))
    return merged


def _adapted(adapter: str, source: str, revision: dict[str, str], device_map: str | dict | None) -> Any:
    """Load the base and the adapter, with the class of the base that the adapter was made for.

    transformers has two classes for some models with images, whose layers have different names: one for the text
    alone, and the one that the model's configuration names.

    Raises:
        ValueError: If the adapter fits neither, or the base is stored quantized.
    """
    named = getattr(AutoConfig.from_pretrained(source, **revision), "architectures", None) or [""]
    own: Any = getattr(transformers, named[0], None)
    missing = ""
    for kind in dict.fromkeys((AutoModelForCausalLM, own)):
        if kind is None:
            continue
        model: Any = kind.from_pretrained(source, dtype=torch.float32, device_map=device_map, **revision)
        if getattr(model, "quantization_method", None) is not None:
            raise ValueError(
                f"base={source!r} is stored quantized. An adapter merged into it would lose most of what it learned. "
                "Give the unquantized model: merge_adapter(..., base=NAME)."
            )
        try:
            return load_whole_adapter(model, adapter)
        except UserWarning as warning:
            missing = missing or textwrap.shorten(str(warning), 300)
        del model  # the memory may not hold two
        gc.collect()
    raise ValueError(
        f"adapter={adapter!r} does not fit base={source!r}: it has no weights for some of the layers that it adapts. "
        f"{missing} Give the model that it was made for: merge_adapter(..., base=NAME)."
    )


def load_whole_adapter(model: PreTrainedModel, adapter: str, **options: Any) -> PeftModel:
    """Load a saved adapter onto its base. The options are those of `PeftModel.from_pretrained`.

    Raises:
        UserWarning: If the adapter has no weights for some of the layers that it adapts. PEFT only warns, and these
            layers would stay those of the base.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Found missing adapter keys", UserWarning)
        return PeftModel.from_pretrained(model, adapter, **options)


def saved_tokenizer(adapter: str) -> Any:
    """Load the tokenizer that is saved with an adapter, in its folder or on the hub. Return None if there is none.

    Raises:
        ValueError: If it cannot be loaded.
    """
    try:
        if not has_file(adapter, "tokenizer_config.json"):
            return None
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"adapter={adapter!r} has a tokenizer that cannot be loaded: {error} Save the tokenizer again, or delete "
            "its files to use the base's."
        ) from error


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights, except those that transformers keeps in float32, such as the biases of some routers."""
    kept = compat.kept_in_float32(model, dtype)
    saved = model.state_dict().keys()  # other buffers, such as frequencies of positions, are computed in float32
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in saved and weight.is_floating_point() and not kept(name):
            weight.data = weight.data.to(dtype)
    return model


def _untie(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own if it shares the embeddings' and one of the two has an adapter.

    The adapter of one of them would otherwise be merged into both.
    """
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or not any(isinstance(layer, BaseTunerLayer) for layer in (inputs, output)):
        return
    own, other = (cast(Any, getattr(layer, "base_layer", layer)) for layer in (output, inputs))
    if own.weight is other.weight:
        own.weight = nn.Parameter(own.weight.detach().clone())
        model.config.tie_word_embeddings = False
