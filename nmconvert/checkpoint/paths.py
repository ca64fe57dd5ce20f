"""Which files a run writes, what they are called, and that none of them is one that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from nmconvert.errors import UsageError

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""The endings of images, in small letters."""

_CALLED = {
    ".onnx": "an ONNX file",
    ".safetensors": "a safetensors file",
    ".npz": "a file of arrays",
    ".py": "a program",
    ".html": "a page",
    ".svg": "an SVG picture",
    **dict.fromkeys((".pt", ".pth", ".th", ".ckpt"), "a PyTorch file"),
    **dict.fromkeys(IMAGES, "an image"),
    **dict.fromkeys((".txt", ".json", ".xml"), "a text"),
}
"""What files are, by their endings: an output that is called otherwise is refused, and takes the place of no file of data."""


def beside(source: Path, tag: str, suffix: str | None = None) -> Path:
    """A name beside ``source``: ``a.pth`` and ``.nm2-4`` make ``a.nm2-4.pth``, or with ``suffix`` another ending.

    A folder's name has no ending; where none was given, as in ``.``, it is the one that it has on the disk.
    """
    named = source.resolve() if source.name in ("", "..") else source
    stem, ending = (named.name, "") if named.is_dir() else (named.stem, named.suffix)
    return named.with_name(f"{stem}{tag}{ending if suffix is None else suffix}")


def check_apart(written: Iterable[tuple[Path, str]], read: Iterable[Path]) -> None:
    """Raise where a run would replace what it reads, or what it writes already.

    Args:
        written: each file or folder with the option that names it.
        read: files and folders, or names that may be some; a folder among ``written`` must not hold one of them either, nor may
            a file whose ending does not say what it is take the place of one in them.

    Raises:
        UsageError: with the remedy.
    """
    kept = {path.resolve() for path in read if os.path.exists(path)}  # noqa: PTH110 (Path.exists raises where a name is too long)
    taken: set[Path] = set()
    for path, option in written:
        place = path.resolve()
        held = next((inner for inner in kept if place in inner.parents), None)
        unnamed = place.is_file() and place.suffix.lower() not in _CALLED
        folder = next((outer for outer in kept if outer in place.parents), None) if unnamed else None
        why = (
            "is read by this run" if place in kept
            else f"holds {held.name}, which is read by this run" if held is not None
            else f"is a file of {folder.name}, which is read by this run" if folder is not None
            else "is written by this run already" if place in taken
            else None
        )  # fmt: skip
        if why is not None:
            raise UsageError(f"{path}: {why}; give another name with {option}")
        taken.add(place)


def check_target(output: Path, option: str = "--output", *, made: str | None = None) -> None:
    """Raise where there can be no file ``output``, before the work that it is to hold.

    ``option`` names it. ``made`` says what it will be, so that no other kind of file is called by its name.

    Raises:
        UsageError: with the remedy.
    """
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; give the name of a file with {option}")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output}: is a device or a pipe, which no file can replace; give another name with {option}")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: there is no such folder for {option}; make it first")
    called = _CALLED.get(output.suffix.lower())
    if made and called not in (None, made):
        raise UsageError(f"{output}: will be {made}, and is called {called}; give a name with another ending with {option}")


def check_copy(source: Path, output: Path, replaceable: Callable[[Path], bool]) -> None:
    """Raise where a copy of ``source`` would replace it, would be called what it is not, or cannot be there.

    Of a folder's copy ``replaceable`` says whether it may take the place of a folder that holds something.

    Raises:
        UsageError: with the remedy.
    """
    check_apart([(output, "--output")], [source])
    is_now, wanted = _CALLED.get(source.suffix.lower()), _CALLED.get(output.suffix.lower())
    if is_now and wanted and is_now != wanted:
        remedy = "nmconvert export writes ONNX" if wanted == _CALLED[".onnx"] else "give a name with the same ending"
        raise UsageError(f"{output}: {source.name} is {is_now}, and its copy will be one, not {wanted}; {remedy}")
    if output.name in ("", ".."):
        raise UsageError(f"{output}: is no name for a copy; give one with --output")
    if not (source.is_dir() and output.is_dir()):
        check_target(output)
    elif any(output.iterdir()) and not replaceable(output):
        raise UsageError(f"{output}: exists and was not written by nmconvert; give another name with --output")
