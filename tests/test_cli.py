"""The `ogpsa` command, end to end on a tiny model."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import chat, tiny_llama, tiny_tokenizer
from peft import AutoPeftModelForCausalLM, PeftConfig

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.cli import main
from peft_ogpsa.cli.models import _wait_for
from peft_ogpsa.cli.quickstart import METHODS, MethodResult, QuickstartArguments, _record, _with_padding, load_rows
from peft_ogpsa.evaluation import Measurement, Verdict


@pytest.fixture
def folders(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_llama(vocab_size=259, max_position_embeddings=512).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.mkdir()
    for split in ("train", "test"):
        for name, answer in (
            ("harmful", "I can't help with that."),
            ("benign", "Do it so."),
            ("general", "It is so."),
        ):
            rows = [chat(f"{name} {split} {i}?", answer) for i in range(10)]
            (data / f"{name}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return model, data


def test_quickstart(folders, tmp_path, capsys, monkeypatch):
    model, data = folders
    # What random weights answer would not be kept.
    monkeypatch.setattr("peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "out"
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(output), "--device", "cpu"]
    methods = ["plain", "kl", "paper", "ogpsa", "null_space", "cone"]
    main(["quickstart", *options, "--steps", "3", "--measurements", "2", "--methods", *methods])
    printed = capsys.readouterr().out
    for heading in ("general", "KL", "refuses", "seconds", "references"):
        assert heading in printed
    assert "Plot, report and adapter: " in printed
    assert (output / "tradeoff.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((output / "report.json").read_text())
    assert list(report["methods"]) == methods
    base = Measurement.from_dict(report["base"])
    assert base.kl.value == 0
    for name, result in report["methods"].items():
        curve = [Measurement.from_dict(point) for point in result["curve"]]
        assert [point.step for point in curve] == [2, 3]
        assert curve[-1].kl.value > 0
        assert curve[-1].refusal.n == curve[-1].over_refusal.n == 10
        assert result["seconds"] > 0
        assert (result["reference_share"] > 0) == (name not in ("plain", "null_space"))
        assert (result["build_seconds"] > 0) == (name in ("ogpsa", "null_space"))
    # 0.075 of 5 steps' 40 passes are 3, so 2 examples with a pass of the base beside each (3/2 an example), before the
    # first step and after it, for 3 steps of 8; the paper's rule takes all 20 both times.
    assert report["methods"]["cone"]["reference_share"] == pytest.approx(2 * 2 / 24)
    for name in ("kl", "ogpsa"):
        assert report["methods"][name]["reference_share"] == report["methods"]["cone"]["reference_share"]
    assert report["methods"]["paper"]["reference_share"] == pytest.approx(40 / 24)

    assert isinstance(PeftConfig.from_pretrained(str(output / "adapter")), OGPSAConfig)
    adapter_config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["peft_type"] == "LORA"
    card = (output / "adapter" / "README.md").read_text()
    assert "not recorded" not in card
    assert "have not been measured" not in card
    assert "refuses harmful" in card
    assert "{'loss'" not in printed
    assert printed.count("Training ") == len(methods)
    for label in (METHODS[name].label for name in methods):
        assert printed.count(label) >= 2  # its progress, and its row
    assert "Training data: `harmful_train.jsonl`" in card
    assert "3 optimizer steps" in card
    for name in ("general", "benign"):  # whose answers the base gave itself
        assert f"`{name}` from `prompts:{name}_train.jsonl`" in card
    record = _record(QuickstartArguments(), MethodResult([], 1.0, 0.1, 0.0, 0.0, 0.0, []))
    assert record["references"] == {"general": "prompts:builtin:general", "benign": "prompts:builtin:benign"}
    assert AutoPeftModelForCausalLM.from_pretrained(str(output / "adapter")).num_parameters() > 0


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_other_processes_wait_for_the_first_ones_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    _wait_for(tmp_path / "config.json", seconds=0)
    with pytest.raises(OSError, match="the first process did not write it"):
        _wait_for(tmp_path / "other.json", seconds=0)


@pytest.mark.slow
def test_loop_runs(folders):
    command = [sys.executable, str(EXAMPLES / "loop.py"), "--model", str(folders[0]), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_trl_script_runs(folders, tmp_path, monkeypatch):
    # What random weights answer would not be kept.
    monkeypatch.setattr("peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--model_name_or_path", str(folders[0]), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    options += ["--use_cpu", "--report_to", "none", "--reference_samples", "2", "--answer_tokens", "4"]
    options += ["--save_strategy", "steps", "--save_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *options])
    runpy.run_path(str(EXAMPLES / "sft.py"), run_name="__main__")
    assert (tmp_path / "out" / "ogpsa_config.json").is_file()
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    resume = ["--max_steps", "3", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    monkeypatch.setattr(sys, "argv", ["sft.py", *options, *resume])
    runpy.run_path(str(EXAMPLES / "sft.py"), run_name="__main__")
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert not (tmp_path / "out" / "checkpoint-1").exists(), "it began again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "methods='magic' is unknown"),
        (["--methods", "plain", "ogpsa", "plain"], "names 'plain' twice"),
        (
            ["--model", "no/model", "--methods", "plain", "--methods=ogpsa"],
            "--methods is given 2 times.*one flag: --methods A B",
        ),
        (["--steps", "0"], "steps=0 must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SystemExit, match=message):
        main(["quickstart", *options])


def test_a_model_that_cannot_be_found(tmp_path):
    with pytest.raises(
        SystemExit, match=r"(?s)^ogpsa quickstart: model='no/model' cannot be loaded: .* Give a folder"
    ):
        main(["quickstart", "--model", "no/model", "--output_dir", str(tmp_path)])


def test_bad_data(folders):
    model, data = folders
    (data / "benign_test.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    with pytest.raises(SystemExit, match=r"benign_test\.jsonl, line 2, is not a JSON object"):
        main(["quickstart", "--model", str(model), "--data", str(data)])
    (data / "benign_test.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match=r"benign_test\.jsonl has no rows"):
        main(["quickstart", "--model", str(model), "--data", str(data)])
    (data / "benign_test.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"does not contain benign_test\.jsonl"):
        main(["quickstart", "--model", str(model), "--data", str(data)])
    (data / "benign_test.jsonl").write_text('{"prompt": "caf\xe9"}', encoding="latin-1")
    with pytest.raises(SystemExit, match=r"benign_test\.jsonl is not in UTF-8. Save it as UTF-8"):
        main(["quickstart", "--model", str(model), "--data", str(data)])


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("harmful_train", {"prompt": "a?"}, r"row 0 has the columns \['prompt'\]"),
        ("general_train", {"question": "a?"}, r"row 0 has the columns \['question'\]"),
        ("benign_train", {"prompt": "a?"}, r"row 0 has the columns \['prompt'\]"),  # `paper` needs answers
        ("harmful_test", {"text": "a"}, r"row 0 has the columns \['text'\]"),
        ("benign_test", {"prompt": 5}, "row 0 has a value of the type int"),
        ("general_test", {"prompt": "a?"}, r"row 0 has the columns \['prompt'\]"),
        (
            "general_test",
            chat("a" * 1100, "So."),
            "row 0 has no answer token left: its prompt takes 11.. tokens, and 1024 are used. "
            r"Drop the row, or shorten its prompt\.$",
        ),
    ],
)
def test_bad_rows_are_named_before_anything_is_measured(folders, tmp_path, file, row, message):
    model, data = folders
    path = data / f"{file}.jsonl"
    path.write_text(json.dumps(row) + "\n" + path.read_text(), encoding="utf-8")
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit, match=rf"^ogpsa quickstart: .*{file}\.jsonl: {message}"):
        main(["quickstart", *options, "--methods", "plain", "paper", "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_a_quickstart_that_cannot_write_is_told_before_the_model_is_loaded(folders, tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("The model is loaded.")

    monkeypatch.setattr("peft_ogpsa.cli.quickstart.load_model", load)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(SystemExit, match=rf"^ogpsa quickstart: output_dir='{place}' cannot be written to"):
            main(["quickstart", "--model", str(folders[0]), "--output_dir", str(place)])


def test_an_earlier_report_survives_a_full_disk(folders, tmp_path, monkeypatch):
    model, data = folders
    report = tmp_path / "out" / "report.json"
    report.parent.mkdir()
    report.write_text("{}")
    write = Path.write_text

    def fill(path, text, *arguments, **options):
        full = path.name.startswith("report.json")
        write(path, text[:5] if full else text, *arguments, **options)
        if full:
            raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(report.parent), "--device", "cpu"]
    options += ["--steps", "1", "--measurements", "1", "--methods", "plain", "--test_samples", "1"]
    with pytest.raises(OSError, match="No space left"):
        main(["quickstart", *options])
    assert report.read_text() == "{}"


def test_a_quickstart_whose_card_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_ogpsa.cli.quickstart.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_bytes("# Notes".encode("utf-16"))
    with pytest.raises(SystemExit, match=r"^ogpsa quickstart: .*README\.md is not in UTF-8"):
        main(["quickstart", "--output_dir", str(tmp_path)])


def test_quickstart_with_a_tokenizer_that_has_no_padding_token(folders, tmp_path):
    """Llama 3's, for example."""
    model, data = folders
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    main(["quickstart", *options, "--steps", "1", "--measurements", "1", "--methods", "plain", "--test_samples", "1"])
    assert (tmp_path / "out" / "report.json").is_file()
    assert _with_padding(tokenizer).pad_token == tokenizer.eos_token
    assert tokenizer.pad_token is None


def test_a_console_that_lacks_a_character_loses_nothing(monkeypatch):
    """Tables have arrows, which a Windows console may not know."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    print("facts \u2191", flush=True)
    assert written.getvalue().endswith(b"facts ?\n")


def test_quickstart_with_a_single_test_row(folders, tmp_path, capsys):
    model, data = folders
    options = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--steps", "1"]
    main(["quickstart", *options, "--methods", "plain", "--measurements", "1", "--test_samples", "1"])
    assert "Plot and report: " in capsys.readouterr().out  # only `ogpsa` has its adapter saved
    assert not (tmp_path / "out" / "adapter").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["base"]["kl"]["n"] == 1


def test_rows_may_hold_any_line_break_of_unicode(folders):
    _, data = folders
    row = chat("One\u2028two", "Three\x85four")
    (data / "general_test.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load_rows(str(data))[1]["general"] == [row]


def test_help_and_unknown_commands():
    def ogpsa(*arguments):
        command = [sys.executable, "-c", "from peft_ogpsa.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert "quickstart" in ogpsa("--help").stdout
    unknown = ogpsa("slowstart")
    assert unknown.returncode == 2
    assert "unknown command 'slowstart'" in unknown.stderr
