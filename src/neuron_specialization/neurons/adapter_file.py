"""The adapter's file format: bit-packed mask rows, key names, digest.

`adapter_model.safetensors` holds, per FFN block, `base_model.model.<block>.neuron_specialization_mask`: uint8
[rows, ceil(d_ff / 8)]; bit `j` of byte `i` is neuron `8 i + j`, padding bits are zero. `adapter_config.json` holds the
rest. Files are plain PEFT adapters: no key or value is translated on loading.
"""

import hashlib
import json
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file

from .ffn import STACKS
from .files import complete_writing

FORMAT_VERSION = 1
PEFT_TYPE = "NEURON_SPECIALIZATION"
PREFIX = "neuron_specialization_"
MASK = PREFIX + "mask"
DELTA = PREFIX + "delta"
DELTA_A = PREFIX + "delta_a"
DELTA_B = PREFIX + "delta_b"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."


def pack_rows(rows: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., d_ff] into uint8 [..., ceil(d_ff / 8)], least significant bit first."""
    width = rows.shape[-1]
    padded = torch.nn.functional.pad(rows.to(torch.uint8), (0, -width % 8))
    bits = padded.reshape(*rows.shape[:-1], -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=rows.device)).sum(-1, dtype=torch.uint8)


def unpack_rows(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack uint8 [..., ceil(width / 8)] into bool [..., width]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :width].bool()


def mask_key(block: str) -> str:
    """Return the name of a block's mask in a weights file."""
    return f"{KEY_PREFIX}{block}.{MASK}"


