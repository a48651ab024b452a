"""A PyTorch TriX checkpoint to safetensors. Needs torch >= 2.10 and nothing else.

    python torch_to_safetensors.py CHECKPOINT.pt OUTPUT.safetensors

Run it as a file, in whatever Python has torch; the rest of trix_jax is not imported.
Takes `{step, model_state_dict, optimizer_state_dict, config}`, of which the optimizer's
state is left behind, or a bare state dict. Tensors keep their names; `config` and
`step` go into the file's metadata as JSON. `trix-jax import` reads the result.
"""

import ctypes
import json
import struct
import sys

import torch

OLDEST = (2, 10)  # older versions of torch.load can be made to run code: CVE-2026-24747
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read(path):
    """Returns the state dict and the metadata of a checkpoint.

    Raises:
        ValueError: torch is too old, or the file holds something else.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST:
        raise ValueError(
            f"torch must be at least 2.10 to read a file safely. Got {torch.__version__}."
        )
    loaded = load(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dict. Got {type(loaded).__name__}.")
    state = loaded.get("model_state_dict", loaded)
    wrong = [name for name, value in state.items() if not torch.is_tensor(value)]
    if wrong or not state:
        raise ValueError(f"{path} must hold tensors by name. Got {wrong or 'nothing'}.")
    about = {} if state is loaded else {k: loaded.get(k) for k in ("config", "step")}
    text = json.dumps(about, default=plain)
    return state, {"format": "trix-pytorch", "about": text}


def load(path):
    """What a file of `torch.save` holds, if it is tensors and plain values alone."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Of many types; and torch's own text advises to read the file unsafely.
        raise ValueError(
            f"{path} must hold tensors and plain values alone, and be whole. "
            f"torch refused it ({type(error).__name__})."
        ) from error


def plain(value):
    """A tensor among a checkpoint's settings as numbers."""
    if torch.is_tensor(value):
        return value.tolist()
    raise ValueError(f"config must hold plain values. Got {type(value).__name__}.")


def write(path, state, metadata):
    """Writes safetensors: the header's length, the header as JSON, the bytes."""
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    header, offset = {"__metadata__": metadata}, 0
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise ValueError(
                f"{name} has a dtype that cannot be stored: {value.dtype}."
            )
        end = offset + value.numel() * value.element_size()
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            size = value.numel() * value.element_size()
            file.write(ctypes.string_at(value.data_ptr(), size) if size else b"")


def main(arguments):
    """Converts; returns the exit code."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        state, metadata = read(arguments[0])
        write(arguments[1], state, metadata)
    except (ValueError, OSError) as error:
        print(f"torch_to_safetensors: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[1]}: {len(state)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
