"""Every snippet of the README and the documentation runs, page by page, on tiny models in the place of those named."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers as tf
from architectures import BY_NAME
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "examples/README.md", "CONTRIBUTING.md", *DOCS]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n+)?^```(?P<kind>python|bash)\n(?P<text>.*?)^```$", re.M | re.S
)

SMALLER = {
    r"HuggingFaceTB/SmolLM2-135M\b|\bMODEL\b": "base",
    r"\bADAPTER\b": "adapter",
    r"range\(14, 30\)": "range(1, 3)",
    r"\b14-29\b": "1-2",
    r"\b65_?536\b": "512",
    r"load_causal_lm\(None\)": 'load_causal_lm("base")',
    r"sequences=\d+, length=\d+": "sequences=16, length=16",
}
"""What a page says -> what runs in its place."""

NOT_HERE = ("python -m venv", "pip ", "pytest", "sphinx-build", "ruff ", "mypy", "torchrun", "accelerate ")
"""Commands that `.ci/run` or the reader runs."""


@dataclass(frozen=True)
class Snippet:
    """One block of a page: where it starts, what kind it is, what it says, and why it is not run, if so."""

    page: str
    line: int
    kind: str
    text: str
    why: str | None


def snippets(page: str) -> list[Snippet]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Snippet(page, text[: found.start("text")].count("\n"), found["kind"], found["text"], found["why"])
        for found in BLOCK.finditer(text)
    ]


def smaller(text: str) -> str:
    for said, run in SMALLER.items():
        text = re.sub(said, run, text)
    return text


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny language model with a tokenizer, as the folder `base`, beside an adapter's place and a text."""
    folder = tmp_path_factory.mktemp("stand_ins")
    BY_NAME["llama"].make().save_pretrained(folder / "base")
    words = {"[UNK]": 0, **{str(number): number + 1 for number in range(10)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder / "base")
    (folder / "text.txt").write_text(" ".join(str(number * number % 10) for number in range(2000)))
    return folder


@pytest.fixture
def place(stand_ins, tmp_path, monkeypatch):
    """An empty folder to run in, with the stand-ins; what takes long on a real model is made short."""
    for path in stand_ins.iterdir():
        os.symlink(path, tmp_path / path.name)
    os.symlink(ROOT / "examples", tmp_path / "examples")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("peft_fusion.calibrate.inputs"), "OWN_SEQUENCES", 16)
    monkeypatch.setattr(importlib.import_module("peft_fusion.distill"), "OWN_TOKENS", 512)
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """Exports are not loaded in fresh processes, which takes seconds each; the tests of `export` do that."""
    importlib.import_module("peft_fusion.cli")
    places = [
        name
        for name, module in sys.modules.items()
        if name.startswith("peft_fusion.") and "check_reload" in vars(module)
    ]
    assert len(places) > 1
    for name in places:
        monkeypatch.setattr(sys.modules[name], "check_reload", lambda *args: 0.0)


def names() -> dict:
    """What pages speak of without making it: models, data, a tokenizer."""
    bert = BY_NAME["bert"]
    batches = [{k: v for k, v in bert.batch(seed=seed, size=4).items()} for seed in range(6)]

    def original():
        return tf.AutoModelForCausalLM.from_pretrained("base")

    return {
        "name": "base",
        "original": original,
        "model": original(),
        "tokenizer": tf.AutoTokenizer.from_pretrained("base"),
        "original_classifier": bert.make,
        "classifier": bert.make(),
        "dataloader": batches,
        "dataset": [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)],
        "train_dataset": [{"input_ids": [3, 4, 5, 6], "labels": i % 3} for i in range(8)],
    }


def run_command(line: str, monkeypatch) -> None:
    """Runs one line of a shell that calls `peft-fusion`, or sees that the script it calls is there."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["peft-fusion"]:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            importlib.import_module("peft_fusion.cli").main()
        assert not ended.value.code, f"`{line}` ended with {ended.value.code}"
    elif words[:1] == ["python"] and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), line
    else:
        assert line.startswith(NOT_HERE), f"nothing here runs `{line}`"


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_the_snippets_of_a_page_run(page, place, unchecked, monkeypatch):
    """In order, as a reader would; what one block makes the next may use."""
    known = names()
    if page == "docs/guide/export.md":  # it speaks of an adapter that was trained before
        from peft import get_peft_model

        from peft_fusion import FusionConfig

        get_peft_model(known["original"](), FusionConfig(ratio=0.5, task_type="CAUSAL_LM")).save_pretrained("adapter")
    for snippet in snippets(page):
        if snippet.why is None and snippet.kind == "python":
            source = "\n" * snippet.line + smaller(snippet.text)
            exec(compile(source, str(ROOT / page), "exec"), known)
        elif snippet.why is None:
            lines = re.split(r"\n| && ", smaller(snippet.text).replace(". .venv/bin/activate && ", ""))
            for line in lines:
                if line.strip() and not line.startswith(("#", ". .venv")):
                    run_command(line.strip(), monkeypatch)


def test_few_snippets_are_not_run():
    left_out = [snippet for page in PAGES for snippet in snippets(page) if snippet.why is not None]
    assert len(left_out) <= 3 and all(len(snippet.why) > 10 for snippet in left_out)
    assert sum(len(snippets(page)) for page in PAGES) > 30


def options_of(words: list[str]) -> tuple[list[str], str]:
    """The options that a command is given, and the sources that have to know them."""
    if words[0] == "peft-fusion":
        files = list((ROOT / "peft_fusion" / "cli").glob("*.py"))
    else:
        script = ROOT / words[1]
        files = [script, *script.parent.glob(f"{script.stem}_*.py"), *(ROOT / "examples" / "common").glob("*.py")]
    return [word for word in words if word.startswith("--")], "\n".join(file.read_text("utf-8") for file in files)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_have_the_options_that_they_name(page):
    """`peft-fusion ...` and `python examples/... --option`, wherever they stand, and in files of figures."""
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"`((?:peft-fusion|python (?:examples|benchmarks|docs)/)[^`]*)`", " ".join(text.split()))
    for command in commands:
        words = shlex.split(command)
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        options, sources = options_of(words)
        for option in options:
            declared = f'"{option}"' in sources or re.search(rf"\b{option[2:].replace('-', '_')}: ", sources)
            assert declared, f"{command}: no option {option}"
