# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa quickstart`: safety training of a small model, with the alignment tax measured."""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from .. import __version__, compat, data
from ..core.files import check_writable, json_lines, replacing, write_json
from ..evaluation import Evaluation, Evaluator, Measurement, table, tradeoff
from ..references.sets import ReferenceSet
from ..sharing.card import check_card, save_card
from ..text.tokenization import encode_row
from ..trainer.callback import OGPSACallback
from ..tuner.config import OGPSAConfig
from ..tuner.model import projector_of
from . import tables
from .arguments import refuse_repeated_lists
from .errors import input_errors
from .eval_data import refuse_bad_answers, refuse_bad_prompts
from .eval_plan import versions
from .models import SMOLLM2, load_model

_MAX_LENGTH = 1024  # tokens of a general row
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Rows = dict[str, list[dict[str, Any]]]
"""Conversations by kind: harmful, benign and general."""

REFERENCES = ("general", "benign")
"""The names of the reference sets, which are also the names of their rows."""


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        label: Its name in the table and the plot.
        config: Makes the adapter's configuration.
        answers: The answers of its reference examples, `"given"` or the `"base"`'s. `None`: it has no references.
    """

    label: str
    config: Callable[[], LoraConfig]
    answers: Literal["given", "base"] | None = "base"


METHODS: dict[str, Method] = {
    "plain": Method("plain LoRA", lambda: LoraConfig(**_LORA), None),
    "kl": Method("KL penalty, no projection", lambda: OGPSAConfig(subspace="none", **_LORA)),
    "paper": Method("OGPSA, published rule", lambda: OGPSAConfig.paper("sft", **_LORA), "given"),
    "ogpsa": Method("OGPSA, null space and KL penalty", lambda: OGPSAConfig(**_LORA)),
    "null_space": Method("OGPSA, null space", lambda: OGPSAConfig(reference_weight=0, **_LORA)),
    "cone": Method("OGPSA, cone and KL penalty", lambda: OGPSAConfig(subspace="gradients", **_LORA)),
}


@dataclass
class QuickstartArguments:
    """Options of `ogpsa quickstart`."""

    model: str = field(default=SMOLLM2, metadata={"help": "Chat model: a folder or a name on the Hugging Face hub."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder with harmful_train.jsonl, harmful_test.jsonl, and the same for benign and general, in the "
            "format of the built-in data. By default, the built-in data is used."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["plain", "kl", "paper", "ogpsa"],
        metadata={"help": f"Methods to train. Choose from: {', '.join(METHODS)}."},
    )
    steps: int = field(default=24, metadata={"help": "Number of optimizer steps for each method."})
    batch_size: int = field(default=8, metadata={"help": "Training examples per step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of AdamW. It stays constant."})
    reference_samples: int = field(default=24, metadata={"help": "Maximum number of examples in each reference set."})
    test_samples: int = field(
        default=32,
        metadata={"help": "Maximum number of held-out rows of each kind per measurement. KL uses half of it."},
    )
    measurements: int = field(
        default=2, metadata={"help": "Number of measurements of each method during its training."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cpu or cuda. By default, this is cuda if a GPU is available, and otherwise cpu."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed for initialization, data order and sampling."})
    output_dir: str = field(
        default="quickstart", metadata={"help": "Folder for the plot, the report and the adapter."}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods={unknown[0]!r} is unknown. Choose from: {', '.join(METHODS)}.")
        twice = [name for name in METHODS if self.methods.count(name) > 1]
        if twice:
            raise ValueError(f"methods={self.methods} names {twice[0]!r} twice. Name each method once.")
        for name in ("steps", "batch_size", "reference_samples", "test_samples", "measurements"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class MethodResult:
    """Training of one method: its measurements along the steps, and its cost."""

    curve: list[Measurement]
    seconds: float
    """Seconds of training, without measurements."""
    reference_share: float
    """Reference examples per training example: the extra forward and backward work."""
    build_seconds: float
    refresh_seconds: float
    projection_seconds: float
    log: list[dict[str, Any]]


class _Measure(TrainerCallback):
    """Measure the model during training. Until the last step, measure only what the plot needs, then everything."""

    def __init__(self, evaluator: Evaluator, name: str, count: int) -> None:
        self.evaluator, self.name, self.count = evaluator, name, count
        self.on_the_way = Evaluator(
            evaluator.processing_class,
            harmful=evaluator.harmful,
            general=evaluator.general,
            max_new_tokens=evaluator.max_new_tokens,
            batch_size=evaluator.batch_size,
        )
        self.curve: list[Measurement] = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        points = {round(args.max_steps * (i + 1) / self.count) for i in range(self.count)}
        if state.global_step in points:
            evaluator = self.evaluator if state.global_step == args.max_steps else self.on_the_way
            self.curve.append(evaluator.measure(model, self.name, state.global_step))


class _Progress(TrainerCallback):
    """One line for each method: its steps, the training loss and the time."""

    def __init__(self, name: str, console: Console) -> None:
        columns = (TextColumn("Training [bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns, TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), console=console
        )
        self._task = self._progress.add_task(name, total=None, loss="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.update(self._task, total=args.max_steps)
        self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.advance(self._task)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._progress.update(self._task, loss=f"{float(logs['loss']):.3f}")

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        self._progress.stop()


def train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LoraConfig,
    name: str,
    rows: Rows,
    evaluator: Evaluator,
    arguments: QuickstartArguments,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[MethodResult, PeftModel]:
    """Train one method on the harmful requests and their refusals. The callbacks decide what is preserved."""
    set_seed(arguments.seed)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    measure = _Measure(evaluator, name, arguments.measurements)
    progress = _Progress(name, console)
    own: list[TrainerCallback] = [measure, *callbacks, progress]
    encoded = [encode_row(tokenizer, row, f"harmful row {i}") for i, row in enumerate(rows["harmful"])]
    # Use transformers' own trainer: TRL's also reports every token's entropy, a third of the time on a CPU.
    trainer = Trainer(
        model,
        args=compat.use_one_gpu(
            TrainingArguments(
                output_dir=os.path.join(arguments.output_dir, "trainer"),
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                disable_tqdm=False,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
                use_cpu=arguments.device == "cpu",
                dataloader_pin_memory=False,
            )
        ),
        train_dataset=Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in encoded]),
        data_collator=DataCollatorForSeq2Seq(_with_padding(tokenizer)),
        processing_class=tokenizer,
        callbacks=own,
    )
    for printing in (ProgressCallback, PrinterCallback):  # either prints every log entry as a dictionary
        trainer.remove_callback(printing)
    start = time.perf_counter()
    try:
        trainer.train()
    finally:
        progress.stop()
    seconds = time.perf_counter() - start - sum(m.seconds for m in measure.curve)
    examples, times = 0, {}
    if isinstance(config, OGPSAConfig):
        diagnostics = projector_of(model).diagnostics
        examples = diagnostics.reference_examples
        times = diagnostics.stopwatch.totals()
    result = MethodResult(
        measure.curve,
        seconds,
        examples / (arguments.steps * arguments.batch_size),
        times.get("build", 0.0),
        times.get("refresh", 0.0),
        times.get("projection", 0.0),
        [entry for entry in trainer.state.log_history if "loss" in entry],
    )
    return result, model


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad. Padding is masked, so any token works."""
    if tokenizer.pad_token is not None:
        return tokenizer
    padding = copy.deepcopy(tokenizer)  # a copy shares its special tokens
    padding.pad_token = tokenizer.eos_token
    return padding


