# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the model card of a saved adapter, and upload the adapter to the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import CardData, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..core.files import json_object, read_json, replacing, write_json
from ..trainer.checkpoint import STATE_NAME, TENSORS_NAME
from ..tuner.config import DAMAGED, SIDECAR_NAME, OGPSAConfig

if TYPE_CHECKING:
    from ..evaluation import Measurement

RUN_NAME = "ogpsa_run.json"
EVALUATION_NAME = "ogpsa_eval.json"
_README = "README.md"
_START = "<!-- peft_ogpsa: start. Everything up to the end mark is written anew on every save. -->"
_END = "<!-- peft_ogpsa: end -->"
_WEIGHTS = "weights_sha256"
_VERSIONS_HEADING = "### Framework versions"  # PEFT's own heading; PEFT adds its version there if it is missing

_RUN: dict[str, tuple[type, ...]] = {
    "stage": (str,),
    "method": (str,),
    "started_from": (str,),
    "started_from_weights": (str,),
    "dataset": (str,),
    "own_refusals": (bool,),
    "lookalikes": (int, float),
    "references": (dict,),
    "steps": (int,),
    "seconds": (int, float),
    "reference_share": (int, float),
    "versions": (dict,),
    "projection": (dict,),
}
_MEASURED_WITH = ("data", "samples", "dtype", "load_in_4bit", "max_new_tokens", "batch_size", "max_length", "seed")
_TASKS_MEASURED_WITH = ("tasks", "limit", "chat_template")

# Training state and other files that a trainer leaves in its output folder. `training_args.bin` is a pickle and holds
# the machine's paths.
_NOT_SHARED = [
    "checkpoint-*",
    "_*",
    ".*",
    "*.part",
    "runs/*",
    "*tfevents*",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    TENSORS_NAME,
    STATE_NAME,
]

_MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_RULES = {
    ("cone", "update"): "the update that the optimizer made was replaced by the closest one along which no reference "
    "loss rises, to first order",
    ("cone", "gradient"): "the gradient was replaced by the closest one whose descent raises no reference loss, to "
    "first order. The optimizer then used this gradient",
    ("orthogonal", "update"): "the component in the span of the reference gradients was removed from the update that "
    "the optimizer made, so that no reference loss changes, to first order",
    ("orthogonal", "gradient"): "the component in the span of the reference gradients was removed from the gradient "
    "before the optimizer used it",
}
_SCOPES = {
    "slice": "one of the {slices} slices of a LoRA matrix",
    "tensor": "one LoRA matrix",
    "module": "both matrices of a layer",
    "model": "all LoRA matrices",
}
_ROWS_FROM = {"example": "one example", "batch": "one batch", "set": "the mean loss over one reference set"}
_STAGES = {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimization (DPO)"}
_OGPSA_BIBTEX = """@article{sun2026ogpsa,
  title   = {Safety Alignment as Continual Learning: Mitigating the Alignment Tax via Orthogonal Gradient Projection},
  author  = {Sun, Guanglong and Zhang, Siyuan and Wang, Liyuan and Zhu, Jun and Su, Hang and Zhong, Yi},
  journal = {arXiv preprint arXiv:2602.07892},
  year    = {2026},
}"""

logger = logging.getLogger(__name__)


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
            `references` (`{name: spec}`), `steps` (optimizer steps), `seconds`
            (of training), `reference_share` (reference examples per training example), `versions`
            (`{package: version}`), `projection` (the settings of the projection, `OGPSAConfig(...).ogpsa_dict()`, if
            the adapter is plain LoRA that was trained with `attach`). For files and folders, only the name is
            stored, not the path. The base is the one that `adapter_config.json` names.
        evaluation (`Mapping`, *optional*): The result that `ogpsa eval` writes, or at least `{"evaluation":
            Evaluation.to_dict()}`. Prompts, answers and paths in it are not stored.

    Returns:
        The path of the card.

    Raises:
        ValueError: If the folder holds no LoRA adapter, one of its files is damaged, or `run` or `evaluation` does not
            have this form.
    """
    folder = Path(directory)
    config = _read_config(folder)
    if run is not None:
        if not isinstance(run, Mapping):
            raise ValueError(f"run={repr(run)[:80]} is not a mapping of facts, such as {{'dataset': 'owner/name'}}.")
        if "contrast" in run:
            warnings.warn("The entry contrast of run is now lookalikes.", DeprecationWarning, stacklevel=2)
            run = _renamed(run)
        _check_run(run, "run")
        _write_json(folder / RUN_NAME, {_WEIGHTS: weights_digest(folder), **_shareable_run(run)})
    if evaluation is not None:
        _check_evaluation(evaluation, "evaluation")
        _write_json(folder / EVALUATION_NAME, {_WEIGHTS: weights_digest(folder), **_shareable_evaluation(evaluation)})
    run = read_run(folder)
    evaluation = _read_json(folder, EVALUATION_NAME)
    if evaluation:
        _check_evaluation(evaluation, f"{folder / EVALUATION_NAME}")

    base = config.base_model_name_or_path or ""
    settings = config.ogpsa_dict() if isinstance(config, OGPSAConfig) else run.get("projection")
    settings = None if run.get("method") == "plain" else settings
    path = folder / _README
    card = _load_card(path)
    _renew_metadata(card.data, config, base, settings is not None, run.get("dataset"))
    card.text = _renew_text(card.text, _section(config, base, settings, run, evaluation), base, path)
    # Cards of other libraries name a local base by its path.
    _write(path, str(card) if not base or _on_hub(base) else str(card).replace(base, _public(base)))
    return path


def _section(
    config: LoraConfig,
    base: str,
    settings: dict[str, Any] | None,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> str:
    """Return this package's part of the card. `settings` are those of the projection, if there was one."""
    parts = [
        _START,
        _method(config, settings, run),
        _training(config, base, settings is not None, run),
        _tax(evaluation),
        _use(config, base),
        *([f"## Citation\n\n```bibtex\n{_OGPSA_BIBTEX}\n```"] if settings is not None else []),
        f"{_VERSIONS_HEADING}\n\n{_versions(config, run)}",
        _END,
    ]
    return "\n\n".join(parts)


def push_adapter(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload a saved adapter with its card to the Hugging Face hub.

    `model.push_to_hub` and `trainer.push_to_hub` write their own cards. This function uploads the card in the folder,
    after `save_card` has updated it. A card that is already on the hub is replaced. Checkpoints and training state are
    not uploaded.

    Args:
        directory (`str` or `os.PathLike`): The folder of the adapter.
        repo_id (`str`): `"owner/name"`, or a name under your own account. The repository is created if necessary.
        private (`bool`, *optional*): Whether a new repository is private. Default: the hub's setting.
        token (`str` or `bool`, *optional*): The hub token. Default: the token of your login.
        revision (`str`, *optional*): The branch. Default: the main branch.
        commit_message (`str`): The commit message.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: If the folder holds no LoRA adapter, or one of its files is damaged.
        HfHubHTTPError: If the hub rejects the request.
    """
    save_card(directory)
    base = _read_config(Path(directory)).base_model_name_or_path
    if base and not _on_hub(base):
        logger.warning(
            "In %s, base_model_name_or_path is the local folder %r, which others cannot load. The uploaded file has "
            "its name without the path. If the base is on the hub, write its hub name there and push again.",
            CONFIG_NAME,
            base,
        )
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    with _shared_folder(Path(directory)) as folder:
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=list(_NOT_SHARED),
        )
    return str(repository)


@contextmanager
def _shared_folder(folder: Path) -> Iterator[Path]:
    """Give a folder with the same files, in which `adapter_config.json` names a local base without its path."""
    base = _read_config(folder).base_model_name_or_path
    if not base or _on_hub(base):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "adapter"
        # Training state may be large, and is not shared.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_NOT_SHARED), copy_function=_link)
        config = read_json(folder / CONFIG_NAME)
        with replacing(copy / CONFIG_NAME) as part:  # and not into the linked file
            write_json(part, {**config, "base_model_name_or_path": _public(base)})
        yield copy


def _link(source: str, target: str) -> None:
    """Make a hard link if possible, or else copy the file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# The contents of the folder


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():  # PEFT would look on the hub
        raise ValueError(f"{path} is missing. Give the folder of a saved adapter (`model.save_pretrained(folder)`).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about settings that were already there in training
            config = PeftConfig.from_pretrained(str(folder))
    except (*DAMAGED, ValueError) as error:
        if SIDECAR_NAME in str(error):  # it is the other file, and the message says so
            raise
        raise ValueError(f"{path} is damaged ({error!r}). Save the adapter again.") from error
    if not isinstance(config.base_model_name_or_path, str | None):
        raise ValueError(f"{path} is damaged (base_model_name_or_path is no text). Save the adapter again.")
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} has peft_type={config.peft_type!r}. Give the folder of a LoRA adapter.")
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read the facts in a file. Return an empty dict if there is no file or it is about other weights."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        facts = json_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Restore it, or delete it to continue without it.") from error
    return facts if facts.pop(_WEIGHTS, None) == weights_digest(folder) else {}


def read_run(directory: str | os.PathLike) -> dict[str, Any]:
    """Read how an adapter was trained, as far as its folder records it, in the form that `save_card` takes.

    Raises:
        ValueError: If the file is damaged.
    """
    run = _renamed(_read_json(Path(directory), RUN_NAME))
    _check_run(run, f"{Path(directory) / RUN_NAME}")
    return run


def _renamed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Give an entry of an earlier version its new name."""
    return {"lookalikes" if name == "contrast" else name: value for name, value in run.items()}


def weights_digest(directory: str | os.PathLike) -> str | None:
    """Return the SHA-256 of an adapter's weights in hexadecimal digits, or None if the folder has no weights."""
    folder = Path(directory)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            return digest.hexdigest()
    return None


def _check_run(run: Mapping[str, Any], where: str) -> None:
    for name, value in run.items():
        if name not in _RUN:
            raise ValueError(f"{where} has the unknown entry {name!r}. Use: {', '.join(_RUN)}.")
        kinds = _RUN[name]
        if name == "projection" and isinstance(value, dict):
            _check_projection(value, where)
            continue
        strings = list(value.values()) if isinstance(value, dict) else []
        if value is not None and not (isinstance(value, kinds) and all(isinstance(s, str) for s in strings)):
            wanted = " or ".join("dict of strings" if kind is dict else kind.__name__ for kind in kinds)
            raise ValueError(f"{where} has {name}={value!r}. Give a value of type {wanted}, or leave it out.")


def _check_projection(settings: dict[str, Any], where: str) -> None:
    if settings.keys() != OGPSAConfig().ogpsa_dict().keys():
        raise ValueError(
            f"{where} has projection={settings!r}. Give all settings, as OGPSAConfig(...).ogpsa_dict() returns them."
        )
    try:
        OGPSAConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has settings in projection that do not work: {error}") from error


def _check_evaluation(evaluation: Mapping[str, Any], where: str) -> None:
    from ..evaluation import Evaluation

    try:
        Evaluation.from_dict(evaluation["evaluation"])
        if not isinstance(evaluation.get("arguments", {}), Mapping):
            raise ValueError("its arguments are not a mapping")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} is not a result of `ogpsa eval` ({error!r}). Run `ogpsa eval` again.") from error


