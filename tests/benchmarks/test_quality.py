"""What quality.py refuses before it loads anything."""

from __future__ import annotations

import sys

import pytest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--step-tokens", "100"], "whole sequences, which have 256 tokens"),
        (["--step-tokens", "0"], "whole sequences"),
        (["--text", "own", "--step-tokens", "96"], "whole sequences, which have 64 tokens"),
        (["--text", "own", "--own-length", "2048"], "--step-tokens 1024: a step takes whole sequences"),
        (["--sequences", "3"], "at least 4 are needed"),
    ],
)
def test_what_cannot_be_is_refused(given, message, modules, monkeypatch, capsys):
    quality, _ = modules
    monkeypatch.setattr(sys, "argv", ["quality.py", "smollm2", *given])
    with pytest.raises(SystemExit):
        quality.parse_arguments()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "tokens"), [("own", 256), ("papers", 512)])
def test_steps_of_whole_sequences_are_taken(text, tokens, modules, monkeypatch):
    quality, _ = modules
    monkeypatch.setattr(sys, "argv", ["quality.py", "smollm2", "--text", text, "--step-tokens", str(tokens)])
    options = quality.parse_arguments()
    assert options.step_tokens // quality.sequence_length(options) == {"own": 4, "papers": 2}[text]