def _record(arguments: QuickstartArguments, result: MethodResult) -> dict[str, Any]:
    """Return what the adapter's card says about the run."""
    folder = arguments.data

    def source(name: str) -> str:
        return f"builtin:{name}" if folder is None else os.path.join(folder, f"{name}_train.jsonl")

    return {
        "stage": "sft",
        "method": "ogpsa",
        "dataset": source("harmful"),
        # As `ogpsa sft` records them: the base answered these prompts itself.
        "references": {name: f"prompts:{source(name)}" for name in REFERENCES},
        "reference_share": result.reference_share,
        "steps": arguments.steps,
        "seconds": result.seconds,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")} | {"peft-ogpsa": __version__}


def references(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, samples: int, *, given: bool
) -> list[ReferenceSet]:
    """Build the reference sets from general and benign conversations, with the given or the base model's answers."""
    if given:
        return [ReferenceSet(name, rows[name], samples=samples) for name in REFERENCES]
    return [
        ReferenceSet.from_prompts(name, rows[name], base, tokenizer, samples=samples, max_new_tokens=64)
        for name in REFERENCES
    ]


def load_rows(folder: str | None) -> tuple[Rows, Rows]:
    """Load training and held-out rows by name: harmful, benign and general.

    Raises:
        ValueError: If a file is missing, is not in UTF-8 or has no rows, or one of its lines is not a JSON object.
    """
    rows: dict[str, Rows] = {"train": {}, "test": {}}
    for split, of_split in rows.items():
        for name in data.NAMES:
            if folder is None:
                of_split[name] = data.load(name, split)
                continue
            path = Path(folder) / f"{name}_{split}.jsonl"
            if not path.is_file():
                raise ValueError(
                    f"data={folder!r} does not contain {path.name}. Add it, or leave out `data` to use the built-in "
                    "rows."
                )
            try:
                of_split[name] = list(json_lines(path.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not in UTF-8. Save it as UTF-8.") from error
            except ValueError as error:
                raise ValueError(f"{path}, {error}. Correct this line.") from error
            if not of_split[name]:
                raise ValueError(
                    f"{path} has no rows. Add at least one row, or leave out `data` to use the built-in rows."
                )
    return rows["train"], rows["test"]


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    with input_errors("quickstart"):
        parser = HfArgumentParser(cast(Any, QuickstartArguments), prog="ogpsa quickstart")
        refuse_repeated_lists(parser, arguments)
        (parsed,) = parser.parse_args_into_dataclasses(list(arguments))
        check_writable(parsed.output_dir, "output_dir")
        if "ogpsa" in parsed.methods:
            check_card(Path(parsed.output_dir) / "adapter")
        rows = load_rows(parsed.data)
    quickstart(parsed, *rows)


def quickstart(arguments: QuickstartArguments, train_rows: Rows, test_rows: Rows) -> dict[str, Any]:
    """Train and measure every method, print the table, and write the plot, the report and the adapter of `ogpsa`.

    Args:
        arguments: The command's options.
        train_rows: Training rows from `load_rows`.
        test_rows: Held-out rows from `load_rows`.

    Returns:
        The contents of the report.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # of loading weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = tables.console()
    start = time.perf_counter()
    console.print(f"Loading [bold]{escape(arguments.model)}[/bold] ...")
    with input_errors("quickstart"):
        try:
            base, tokenizer, source = load_model(arguments.model, device=arguments.device or "cpu")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={arguments.model!r} cannot be loaded: {error} Give a folder with a model and its tokenizer, "
                "or a name on the Hugging Face hub that this machine can reach."
            ) from error
        _check_rows(tokenizer, train_rows, test_rows, arguments)
    evaluator = _evaluator(tokenizer, test_rows, arguments)
    console.print(f"Measuring the base model ({source}) ...", markup=False)
    measured_base = evaluator.base(base)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, MethodResult] = {}
    report: dict[str, Any] = {}
    for name in arguments.methods:
        method = METHODS[name]
        config = method.config()
        callbacks = _callbacks(method, base, tokenizer, train_rows, arguments)
        results[name], model = train(
            base, tokenizer, config, method.label, train_rows, evaluator, arguments, console, callbacks
        )
        if name == "ogpsa":
            model.save_pretrained(str(output / "adapter"), save_embedding_layers=False)
            measured = Evaluation(results[name].curve[-1], measured_base, evaluator.settings)
            evaluation = {"evaluation": measured.to_dict(), "versions": versions()}
            save_card(output / "adapter", run=_record(arguments, results[name]), evaluation=evaluation)
        base = model.unload()
        report = _report(arguments, source, measured_base, results) | {"seconds": time.perf_counter() - start}
        # Write the report after every method, so that an interrupted run keeps its results.
        with replacing(output / "report.json") as part:
            write_json(part, report)
    rows = {METHODS[name].label: result for name, result in results.items()}
    console.print(_table(measured_base, rows))
    tradeoff({label: result.curve for label, result in rows.items()}, output / "tradeoff.png", base=measured_base)
    written = "Plot, report and adapter" if "ogpsa" in results else "Plot and report"
    seconds = f"{time.perf_counter() - start:.0f} seconds"
    console.print(f"Finished in {seconds}. {written}: {output.resolve()}", markup=False)
    return report


def _check_rows(
    tokenizer: PreTrainedTokenizerBase, train_rows: Rows, test_rows: Rows, arguments: QuickstartArguments
) -> None:
    """Encode the rows that are used, so that a bad one is an error before anything is measured.

    Raises:
        ValueError: If one cannot be used. The message names its file.
    """
    folder = Path(arguments.data or "builtin")
    train, test = ({name: str(folder / f"{name}_{split}.jsonl") for name in data.NAMES} for split in data.SPLITS)
    given = any(METHODS[name].answers == "given" for name in arguments.methods)
    refuse_bad_answers(tokenizer, train_rows["harmful"], train["harmful"])
    for name in REFERENCES:
        rows = train_rows[name][: arguments.reference_samples]
        refuse_bad_prompts(tokenizer, rows, train[name])
        if given:
            refuse_bad_answers(tokenizer, rows, train[name])
    for name in data.NAMES:
        refuse_bad_prompts(tokenizer, test_rows[name][: arguments.test_samples], test[name])
    refuse_bad_answers(tokenizer, test_rows["general"][: arguments.test_samples], test["general"], _MAX_LENGTH)


def _evaluator(tokenizer: PreTrainedTokenizerBase, rows: Rows, arguments: QuickstartArguments) -> Evaluator:
    """Return the measurements on held-out rows."""
    samples = arguments.test_samples
    return Evaluator(
        tokenizer,
        harmful=rows["harmful"][:samples],
        benign=rows["benign"][:samples],
        general={"general": rows["general"][:samples]},
        divergence_prompts=rows["general"][: max(1, samples // 2)],
        max_length=_MAX_LENGTH,
        max_new_tokens=12,  # a refusal shows in its first words
        batch_size=16,
        seed=arguments.seed,
    )


def _callbacks(
    method: Method,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    arguments: QuickstartArguments,
) -> list[TrainerCallback]:
    """Return what preserves the reference sets in a method's training."""
    if method.answers is None:
        return []
    sets = references(base, tokenizer, rows, arguments.reference_samples, given=method.answers == "given")
    return [OGPSACallback(sets, seed=arguments.seed)]


def _report(
    arguments: QuickstartArguments, source: str, base: Measurement, results: dict[str, MethodResult]
) -> dict[str, Any]:
    return {
        "arguments": asdict(arguments),
        "model_source": source,
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "base": base.to_dict(),
        "methods": {
            name: {**asdict(result), "curve": [m.to_dict() for m in result.curve]} for name, result in results.items()
        },
    }


def _table(base: Measurement, results: dict[str, MethodResult]) -> Table:
    """Compare the base and the trained models. `results` are by the methods' labels."""
    return table(
        {"base": base, **{label: result.curve[-1] for label, result in results.items()}},
        extra={
            "seconds": {label: f"{result.seconds:.0f}" for label, result in results.items()},
            "references": {
                label: f"+{result.reference_share:.0%}" for label, result in results.items() if result.reference_share
            },
        },
    )
