"""The files of a model's weights, looked at without loading them: which there are, and what their headers say."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from helpsteer_rloo.run_dir import read_json

COPY_AGAIN = "Copy the model's directory again, with all of its files."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_weights(directory: str | Path, stem: str = "model", needed: str | None = None) -> None:
    """Look at the weights of a local model before anything is loaded from it; what they hold is not read.

    Only safetensors are taken: a pickle, which is what `pytorch_model.bin` is, can run code when it is opened.

    Args:
        directory: Of the model.
        stem: Name of its weights, without ending: "model" or "adapter_model".
        needed: Part of the name of a tensor that has to be among them.

    Raises:
        ValueError: there are none, or only as a pickle; a file cannot be read or lies elsewhere; `needed` is missing.
    """
    shapes = weight_shapes(directory, stem)
    if needed is not None and not any(needed in name for name in shapes):
        raise ValueError(
            f"{Path(directory) / stem}.safetensors has no scalar head ({needed!r}), so its scores would be random. "
            "Give a reward model that reward_model_training.py trained."
        )


def weight_shapes(directory: str | Path, stem: str = "model") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a local model's tensors, from the headers of its safetensors files.

    Raises:
        ValueError: there are no such files, or one cannot be read or lies elsewhere.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(Path(directory), stem):
        try:
            with safe_open(path, "np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Is the file complete? Copy it again, or train again."
            ) from None
    return shapes


def _weight_files(directory: Path, stem: str) -> list[Path]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set((read_json(index) or {}).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index}: the file {name!r} is not in the directory of the model; it is not read.")
        return [directory / name for name in names]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory}: the weights are only there as {', '.join(pickles)}, a format that can run code when it is "
            "opened. Convert them with their maker's tools to safetensors, or take a model that has them."
        )
    raise ValueError(f"{directory}: no weights here; expected {single.name}.")
