"""The chunks of a PNG file that its pixels, size, orientation and colours are in."""

import io
import zlib
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COUNT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"sRGB", b"gAMA", b"cHRM", b"eXIf"}
"""Chunks that Pillow reads. Among the others are texts and the colour profile: beyond a megabyte Pillow refuses these, and
the picture with them."""
PROFILE = b"iCCP"
LARGEST_PROFILE = 32 << 20
"""Bytes of a colour profile that are read; those of printers have a few megabytes."""
HEAD = 8
"""Bytes of a chunk before its content: the content's length and the chunk's name; four bytes of a checksum follow it."""


def parted(stream: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """A PNG file of what counts in it, and its colour profile; any other file as it is, from its beginning, and None."""
    start = stream.read(len(SIGNATURE))
    if start != SIGNATURE:
        stream.seek(0)
        return stream, None
    kept, profile = io.BytesIO(), None
    kept.write(start)
    while len(head := stream.read(HEAD)) == HEAD:
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if name in COUNT:
            kept.write(head + stream.read(length + 4))
        elif name == PROFILE:
            profile = _profile(stream.read(length + 4)[:-4])
        else:
            stream.seek(length + 4, io.SEEK_CUR)
        if name == b"IEND":
            break
    kept.seek(0)
    return kept, profile


def _profile(chunk: bytes) -> bytes:
    """A colour profile; of a damaged chunk what is no profile, too."""
    _, _, content = chunk.partition(b"\0")
    try:
        return zlib.decompressobj().decompress(content[1:], LARGEST_PROFILE)  # after the method of compression
    except zlib.error:
        return content
