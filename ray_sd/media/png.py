"""The chunks of a PNG file that its pixels, size, orientation and colours are in."""

import io
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COUNT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"}
"""Chunks that are read. Among the others are texts: beyond a megabyte Pillow refuses these, and the picture with them."""
HEAD = 8
"""Bytes of a chunk before its content: the content's length and the chunk's name; four bytes of a checksum follow it."""


def without_texts(stream: BinaryIO) -> BinaryIO:
    """A PNG file of what counts in it; any other file as it is, from its beginning."""
    start = stream.read(len(SIGNATURE))
    if start != SIGNATURE:
        stream.seek(0)
        return stream
    kept = io.BytesIO()
    kept.write(start)
    while len(head := stream.read(HEAD)) == HEAD:
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if name in COUNT:
            kept.write(head + stream.read(length + 4))
        else:
            stream.seek(length + 4, io.SEEK_CUR)
        if name == b"IEND":
            break
    kept.seek(0)
    return kept
