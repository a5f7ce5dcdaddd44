"""Checkpoints of every family, loaded in one fresh process by transformers alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, POSITIONS, TEXT
from peft import get_peft_model

from peft_fusion import FusionConfig, export
from peft_fusion.export.check import outputs_to_match, random_batch, reloaded, tolerance

SIZES = {**TEXT, "intermediate_size": 64}


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3))


MAKERS = {a.name: a.make for a in ARCHITECTURES} | {
    "vit": vit,
    "headless": lambda: tf.BertModel(tf.BertConfig(**SIZES, **POSITIONS)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(family, layers) -> what the fused model puts out, what the checkpoint does, and what did not fit."""
    root, jobs, expected = tmp_path_factory.mktemp("exports"), [], {}
    for name, make in MAKERS.items():
        for layers in (None, [1]):
            torch.manual_seed(0)
            model = get_peft_model(make().eval(), FusionConfig(ratio=0.5, layers_to_transform=layers))
            host = model.base_model.model
            done = export(model, root / f"{name}-{layers}", check=False)
            assert done.needs_code == (layers is not None)
            batch = random_batch(host)
            expected[name, layers is None] = outputs_to_match(host, batch), tolerance(host)
            jobs.append((root / f"{name}-{layers}", done.loaded_by, batch))
    found = reloaded(jobs)
    return {key: (*one, *found[number]) for number, (key, one) in enumerate(expected.items())}


@pytest.mark.parametrize("one_width", [True, False], ids=["one width", "widths differ"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_computes_the_same_elsewhere(results, name, one_width):
    expected, allowed, found, misfits = results[name, one_width]
    assert misfits == {}
    assert allowed == 1e-4
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_what_cannot_be_made_up_is_asked_for():
    model = tf.Wav2Vec2Model(
        tf.Wav2Vec2Config(**SIZES, conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1)
    )
    with pytest.raises(ValueError, match="check=batch"):
        random_batch(model)


def test_a_process_that_fails_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="(?s)could not be loaded.*model_type"):
        reloaded([(tmp_path, "AutoModel", {"input_ids": torch.ones(1, 3, dtype=torch.long)})])
