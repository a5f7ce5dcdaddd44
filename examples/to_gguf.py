"""Converts an exported model to gguf, the format of llama.cpp, by llama.cpp's own converter.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    python examples/to_gguf.py small small.gguf \\
        --converter llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py

(or any clone of llama.cpp; `pip install sentencepiece gguf` for the converter). One width for all FFNs is a stock
checkpoint, which that converter reads as it is. Where widths differ: llama.cpp's "llama" takes the first layer's width
for all layers, but its "deci" is the same network with a width for each layer, so the file is relabelled as that.
This is for Llama's network alone; llama.cpp has no such twin of others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.command_line import run
from common.errors import InputError

LLAMA, DECI = "llama", "deci"
OF_THE_FILE = ("auto_map", "per_layer_config")
"""What a config says for the modelling file of mixed widths, which the converter does not run."""


def main() -> None:
    options = parse_arguments()
    if not options.converter.is_file():
        raise InputError(f"--converter {options.converter}: no such file; `--help` says where to have it from")
    if options.gguf.exists():
        raise InputError(f"{options.gguf} exists already: name another file")
    config = read_config(options.folder)
    check_convertible(config)
    with tempfile.TemporaryDirectory(dir=options.gguf.absolute().parent, prefix=".to-gguf-") as scratch:
        made = Path(scratch, "made.gguf")
        if "per_layer_config" in config:
            stock = stock_folder(options.folder, config, Path(scratch, options.folder.resolve().name))
            convert(stock, llama := Path(scratch, "llama.gguf"), options)
            as_deci(llama, made)
        else:
            convert(options.folder, made, options)
        made.rename(options.gguf)
    print(f"wrote {options.gguf}, {options.gguf.stat().st_size / 1e6:,.1f} MB")


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config as JSON."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, so it is no model: name what `export` wrote")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def check_convertible(config: dict[str, Any]) -> None:
    """Refuses mixed widths of networks that llama.cpp reads with one width alone."""
    if "per_layer_config" in config and config["model_type"] != LLAMA:
        raise InputError(
            f"llama.cpp reads a width for each layer in Llama's network alone, not in {config['model_type']}: fuse all "
            "FFNs to one width"
        )


def stock_folder(folder: Path, config: dict[str, Any], place: Path) -> Path:
    """A checkpoint of mixed widths as the converter takes it: all files, and a config that names the stock class."""
    place.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json" and path.suffix != ".py":
            (place / path.name).symlink_to(path.absolute())
    names = [name.removeprefix("Narrow") for name in config["architectures"]]
    told = {**{key: value for key, value in config.items() if key not in OF_THE_FILE}, "architectures": names}
    (place / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return place


def convert(folder: Path, gguf: Path, options: argparse.Namespace) -> None:
    """Runs llama.cpp's converter."""
    command = [sys.executable, options.converter, folder, "--outfile", gguf, "--outtype", options.outtype]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the converter failed: {done.stderr.strip().splitlines()[-1]}")


def as_deci(source: Path, target: Path) -> None:
    """Copies a gguf file of a Llama as one of "deci", with the width of each layer's FFN as it finds it.

    Args:
        source: the file that the converter wrote.
        target: the file to write.
    """
    from gguf import GGUFReader, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader, writer = GGUFReader(source), GGUFWriter(target, DECI)
    own = [field for name, field in reader.fields.items() if name.startswith(f"{LLAMA}.")]
    told = {field.name: MetadataDetails(field.types[0], field.contents()) for field in own}
    widths = {tensor.name: int(tensor.shape[1]) for tensor in reader.tensors if tensor.name.endswith("ffn_up.weight")}
    count = told[f"{LLAMA}.block_count"].value
    writer.add_feed_forward_length([widths[f"blk.{layer}.ffn_up.weight"] for layer in range(count)])
    renamed = {name.replace(LLAMA, DECI, 1): value for name, value in told.items()}
    renamed.pop(f"{DECI}.feed_forward_length")
    copy_with_new_metadata(reader, writer, renamed, list(told))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `export` or `peft-fusion fuse` wrote, or any model's folder")
    parser.add_argument("gguf", type=Path, help="the file to write")
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--outtype", default="f32", help="precision, as the converter takes it (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
