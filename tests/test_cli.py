"""The command line: each command over tiny models, its JSON, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
import transformers as tf
from architectures import BY_NAME
from helpers import half
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_fusion.cli import main
from peft_fusion.cli import models as loading
from peft_fusion.cli.options import layer_numbers

LLAMA = BY_NAME["llama"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny language model with a tokenizer of digits, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "base"
    LLAMA.make().save_pretrained(folder)
    words = {"[UNK]": 0, **{str(number): number + 1 for number in range(10)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(str(number * number % 10) for number in range(2000)))
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: its arguments -> exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-fusion", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        status = ended.value.code
        if isinstance(status, str):  # Python prints it to stderr, and exits with 1
            status, err = 1, err + status
        return status or 0, out, err

    return run


def test_layouts(run, base):
    status, out, _ = run("layouts", base)
    assert status == 0 and "model.layers.0.mlp" in out and "3 FFNs hold 18,432 of 34,208 parameters (54%)" in out
    found = json.loads(run("layouts", base, "--json")[1])
    assert [row["width"] for row in found["ffns"]] == [64] * 3
    assert found["ffns"][0]["parameters"] == 3 * 32 * 64


def test_what_it_will_take(run, base):
    options = ("layouts", base, "--plan", "--ratio", 0.25)
    steps = [json.loads(run(*options, "--ffns-per-pass", size, "--json")[1])["steps"] for size in (1, 3)]
    assert [step["step"] for step in steps[0]] == ["fuse by weights", "calibrate", "train, a step", "distill"]
    assert all(step["bytes"] > 0 and step["seconds"] > 0 for step in steps[0])
    one, all_at_once = (found[1] for found in steps)
    assert all_at_once["bytes"] - one["bytes"] == 2 * 4 * 2 * 1024 * (32 + 32)  # inputs and gradients for the scales
    narrow = 3 * 3 * 32 * 16
    assert steps[0][2]["bytes"] == narrow * 4 * (1 + 1 + 2)
    assert "GB more" in run(*options)[1]


def test_fuse_without_data(run, base, tmp_path):
    status, out, _ = run("fuse", base, tmp_path / "small", "--layers", "1-2", "--no-check", "--json")
    told = json.loads(out)
    assert status == 0 and told["needs_code"] and set(told["widths"]) == {"model.layers.1.mlp", "model.layers.2.mlp"}
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [64, 32, 32]
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "small").vocab_size == 11
    assert run("layouts", tmp_path / "small", "--trust-remote-code")[1].count(" 32 ") == 2


@pytest.mark.parametrize("inputs", ["own", "file"])
def test_fuse_after_calibration(run, base, tmp_path, text, inputs):
    options = ["--calibrate", text if inputs == "file" else "own", "--sequences", 8, "--length", 16, "--width", 24]
    status, out, err = run("fuse", base, tmp_path / "small", *options, "--no-check")
    assert (status, err) == (0, err) and "3 FFNs are narrower" in out
    assert "calibrated on: nothing" not in (tmp_path / "small" / "README.md").read_text()
    assert tf.AutoConfig.from_pretrained(tmp_path / "small").intermediate_size == 24


def test_calibrated_from_disk(run, base, tmp_path, text):
    options = ["--calibrate", text, "--sequences", 8, "--length", 16, "--no-check"]
    assert run("fuse", base, tmp_path / "memory" / "small", *options)[0] == 0
    status, _, err = run("fuse", base, tmp_path / "disk" / "small", *options, "--offload")
    assert status == 0, err
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["small"]
    here, there = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / way / "small") for way in ("memory", "disk"))
    torch.testing.assert_close(there.state_dict(), here.state_dict(), rtol=1e-4, atol=1e-5)


def test_fuse_checks_what_it_wrote(run, base, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["peft_fusion.export.check"], "reloaded", lambda *_: [(torch.zeros(1, 16, 99), {})])
    status, _, err = run("fuse", base, tmp_path / "small")
    assert status == 1 and "differ from the fused" in err and not (tmp_path / "small").exists()


def test_export_and_report_an_adapter(run, base, tmp_path, text):
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), half(LLAMA))
    model.save_pretrained(tmp_path / "adapter")
    assert run("export", tmp_path / "adapter", tmp_path / "small", "--no-check")[0] == 0
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(plain(**LLAMA.batch()).logits, model.eval()(**LLAMA.batch()).logits)
    options = ("--text", text, "--sequences", 4, "--length", 16, "--json")
    of_adapter = json.loads(run("report", tmp_path / "adapter", *options)[1])
    of_model = json.loads(run("report", tmp_path / "small", "--original", base, *options)[1])
    assert of_adapter["parameters"] == of_model["parameters"] == [34208, 24992]
    assert of_adapter["outputs"]["relative"] == pytest.approx(of_model["outputs"]["relative"], rel=1e-3)
    assert "all of them" in run("report", tmp_path / "adapter", "--sequences", 4, "--length", 8)[1]


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_report_on_own_text_begins_it_as_the_tokenizer_does(run, base, tmp_path, monkeypatch, has_tokenizer):
    module, prefixes = importlib.import_module("peft_fusion.cli.report"), []
    original = module.own_inputs
    monkeypatch.setattr(module, "own_inputs", lambda *a, prefix, **k: prefixes.append(prefix) or original(*a, **k))
    if not has_tokenizer:
        base = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    with nullcontext() if has_tokenizer else pytest.warns(match="text is sampled that begins as its config says"):
        status, _, err = run("report", base, "--original", base, "--sequences", 4, "--length", 8)
    assert status == 0, err
    assert prefixes == [[] if has_tokenizer else None]


def test_compare(run, base, tmp_path, text):
    run("fuse", base, tmp_path / "small", "--ratio", 0.5, "--no-check")
    options = ("--text", text, "--sequences", 4, "--length", 16, "--tokens", 4)
    found = json.loads(run("compare", base, tmp_path / "small", *options, "--json")[1])
    assert (found["original"]["parameters"], found["exported"]["parameters"]) == (34208, 24992)
    assert found["exported"]["bytes"] == 4 * 24992
    assert 0 < found["difference"] < 2 and found["exported"]["tokens_per_second"] > 0
    ids = loading.text_batches(text, str(base), 4, 16)[0]["input_ids"]
    loss = tf.AutoModelForCausalLM.from_pretrained(base)(input_ids=ids, labels=ids).loss
    assert found["original"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    same = json.loads(run("compare", base, base, "--tokens", 2, "--length", 8, "--json")[1])
    assert (same["difference"], same["same_prediction"]) == (0.0, 1.0)
    assert "perplexity" in (told := run("compare", base, base, *options)[1]) and "random" not in told


def test_of_random_tokens_compare_tells_no_perplexity(run, base):
    options = ("--tokens", 2, "--length", 8)
    assert "perplexity" not in json.loads(run("compare", base, base, *options, "--json")[1])["original"]
    assert "on random tokens; --text FILE" in run("compare", base, base, *options)[1]


REFUSED = [
    (("layouts", "{}/nowhere"), "There is no folder"),
    (("fuse", "{base}", "{base}"), "exists already"),
    (("fuse", "{base}", "{}/small", "--ratio", "2"), "`ratio` must be"),
    (("fuse", "{base}", "{}/small", "--layers", "7"), "the targeted FFNs are in layers [0, 1, 2]"),
    (("fuse", "{base}", "{}/small", "--calibrate", "{}/no.txt"), "no such file"),
    (("fuse", "{base}", "{}/small", "--calibrate", "{}/short.txt"), "less than one sequence"),
    (("fuse", "{base}", "{}/small", "--calibrate", "{}/latin.txt"), "no plain text in UTF-8"),
    (("fuse", "{base}", "{}/small", "--sequences", "8"), "--calibrate, which is not given"),
    (("fuse", "{base}", "{}/small", "--length", "8"), "--length 8 is of --calibrate and --distill"),
    (("fuse", "{}/damaged", "{}/small"), "a safetensors file is damaged"),
    (("fuse", "{base}", "{}/small", "--calibrate", "own", "--length", "99999"), "reads at most"),
    (("compare", "{base}", "{base}", "--length", "99999"), "reads at most"),
    (("report", "{base}", "--original", "{base}", "--length", "99999"), "reads at most"),
    (("report", "{base}"), "--original"),
    (("export", "{base}", "{}/small"), "so it is no adapter"),
    (("export", "{}/nameless", "{}/small"), "give it by --base"),
    (("report", "{}/nameless"), "give it by --original"),
    (("fuse", "{base}", "{}/short.txt/small"), "nothing can be written in"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED)
def test_refused_in_one_line(run, base, tmp_path, arguments, told):
    (tmp_path / "short.txt").write_text("1 2 3")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    half(LLAMA).save_pretrained(str(tmp_path / "nameless"))
    shutil.copytree(base, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 5000)
    status, out, err = run(*(str(one).replace("{base}", str(base)).replace("{}", str(tmp_path)) for one in arguments))
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and out == "" and len(error) == 1 and told in error[0]
    assert "Traceback" not in err and not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse",),
        ("fuse", "a", "b", "--layers", "x"),
        ("fuse", "a", "b", "--layers", "0-99999999999"),
        ("fuse", "a", "b", "--method", "magic"),
        ("frobnicate",),
    ],
)
def test_wrong_use_exits_with_2(run, arguments):
    assert run(*arguments)[0] == 2


def test_code_that_is_not_trusted(run, base, tmp_path):
    run("fuse", base, tmp_path / "small", "--layers", "1", "--no-check")
    status, _, err = run("compare", base, tmp_path / "small", "--tokens", 2, "--length", 8)
    assert status == 1 and "pass --trust-remote-code" in err


def test_memory_is_said_to_be_out(run, base, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sys.modules["peft_fusion.cli.compare"], "load_model", full)
    status, _, err = run("compare", base, base)
    assert status == 1 and "error: out of memory" in err


@pytest.mark.parametrize("command", ["layouts", "fuse", "report", "export", "compare"])
def test_help_has_an_example(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"Example: peft-fusion {command}" in " ".join(out.split())


def test_version(run):
    assert run("--version")[:2] == (0, f"peft-fusion {version('peft-fusion')}\n")


def test_layers_by_number():
    assert layer_numbers("all") is None
    assert layer_numbers("3,5,8-10") == [3, 5, 8, 9, 10]


@pytest.mark.parametrize("inputs", ["own", "file"])
def test_fuse_by_a_budget_and_distil(run, base, tmp_path, text, inputs, monkeypatch):
    calls = []
    module = importlib.import_module("peft_fusion.cli.fuse")
    original = module.distill_model
    monkeypatch.setattr(module, "distill_model", lambda *a, **k: calls.append((a, k, original(*a, **k))))
    options = ["--calibrate", text if inputs == "file" else "own", "--sequences", 8, "--length", 16]
    options += ["--allocation", "fisher", "--distill", 800, "--ratio", 0.5, "--no-check", "--json"]
    refits = []
    monkeypatch.setattr(
        sys.modules["peft_fusion.calibrate.narrowing"], "refit_in_sequence", lambda *_: refits.append(inputs)
    )
    more = ["--refit", "sequential"] if inputs == "file" else []
    status, out, err = run("fuse", base, tmp_path / "small", *options, *more)
    assert status == 0, err
    assert refits == (["file"] if inputs == "file" else [])
    widths = [now for _, now in json.loads(out)["widths"].values()]
    assert sum(widths) <= 96 and all(width % 8 == 0 for width in widths)
    ((_, data), settings, found) = calls[0]
    sampled = {name: settings.pop(name) for name in ("length", "tokenizer") if name in settings}
    assert settings == {"tokens": 800, "seed": 0} and (data is None) == (inputs == "own")
    if inputs == "file":
        assert not sampled  # it is cut to the length already
    else:
        assert sampled["length"] == 16 and sampled["tokenizer"].convert_ids_to_tokens(1) == "0"
    assert found.sequences + found.held_out == 50


def test_a_budget_needs_a_calibration(run, base, tmp_path):
    status, _, err = run("fuse", base, tmp_path / "small", "--allocation", "fisher")
    assert status == 1 and "call `calibrate" in err and not (tmp_path / "small").exists()
