# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the model card of a saved adapter."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from ..tuner.config import OGPSAConfig
from .evaluation_record import read_evaluation, store_evaluation
from .folder import read_config, write
from .metadata import renew_metadata
from .names import on_hub, public
from .run_record import read_run, recorded_dataset, store_run
from .sections.markdown import code
from .sections.method import method_section, projected, referenced
from .sections.results import results_section
from .sections.training import training_section
from .sections.use import use_section, versions_section

logger = logging.getLogger(__name__)

_README = "README.md"
_START = "<!-- peft_ogpsa: start. Everything up to the end mark is written anew on every save. -->"
_END = "<!-- peft_ogpsa: end -->"
_VERSIONS_HEADING = "### Framework versions"  # PEFT's own heading; PEFT adds its version there if it is missing
_OGPSA_BIBTEX = """@article{sun2026ogpsa,
  title   = {Safety Alignment as Continual Learning: Mitigating the Alignment Tax via Orthogonal Gradient Projection},
  author  = {Sun, Guanglong and Zhang, Siyuan and Wang, Liyuan and Zhu, Jun and Su, Hang and Zhong, Yi},
  journal = {arXiv preprint arXiv:2602.07892},
  year    = {2026},
}"""


def save_card(
    directory: str | os.PathLike,
    *,
    run: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Path:
    """Write or update the model card (`README.md`) of a saved adapter, from the files in its folder.

    The card is built from `adapter_config.json`, `ogpsa_config.json` (without it the adapter is plain LoRA),
    `ogpsa_run.json` and `ogpsa_eval.json`. The last two store `run` and `evaluation`, with a checksum of the adapter's
    weights. Facts about other weights, which a later training has replaced, are left out of the card.

    In an existing card, text and metadata are kept, except for the part between the marks of this package. PEFT's
    template is replaced if nobody has filled it in.

    Args:
        directory (`str` or `os.PathLike`): The folder of the adapter.
        run (`Mapping`, *optional*): How the adapter was trained. Each entry is optional: `stage` (`"sft"` or `"dpo"`),
            `method` (`"ogpsa"`, `"paper"` or `"plain"`), `started_from` (the adapter that training continued from),
            `started_from_weights` (the checksum of that adapter's weights), `dataset`, `own_refusals` (whether the
            base model wrote the refusals itself), `lookalikes` (the share of benign look-alikes in the dataset),
            `references` (`{name: spec}`), `steps` (optimizer steps), `best_step` (the step whose weights are saved, if
            they are not the last ones), `seconds` (of training), `reference_share` (reference examples per training
            example), `versions` (`{package: version}`), `model_class` (the base's class in transformers, if
            `AutoModelForCausalLM` loads another one), `projection` (the settings of the projection,
            `OGPSAConfig(...).ogpsa_dict()`, if the adapter is plain LoRA that was trained with `attach`). For files
            and folders, only the name is stored, not the path. The base is the one that `adapter_config.json` names.
        evaluation (`Mapping`, *optional*): The result that `ogpsa eval` writes, or at least `{"evaluation":
            Evaluation.to_dict()}`. If it has the checksum of the measured weights (`weights`), they must be those in
            the folder. Prompts, answers and paths in it are not stored.

    Returns:
        The path of the card.

    Raises:
        ValueError: If the folder holds no LoRA adapter, one of its files is damaged, `run` or `evaluation` does not
            have this form, or `evaluation` is about other weights.
    """
    folder = Path(directory)
    config = read_config(folder)
    earlier = recorded_dataset(folder)
    if run is not None:
        store_run(folder, run)
    if evaluation is not None:
        store_evaluation(folder, evaluation)
    run = read_run(folder)
    evaluation = read_evaluation(folder)

    base = config.base_model_name_or_path or ""
    settings = config.ogpsa_dict() if isinstance(config, OGPSAConfig) else run.get("projection")
    settings = None if run.get("method") == "plain" else settings
    path = folder / _README
    card = _load_card(path)
    renew_metadata(card.data, config, base, projected(settings, run), run.get("dataset"), earlier)
    card.text = _renew_text(card.text, _section(config, base, settings, run, evaluation), base, path)
    # Cards of other libraries name a local base by its path.
    write(path, str(card) if not base or on_hub(base) else str(card).replace(base, public(base)))
    return path


def check_card(directory: str | os.PathLike) -> None:
    """Check that `save_card` can update the card in a folder, before the work whose facts the card gets.

    Raises:
        ValueError: If the card is not one, or has only one of this package's marks.
        OSError: If it cannot be read.
    """
    path = Path(directory) / _README
    _check_marks(_load_card(path).text, path)


def set_aside(directory: str | os.PathLike) -> None:
    """Rename a card that cannot be read. PEFT reads it before it saves the weights, and would not save them."""
    path = Path(directory) / _README
    try:
        _load_card(path)
    except (ValueError, OSError) as error:
        names = (f"{_README}.bak{number or ''}" for number in itertools.count())
        other = next(own for own in map(path.with_name, names) if not os.path.lexists(own))
        path.rename(other)
        logger.warning("%s. It is renamed to %s, and a new card is written.", str(error).rstrip("."), other.name)


def _section(
    config: LoraConfig,
    base: str,
    settings: dict[str, Any] | None,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> str:
    """Return this package's part of the card. `settings` are those of the projection, if they are known."""
    parts = [
        _START,
        method_section(settings, run),
        training_section(config, base, referenced(settings, run), run),
        results_section(evaluation),
        use_section(config, base, run),
        *([f"## Citation\n\n```bibtex\n{_OGPSA_BIBTEX}\n```"] if projected(settings, run) else []),
        f"{_VERSIONS_HEADING}\n\n{versions_section(config, run)}",
        _END,
    ]
    return "\n\n".join(parts)


def _load_card(path: Path) -> ModelCard:
    if not path.exists():
        return ModelCard("---\n\n---\n")
    try:
        return ModelCard.load(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}). Save it as UTF-8, or delete it.") from error
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Correct the metadata between its first two --- lines, or delete the "
            "file."
        ) from error


def _check_marks(text: str, path: Path) -> None:
    if (_START in text) != (_END in text):
        missing = _START if _START not in text else _END
        raise ValueError(f"{path} lacks the mark {missing!r}. Put this mark back, or delete the other mark too.")


def _renew_text(text: str, section: str, base: str, path: Path) -> str:
    _check_marks(text, path)
    line_break = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", line_break)
    if _START in text:
        before, _, rest = text.partition(_START)
        return (before + section + rest.partition(_END)[2]).rstrip() + line_break
    if not text.strip() or _is_template(text):
        title = f"# LoRA adapter for {code(public(base).rpartition('/')[2])}" if base else "# LoRA adapter"
        return f"\n{title}\n\n{section}\n"
    return text.rstrip() + 2 * line_break + section + line_break


def _is_template(text: str) -> bool:
    """Return whether PEFT's template is unedited."""
    body, _, versions = text.partition(_VERSIONS_HEADING)
    template = ModelCard.from_template(ModelCardData()).text
    only_versions = all(line.startswith("- PEFT ") for line in versions.split("\n") if line.strip())
    return body.split() == template.split() and only_versions
