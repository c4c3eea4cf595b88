"""Torch files whose sizes hold together: checked before torch reads them.

A torch file is a zip archive whose entries lie uncompressed, one a storage, beside a pickle that says what they
are; before version 1.6 of torch it was a row of pickles followed by the storages. Nothing is read that would unpack
to more than the file, and no storage is read beyond what lies there.
"""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from diag.checkpoints.scan import Scan, scan
from diag.checkpoints.stand_ins import Refused

END_OF_ZIP, END_BYTES = b"PK\x05\x06", 22
LARGEST_PICKLE = 1 << 30
CHECKSUM_CHUNK = 1 << 20
LEGACY_PICKLES = 3  # the magic number, the protocol and facts about the machine, before the object itself


def check_torch_file(file: BinaryIO) -> None:
    """Raise Refused unless the file, at its start, is a torch file whose sizes hold together."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start.startswith(b"PK"):
        _check_zip(file)
    else:
        _check_legacy(file)
    file.seek(0)


def _check_zip(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(END_BYTES, size), os.SEEK_END)
    if file.read(4) != END_OF_ZIP:  # torch writes no comment; with one, two readers may see two archives
        raise Refused("is damaged or was not written to its end")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, size)
            [pickled] = [e for e in entries if e.filename.split("/", 1)[-1] == "data.pkl"]
            _check_sums(archive, entries)
            found = scan(io.BytesIO(archive.read(pickled)))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("is damaged or was not written to its end") from None
    prefix = pickled.filename.rpartition("data.pkl")[0]
    _check_storages(found, {e.filename.removeprefix(f"{prefix}data/"): e.file_size for e in entries}, size)


def _check_entries(entries: Iterable[zipfile.ZipInfo], size: int) -> None:
    names, total = set(), 0
    for entry in entries:
        total += entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused("is a zip archive with compressed entries, which torch never writes")
        if entry.filename in names or total > size:
            raise Refused("is a zip archive whose entries overlap")
        names.add(entry.filename)
        if entry.filename.endswith("data.pkl") and entry.file_size > LARGEST_PICKLE:
            raise Refused("holds a pickle too large to be the description of a checkpoint")


def _check_sums(archive: zipfile.ZipFile, entries: Iterable[zipfile.ZipInfo]) -> None:
    """Compare each entry with its checksum, which torch does not.

    Raises Refused where some are damaged. torch can be told to write no checksums; then none of them fits.
    """
    fits = {}
    for entry in (e for e in entries if e.file_size):
        try:
            with archive.open(entry) as data:
                while data.read(CHECKSUM_CHUNK):
                    pass
            fits[entry.filename] = True
        except zipfile.BadZipFile:
            fits[entry.filename] = False
    if not any(fits.values()):
        for entry in entries:
            entry.CRC = None  # type: ignore[assignment]  # read without one
    elif not all(fits.values()):
        broken = next(name for name, whole in fits.items() if not whole)
        raise Refused(f"is damaged (the checksum of its entry {broken[:60]} does not fit)")


def _check_storages(found: Scan, sizes: Mapping[str, int], size: int) -> None:
    if found.bytes_made > size:
        raise Refused("asks for more memory than its file can fill (a byte array)")
    for stored in found.stored:
        if stored.location != "meta" and sizes.get(stored.key) != stored.numel * stored.itemsize:
            raise Refused(
                f"says that its storage {stored.key[:40]} has {stored.numel * stored.itemsize:,} bytes, and "
                f"{sizes.get(stored.key, 0):,} lie there"
            )


def _check_legacy(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    with _in_memory(file, size) as data:
        for _ in range(LEGACY_PICKLES):
            scan(data)
        found, keys = scan(data), scan(data).value
        sizes: dict[str, int] = {}
        for stored in found.stored:  # torch takes the first description of a storage
            if sizes.setdefault(stored.key, stored.numel * stored.itemsize) != stored.numel * stored.itemsize:
                raise Refused(f"gives two sizes for its storage {stored.key[:40]}")
        if found.bytes_made > size or sum(sizes.values()) > size - data.tell():
            raise Refused("asks for more memory than its file can fill")
        if not isinstance(keys, list) or not set(sizes) <= {k for k in keys if isinstance(k, str)}:
            raise Refused("names storages that do not lie in it")


def _in_memory(file: BinaryIO, size: int) -> Any:
    """The file as if in memory; reading more than there is gives what there is."""
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, AttributeError):  # no file of the system's
        file.seek(0)
        return io.BytesIO(file.read())