def check_packed_rows(key: str, packed: torch.Tensor, rows: int, width: int) -> None:
    """Check one mask tensor of a file: dtype, shape, zero padding bits, at least one neuron kept per row.

    Raises:
        ValueError: if one of these does not hold.
    """
    expected = (rows, -(-width // 8))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ValueError(f"{key}: expected uint8 {list(expected)}, got {packed.dtype} {list(packed.shape)}.")
    if width % 8 and bool((packed[:, -1] >> (width % 8)).any()):
        raise ValueError(f"{key}: the padding bits after neuron {width - 1} must be zero; the file is damaged.")
    empty = (packed.any(-1) == 0).nonzero().flatten().tolist()  # 30 times as fast as (packed == 0).all(-1)
    if empty:
        raise ValueError(f"{key}: rows {empty} keep no neuron at all; the file is damaged or was selected wrongly.")


def weights_file(directory: str | PathLike[str]) -> Path | None:
    """Return the weights file of a local adapter directory, the one PEFT would read, or None."""
    candidates = (Path(directory) / name for name in (WEIGHTS_NAME, PICKLED_WEIGHTS_NAME))
    return next((path for path in candidates if path.is_file()), None)


def check_holds_no_model(directory: str | PathLike[str]) -> None:
    """Raise ValueError if a directory for an adapter holds a model: transformers would load both, always."""
    if (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"{directory} holds a model. An adapter saved beside it would be loaded with it from then on; choose "
            "another directory."
        )


def newest_weights_file(directory: str | PathLike[str]) -> Path | None:
    """Return the weights file that was just written into a local adapter directory, or None.

    Saving in the other format leaves the file of an older save behind, which would be read in its place: it is
    removed. It is the one that the config there, still the older save's, was written for; times may be wrong.
    """
    found = [path for name in (WEIGHTS_NAME, PICKLED_WEIGHTS_NAME) if (path := Path(directory) / name).is_file()]
    if len(found) == 2:
        found.sort(key=lambda path: path.stat().st_mtime_ns)
        known = _recorded_digest(Path(directory) / CONFIG_NAME)
        next((path for path in found if file_digest(path) == known), found[0]).unlink()
    return weights_file(directory)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return what an adapter_config.json holds, of any method.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{path} is damaged: expected a JSON object with a peft_type.")
    return config


def _recorded_digest(config: Path) -> str | None:
    with suppress(OSError, ValueError):
        return read_config_file(config).get("weights_digest")
    return None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a weights file, on the CPU; their values are read when they are used.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is damaged: it cannot be read ({type(error).__name__}: {error}).") from error


def verify_digest(digest: str | None, path: Path, location: str | PathLike[str]) -> None:
    """Check that the weights file of the adapter at `location` is the one that its config was written for.

    Raises:
        ValueError: if it is missing or differs: the save was interrupted, or files of two saves were mixed.
    """
    if digest is None:
        return
    if not path.is_file() or file_digest(path) != digest:
        raise ValueError(
            f"The weights in {location} {'are not those' if path.is_file() else 'are missing'} that its {CONFIG_NAME} "
            "was written for: the save was interrupted, or files of two saves were mixed. Save the adapter again."
        )


def fetch(location: str | PathLike[str], filename: str, **hub: Any) -> Path:
    """Return the local path of one file of an adapter directory or of a Hub repository.

    Raises:
        ValueError: if `location` is a directory without that file, or neither a directory nor a reachable repository.
    """
    directory = Path(location)
    if directory.is_dir():
        with suppress(OSError):  # of a read-only directory; what follows reports what is missing
            complete_writing(directory)
        if not (directory / filename).is_file():
            raise ValueError(
                f"{directory} is not an adapter directory: it has no {filename}. Expected what save_pretrained or "
                "NeuronMasks.save_pretrained writes."
            )
        return directory / filename
    try:
        return Path(hf_hub_download(str(location), filename, **hub))
    except Exception as error:
        raise ValueError(
            f"No adapter at {str(location)!r}: it is neither a local directory nor a Hub repository that holds "
            f"{filename} and can be reached ({type(error).__name__}: {error})."
        ) from error


def fetch_weights(location: str | PathLike[str], **hub: Any) -> Path:
    """Return the local path of the weights of an adapter directory or of a Hub repository, as PEFT looks for them.

    Raises:
        ValueError: as `fetch` does, of the safetensors file, if there is neither that nor the older format.
    """
    try:
        return fetch(location, WEIGHTS_NAME, **hub)
    except ValueError:
        with suppress(ValueError):
            return fetch(location, PICKLED_WEIGHTS_NAME, **hub)
        raise


def digest_of_weights(location: str | PathLike[str]) -> str | None:
    """Return what tells an adapter's weights apart from others', or None where they are not in safetensors."""
    with suppress(ValueError):
        return file_digest(fetch(location, WEIGHTS_NAME))
    return None


def make_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create a Hub repository if it is missing, and return its id.

    Args:
        api: client of the Hub.
        repo_id: Hub id that was asked for.
        private: whether a new repository is private; None for the default of its owner.

    Raises:
        ValueError: if it is to be private and exists as a public one, which the Hub would leave public.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public: expected a private or a new repository. Nothing was uploaded; make it "
            "private in its settings on the Hub, or choose another name."
        )
    return repo_id


def read_config(location: str | PathLike[str], **hub: Any) -> dict[str, Any]:
    """Read and check adapter_config.json of an adapter directory or Hub repository.

    Raises:
        ValueError: if the file is missing, is another method's, or is of an unknown format version.
    """
    path = fetch(location, CONFIG_NAME, **hub)
    config = read_config_file(path)
    if config["peft_type"] != PEFT_TYPE:
        raise ValueError(f"{path} is an adapter of type {config['peft_type']}, not {PEFT_TYPE}.")
    check_format_version(config.get("format_version"), path)
    config |= {name: {} for name in ("selector", "fingerprint") if name in config and config[name] is None}
    for name in ("d_ff", "stacks", "selector", "fingerprint"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{path} is damaged: expected {name} as an object, got {config.get(name)!r:.80}.")
    widths, stacks = config["d_ff"], config["stacks"]
    if not all(type(width) is int and width > 0 for width in widths.values()):
        raise ValueError(
            f"{path} is damaged: expected a number of neurons for each block in d_ff, got {widths!r:.80}."
        )
    if widths.keys() != stacks.keys() or not set(map(str, stacks.values())) <= set(STACKS):
        raise ValueError(f"{path} is damaged: expected the stack of each block in d_ff, got {stacks!r:.80}.")
    return config


def check_format_version(version: Any, where: str | Path) -> None:
    """Raise ValueError unless this release can read `version` of the adapter format."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version}; this release reads version {FORMAT_VERSION}. "
            "Update neuron-specialization if the file is newer."
        )
