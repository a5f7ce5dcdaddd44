"""The walls of the package: what imports what, who registers hooks, who changes PEFT, who knows the projections."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
from walls import at_the_root, circles, globals_of_others, hooks, projections, rooms

import peft_fusion

ROOT = Path(peft_fusion.__file__).parent
PUBLIC = ["FusionConfig", "FusionModel", "calibrate", "distill", "export", "fidelity", "fuse", "teacher", "tune_layers"]


@pytest.mark.parametrize("check", [rooms, circles, hooks, projections, globals_of_others, at_the_root])
def test_walls_hold(check):
    assert check(ROOT) == []


def test_public_names():
    assert sorted(peft_fusion.__all__) == PUBLIC
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    public = {name: value for name, value in vars(peft_fusion).items() if not name.startswith("_")}
    assert [name for name in sorted(public) if name in PUBLIC or not isinstance(public[name], ModuleType)] == PUBLIC
    assert all(name in rooms | {"progress", "cli"} for name in public if name not in PUBLIC)


BREACHES = [
    (rooms, "fusing/refit.py", "from ..ffn import find_ffns"),
    (rooms, "fusing/cluster/kmeans.py", "from ...progress import progress"),
    (rooms, "fusing/cluster/kmeans.py", "def late():\n    from peft_fusion.tuner import plan"),
    (rooms, "fusing/refit.py", "import numpy as np"),
    (rooms, "fusing/refit.py", "from transformers.activations import ACT2FN"),
    (rooms, "ffn/find.py", "from ..tuner.layer import FusionLayer"),
    (rooms, "ffn/find.py", "import peft_fusion"),
    (rooms, "tuner/plan.py", "from ..observe import batches"),
    (rooms, "tuner/plan.py", "from .. import observe"),
    (rooms, "observe/batches.py", "from peft_fusion import fidelity"),
    (rooms, "observe/batches.py", "import peft_fusion.calibrate.recorder"),
    (rooms, "tune/student.py", "from ..calibrate import calibrate"),
    (rooms, "fidelity/ntk.py", "def late():\n    from .. import FusionConfig"),
    (rooms, "progress.py", "from .ffn import FFN"),
    (rooms, "newroom/a.py", "from ..ffn import FFN"),
    (circles, "ffn/layouts.py", "from .find import FFN"),
    (circles, "ffn/layouts.py", "def late():\n    from .find import FFN"),
    (circles, "ffn/layouts.py", "from . import find_ffns"),
    (circles, "fusing/weights.py", "from .methods.svd import rank_factors"),
    (circles, "progress.py", "from peft_fusion import fuse"),
    (circles, "progress.py", "import peft_fusion.progress"),
    (hooks, "tune/student.py", "def f(m):\n    m.register_forward_hook(print)"),
    (hooks, "calibrate/recorder.py", "def f(m):\n    m.register_forward_pre_hook(print)"),
    (hooks, "tuner/layer.py", "def f(m):\n    m.register_full_backward_hook(print)"),
    (hooks, "fidelity/ntk.py", "def f(m):\n    m.weight.register_hook(print)"),
    (hooks, "fidelity/ntk.py", "def f(m):\n    getattr(m, 'register_forward_hook')(print)"),
    (hooks, "fidelity/ntk.py", "from torch.nn.modules.module import register_module_forward_hook"),
    (projections, "tuner/plan.py", "def f(ffn):\n    return ffn.layout.in_projections"),
    (projections, "tuner/plan.py", "def f(ffn):\n    return ffn.layout.out_projection"),
    (projections, "calibrate/recorder.py", "NAMES = ['gate_proj']"),
    (projections, "observe/batches.py", "def f(m):\n    return m.mlp.down_proj"),
    (projections, "observe/batches.py", "PATTERN = r'.*\\.(fc1|fc2)$'"),
    (projections, "fusing/refit.py", "def f(name):\n    return f'{name}.output.dense'"),
    (globals_of_others, "tuner/model.py", "from peft import PeftType\nPeftType.X = 1"),
    (globals_of_others, "tuner/model.py", "import peft.mixed_model\npeft.mixed_model.MixedModel = None"),
    (globals_of_others, "tuner/model.py", "import peft as p\nsetattr(p.PeftModel, 'x', 1)"),
    (globals_of_others, "tuner/model.py", "from peft import mapping\nmapping.TABLE['x'] = 1"),
    (globals_of_others, "tuner/model.py", "from peft.mapping import TABLE\nTABLE.update(x=1)"),
    (globals_of_others, "tuner/model.py", "from peft.mapping import TABLE\ntable = TABLE\ntable.append(1)"),
    (globals_of_others, "tuner/model.py", "from peft.utils import register_peft_method\nregister_peft_method()"),
    (globals_of_others, "tuner/model.py", "from peft import PeftModel as P\nP.a, P.b = 1, 2"),
    (globals_of_others, "tuner/model.py", "from peft import PeftModel\nvars(PeftModel)['x'] = 1"),
    (globals_of_others, "tuner/model.py", "from peft import PeftModel\ndel PeftModel.forward"),
    (globals_of_others, "ffn/find.py", "from transformers import AutoConfig\nAutoConfig.register('x', None)"),
    (globals_of_others, "ffn/find.py", "import transformers\ntransformers.x += 1"),
    (at_the_root, "helpers.py", ""),
    (at_the_root, "newroom/__init__.py", ""),
    (at_the_root, "tune.py", ""),
]


@pytest.mark.parametrize(("check", "file", "text"), BREACHES)
def test_every_breach_is_seen(check, file, text, tmp_path):
    assert breaches(check, file, text, tmp_path)


HARMLESS = [
    (rooms, "fusing/refit.py", "import math\nfrom torch import nn\nfrom .cluster.kmeans import lloyd"),
    (rooms, "tune/student.py", "from ..progress import progress\nfrom ..fusing.weights import FFNWeights"),
    (rooms, "__init__.py", "from .tune import tune_layers"),
    (circles, "ffn/find.py", "from ..fusing.weights import FFNWeights\nfrom . import layouts"),
    (hooks, "ffn/find.py", "def f(m):\n    m.register_forward_hook(print)"),
    (hooks, "tuner/layer.py", "def f(m):\n    m.register_buffer('x', None)"),
    (projections, "ffn/find.py", "NAMES = ['gate_proj']"),
    (projections, "tuner/plan.py", "'''Not of gate_proj alone.'''\nKEY = 'output'\nWORD = 'fc12'"),
    (globals_of_others, "tuner/registration.py", "from peft import PeftType\nPeftType.X = 1"),
    (globals_of_others, "tuner/model.py", "from peft import PeftConfig\nc = PeftConfig()\nc.x = 1\nPeftConfig = None"),
    (globals_of_others, "tuner/model.py", "import torch\ntorch.x = 1\nnames = []\nnames.append(1)"),
    (at_the_root, "ffn/more.py", ""),
    (at_the_root, "cli.py", ""),
]


@pytest.mark.parametrize(("check", "file", "text"), HARMLESS)
def test_nothing_else_is_one(check, file, text, tmp_path):
    assert not breaches(check, file, text, tmp_path)


def breaches(check, file: str, text: str, folder: Path) -> set[str]:
    """What a check says of the package with more text in one file, beyond what it says without."""
    copy = shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as opened:
        opened.write(f"\n{text}\n")
    return set(check(copy)) - as_it_is(check)


@lru_cache
def as_it_is(check) -> set[str]:
    return set(check(ROOT))