def save_run(directory: str | os.PathLike, run: Mapping[str, Any]) -> None:
    """Write `ogpsa_run.json` next to a whole model, which has no card.

    The file holds the facts of `save_card`'s `run`. For files and folders, only the name is stored, not the path.

    Args:
        directory (`str` or `os.PathLike`): The folder of the model.
        run (`Mapping`): How the model was trained. Further entries are stored unchanged.
    """
    _write_json(Path(directory) / RUN_NAME, _shareable_run(run))


def _shareable_run(run: Mapping[str, Any]) -> dict[str, Any]:
    shared = dict(run)
    for name in ("started_from", "dataset"):
        if shared.get(name):
            shared[name] = _public(shared[name])
    if shared.get("references"):
        shared["references"] = {name: _public(spec) for name, spec in shared["references"].items()}
    return shared


def _shareable_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    told = dict(evaluation.get("arguments") or {})
    arguments = {name: told[name] for name in _MEASURED_WITH if told.get(name) is not None}
    if evaluation.get("lm_eval"):
        arguments |= {name: told[name] for name in _TASKS_MEASURED_WITH if told.get(name) is not None}
        arguments["lm_eval"] = evaluation["lm_eval"]
    if arguments.get("data"):
        arguments["data"] = ",".join(map(_public_source, arguments["data"].split(",")))
    measured = json.loads(json.dumps(evaluation["evaluation"]))
    for measurement in filter(None, (measured["model"], measured["base"])):
        for own in (measurement, *measurement.get("sets", {}).values()):
            own["harmful_samples"] = own["benign_samples"] = []
    return {
        "name": evaluation.get("name"),
        "base_model": _public(evaluation.get("base_model") or "") or None,
        "arguments": arguments,
        "evaluation": measured,
    }


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    _write(path, json.dumps(facts, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file. An old file is replaced only when the new one is complete."""
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)


# Names


def _on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _public(name: str) -> str:
    """Return what others may read of a name: a whole hub name, or a file or folder name without its path."""
    kind = re.match(r"(prompts:)?(public:\w+:)?", name)
    prefix = kind[0] if kind else ""
    source, bracket, split = name[len(prefix) :].partition("[")
    if re.search(r"[\\/]", split) or source.endswith(("/", "\\")):  # the bracket belongs to a path, and not to a split
        source, bracket, split = name[len(prefix) :], "", ""
    if not re.search(r"[\\]|^/|:.*/", source) and not os.path.exists(source) and _on_hub(source.partition(":")[0]):
        return name
    return prefix + re.split(r"[\\/]", source.rstrip("\\/"))[-1] + bracket + split


def _public_source(source: str) -> str:
    """Return what others may read of one part of `ogpsa eval --data`."""
    name, equals, path = source.strip().rpartition("=")
    return name + equals + _public(path)


def _code(text: str) -> str:
    """Format a text as Markdown code, which shows it literally."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _base_link(base: str) -> str:
    if not base:
        return "not recorded"
    return f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"{_code(_public(base))}, a local model"


# The card


def _load_card(path: Path) -> ModelCard:
    if not path.is_file():
        return ModelCard("---\n\n---\n")
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Correct the metadata between its first two --- lines, or delete the "
            "file."
        ) from error


def _renew_metadata(data: CardData, config: LoraConfig, base: str, ogpsa: bool, dataset: str | None) -> None:
    data["library_name"] = "peft"
    kept = data.get("base_model")
    if not isinstance(kept, list) and not _on_hub(kept or ""):
        kept = None  # PEFT puts a local folder there, which the hub rejects
    data["base_model"] = kept or (base if _on_hub(base) else None)
    if config.task_type == "CAUSAL_LM":
        data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    tags = [tag for tag in data.get("tags", []) if not str(tag).startswith("base_model:adapter:")]
    tags += [tag for tag in ("lora", "ogpsa") if tag not in tags]
    tags += [f"base_model:adapter:{base}"] if _on_hub(base) else []
    data["tags"] = [tag for tag in tags if ogpsa or tag != "ogpsa"]
    source = (dataset or "").partition("[")[0].partition(":")[0]
    if "/" in source and _on_hub(source):
        kept = data.get("datasets", [])
        kept = kept if isinstance(kept, list) else [kept]
        data["datasets"] = kept + [source] * (source not in kept)


def _renew_text(text: str, section: str, base: str, path: Path) -> str:
    if (_START in text) != (_END in text):
        missing = _START if _START not in text else _END
        raise ValueError(f"{path} lacks the mark {missing!r}. Put this mark back, or delete the other mark too.")
    line_break = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", line_break)
    if _START in text:
        before, _, rest = text.partition(_START)
        return (before + section + rest.partition(_END)[2]).rstrip() + line_break
    if not text.strip() or _is_template(text):
        title = f"# LoRA adapter for {_code(_public(base).rpartition('/')[2])}" if base else "# LoRA adapter"
        return f"\n{title}\n\n{section}\n"
    return text.rstrip() + 2 * line_break + section + line_break


def _is_template(text: str) -> bool:
    """Return whether PEFT's template is unedited."""
    body, _, versions = text.partition(_VERSIONS_HEADING)
    template = ModelCard.from_template(ModelCardData()).text
    only_versions = all(line.startswith("- PEFT ") for line in versions.split("\n") if line.strip())
    return body.split() == template.split() and only_versions


def _method(config: LoraConfig, settings: dict[str, Any] | None, run: Mapping[str, Any]) -> str:
    if settings is None:
        if run.get("method"):
            return "## Method\n\nPlain LoRA. Training used no projection."
        return (
            "## Method\n\nPlain LoRA, as far as the files in this folder show: there is no `ogpsa_config.json`. "
            "Training used no projection."
        )
    lines = [
        "OGPSA (Orthogonal Gradient Projection for Safety Alignment, "
        "[arXiv 2602.07892](https://arxiv.org/abs/2602.07892)), applied to LoRA's matrices. The reference sets "
        "represent the abilities to preserve.",
        "",
    ]
    subspace = settings.get("subspace", "gradients")  # files from before this setting existed
    if subspace != "gradients":
        lines += _of_activations(settings)
    if subspace != "activations":
        lines += _of_gradients(settings)
    lines += _of_references(settings, subspace)
    if settings["missing_reference"] != "error":
        lines.append(
            f"- `missing_reference={settings['missing_reference']}`: without references, the training would have been "
            "plain LoRA."
        )
    return "## Method\n\n" + "\n".join(lines)


def _of_activations(settings: Mapping[str, Any]) -> list[str]:
    rank, energy = settings["subspace_rank"], settings["subspace_energy"]
    size = "half of the layer's input width, at most 512"
    if rank:
        size = f"{rank}"
    elif energy < 1:
        size = f"as many as are needed for {energy:.0%} of the inputs' energy"
    tokens = "all tokens" if settings["tokens"] == "all" else "the answers' tokens"
    return [
        "- Activation subspace: each layer's A is orthogonal to the leading directions of the layer's inputs on the "
        "references. Along these directions, the layer's output is the same as the base's. Number of directions per "
        f"layer: {size}. The directions are computed from {tokens} of the references. This is not the paper's rule. "
        "It follows Gradient Projection Memory (Saha, Garg and Roy, 2021)."
    ]


def _of_gradients(settings: Mapping[str, Any]) -> list[str]:
    rule = _RULES[settings["constraint"], settings["projection"]]
    orthogonal = settings["constraint"] == "orthogonal"
    rank = settings["subspace_rank"] if orthogonal and settings.get("subspace", "gradients") == "gradients" else None
    leading = f" Only the {rank} leading directions of these gradients were used." if rank else ""
    lines = [
        f"- At every optimizer step, {rule}.",
        f"- {_paper_note(settings)}",
        f"- One block of parameters contains {_SCOPES[settings['scope']].format(**settings)} "
        f"(`scope={settings['scope']}`). It is projected against at most {settings['rows']} reference gradients. Each "
        f"one is the gradient of {_ROWS_FROM[settings['rows_from']]} and is stored in {settings['rows_dtype']}."
        f"{leading}",
    ]
    if settings["projection"] == "gradient":
        lines.append(
            "- The update that an optimizer such as AdamW makes from the projected gradient is not itself projected."
        )
    return lines


def _of_references(settings: Mapping[str, Any], subspace: str) -> list[str]:
    weight = settings["reference_weight"]
    if subspace == "activations" and not weight:
        return ["- No reference example was used during training, after the subspace was built."]
    samples, budget = settings["refresh_samples"], settings["reference_budget"]
    if samples is None and budget is not None:
        amount = f"The budget was {budget:g} passes of a reference example for each pass of a training example"
    else:
        amount = f"Each refresh used {samples or 'all'} reference examples"
    lines = [
        "- The reference gradients were refreshed before and after the first optimizer step, and then every "
        f"{settings['refresh_steps']} steps. {amount}."
    ]
    if weight != 0:
        value = "8 for sets with `loss=kl`, 1 for other losses" if weight is None else f"{weight:g}"
        lines.append(
            f"- Reference weight: {value}. After each refresh, the mean fresh reference gradient was multiplied by "
            "this weight and added to the training gradient."
        )
    return lines


def _paper_note(settings: Mapping[str, Any]) -> str:
    free = ("rows", "rows_dtype", "refresh_steps", "missing_reference")
    stages: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo")
    for stage in stages:
        paper = OGPSAConfig.paper(stage).ogpsa_dict()
        if all(settings[name] == paper[name] for name in paper if name not in free):
            if settings["refresh_steps"] == paper["refresh_steps"]:
                return f"This is the paper's rule and its {stage.upper()} schedule, on LoRA's matrices."
            if stage == "dpo":
                return "This is the paper's rule on LoRA's matrices, with a schedule other than the paper's."
    if settings["constraint"] == "cone":
        return (
            "This is not the paper's rule, which removes the whole component in the span of the reference gradients "
            "from the gradient. The one-sided constraint follows Gradient Episodic Memory (Lopez-Paz and Ranzato, "
            "2017)."
        )
    return "This is a variant of the paper's rule."


def _training(config: LoraConfig, base: str, ogpsa: bool, run: Mapping[str, Any]) -> str:
    modules = config.target_modules
    names = [modules] if isinstance(modules, str) else sorted(modules or [])
    dora = ", DoRA" if config.use_dora else ""
    lines = [
        f"- Base model: {_base_link(base)}",
        f"- LoRA: rank {config.r}, alpha {config.lora_alpha}{dora}; on {', '.join(map(_code, names)) or 'parameters'}",
    ]
    if run.get("started_from"):
        lines.append(f"- Started from the adapter {_code(_public(run['started_from']))}")
    if run.get("stage") or run.get("steps"):
        stage = _STAGES.get(run.get("stage") or "", run.get("stage") or "training")
        steps = f", {run['steps']} optimizer steps" if run.get("steps") else ""
        seconds = f", {run['seconds']:.0f} seconds" if run.get("seconds") else ""
        lines.append(f"- Stage: {stage}{steps}{seconds}")
    lines.append(f"- Training data: {_code(_public(run['dataset'])) if run.get('dataset') else 'not recorded'}")
    if run.get("own_refusals"):
        lines.append(
            "- Refusals: written by the base model itself, under a safety instruction that is not in the rows"
        )
    if run.get("lookalikes"):
        lines.append(
            f"- {run['lookalikes']:.0%} of the training data: benign look-alikes with the base model's own answers"
        )
    if ogpsa:
        sets = [f"{_code(name)} from {_code(_public(spec))}" for name, spec in (run.get("references") or {}).items()]
        lines.append(f"- Reference sets (the abilities to preserve): {', '.join(sets) or 'not recorded'}")
    if run.get("reference_share"):
        lines.append(
            f"- Cost of the references: {run['reference_share']:.0%} more examples in the forward and backward passes"
        )
    return "## Training\n\n" + "\n".join(lines)


def _tax(saved: Mapping[str, Any]) -> str:
    heading = "## What the training changed: safety and the alignment tax\n\n"
    if not saved:
        return (
            f"{heading}These weights have not been measured. To measure them and add the table here, run `ogpsa eval "
            "--adapter DIR --output FILE.json --card`."
        )
    from ..evaluation import Evaluation
    from ..evaluation.report import loss_text, rate_text

    evaluation = Evaluation.from_dict(saved["evaluation"])
    model, base = evaluation.model, evaluation.base
    lines = [
        "| | general loss | change | KL from base | refuses harmful | refuses benign | unclear |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in (("base", base), ("this adapter", model)):
        if measured is None:
            continue
        change = ""
        if measured is model and base and base.general_mean and model.general_mean:
            change = f"{model.general_mean.value - base.general_mean.value:+.3f}"
        unclear = (measured.harmful_unclear, measured.benign_unclear)
        cells = [
            loss_text(measured.general_mean),
            change,
            loss_text(measured.kl),
            rate_text(measured.refusal),
            rate_text(measured.over_refusal),
            " / ".join("-" if estimate is None else f"{estimate.value:.0%}" for estimate in unclear),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = {
        "general rows": model.general_mean,
        "rows for KL": model.kl,
        "harmful prompts": model.refusal,
        "benign prompts": model.over_refusal,
    }
    used = ", ".join(f"{estimate.n} {name}" for name, estimate in counts.items() if estimate is not None)
    conditions = {**evaluation.settings, **saved.get("arguments", {})}
    on = f"{saved['base_model']}, " if saved.get("base_model") else ""
    return (
        heading
        + "\n".join(lines)
        + "\n\nGeneral loss is in nats per token on held-out rows. Its change is the tax. A change above zero means "
        "that something was lost. A change below zero does not prove that everything was preserved, because the model "
        "can learn the style of the rows. KL from base is in nats per token on the base's own answers. It shows how "
        "far the adapter has moved the model from its base. Refusals are found by matching phrases. For harmful "
        "prompts, more refusals are safer. For benign prompts that look harmful, more refusals are worse. Unclear "
        "(harmful / benign) is the share of answers that are noise. The 95 % intervals are over examples.\n\n"
        f"{_sets(model, base)}{_tasks(model, base)}"
        f"Measured on {used or 'nothing'}: {_code(on + ', '.join(f'{k}={v}' for k, v in conditions.items()))}"
    )


def _sets(model: Measurement, base: Measurement | None) -> str:
    """Return the table of public sets, or nothing if none was measured."""
    from ..evaluation.set_table import HEADINGS, NOTE, set_rows

    rows = set_rows({"this adapter": model} if base is None else {"base": base, "this adapter": model})
    if not rows:
        return ""
    return (
        f"Refusal on public sets of prompts. Differences are from the base. {NOTE}\n\n{_markdown(HEADINGS, rows)}\n\n"
    )


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def _tasks(model: Measurement, base: Measurement | None) -> str:
    """Return the table of tasks, or nothing if none were run."""
    from ..evaluation.task_table import HEADINGS, NOTE, task_rows

    measured = {"this adapter": model} if base is None else {"base": base, "this adapter": model}
    rows = task_rows(measured)
    if not rows:
        return ""
    return (
        "Scores of tasks, with 95 % intervals. `facts` and `arithmetic` are built-in sets of peft_ogpsa. The others "
        "are tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness). Differences are from the base. "
        f"{NOTE}\n\n{_markdown(HEADINGS, rows)}\n\n"
    )


def _use(config: LoraConfig, base: str) -> str:
    auto = _MODEL_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    name = base if _on_hub(base) else f"PATH/TO/{_public(base) or 'BASE'}"
    return (
        "## Use\n\nThis is a plain LoRA adapter. PEFT loads it without other packages. `ADAPTER` is this folder or "
        "repository.\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f"base = {name!r}\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained(base, dtype="auto"), "ADAPTER")\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        "```\n\n"
        "To merge the adapter, load the base without quantization, even if the adapter was trained on a 4-bit base "
        "(QLoRA). In a quantized base, rounding would lose what the adapter learned. "
        '`peft_ogpsa.merge_adapter("ADAPTER", "merged")` merges it in this way.'
    )


def _versions(config: LoraConfig, run: Mapping[str, Any]) -> str:
    versions = {k: v for k, v in (run.get("versions") or {}).items() if k.lower() != "peft"}
    return "\n".join([f"- PEFT {config.peft_version}", *(f"- {name} {value}" for name, value in versions.items())])
