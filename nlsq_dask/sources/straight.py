"""Chunks of a Zarr array read one after the other, in one coroutine.

Zarr makes a task of each step of each chunk, which is good where bytes are waited for. Where
they are at hand, those tasks take half as long as LZ4 does, and from the thread that computes,
as they hold the interpreter. The codecs, and what they are told, are Zarr's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numcodecs import blosc
from zarr.abc.codec import BaseCodec
from zarr.codecs import BloscCodec, BytesCodec
from zarr.core.codec_pipeline import BatchedCodecPipeline

if TYPE_CHECKING:
    from zarr.abc.store import ByteGetter
    from zarr.core.array import AsyncArray
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

__all__ = ["CheckedPipeline", "StraightPipeline", "checked", "straight"]

_HEADER_BYTES = 16

# How to get a chunk, what it is, which part of it goes where, and whether that is all of it.
_Piece: TypeAlias = "tuple[ByteGetter, ArraySpec, Any, Any, bool]"


def checked(array: AsyncArray[Any]) -> AsyncArray[Any]:
    """The same array, which refuses frames of Blosc's that are cut short."""
    return _with_pipeline(array, BatchedCodecPipeline, CheckedPipeline)


def straight(array: AsyncArray[Any]) -> AsyncArray[Any]:
    """One that is `checked`, read so; as it is where a codec decodes in a way of its own."""
    pipeline: Any = array.codec_pipeline
    if type(pipeline) is CheckedPipeline and any(
        type(codec).decode is not BaseCodec.decode for codec in pipeline
    ):
        return array
    return _with_pipeline(array, CheckedPipeline, StraightPipeline)


def _with_pipeline(
    array: AsyncArray[Any],
    given: type[BatchedCodecPipeline],
    wanted: type[BatchedCodecPipeline],
) -> AsyncArray[Any]:
    """A copy that decodes by another pipeline; the array where it is not the one expected."""
    pipeline = array.codec_pipeline
    if type(pipeline) is not given:  # configured by the user: Rust's, say
        return array
    again = copy.copy(array)
    object.__setattr__(again, "codec_pipeline", wanted(**vars(pipeline)))
    return again


class CheckedPipeline(BatchedCodecPipeline):
    """Blosc is not told how long a frame is, and would read on in memory beyond it."""

    async def decode_batch(
        self, chunk_bytes_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]
    ) -> Iterable[NDBuffer | None]:
        batch = list(chunk_bytes_and_specs)
        for encoded, _ in batch:
            if encoded is not None:
                self._require_whole(encoded)
        return await super().decode_batch(batch)

    def _require_whole(self, encoded: Buffer) -> None:
        if self._ends_in_blosc:
            _unpacked_bytes(encoded.as_numpy_array())

    @property
    def _ends_in_blosc(self) -> bool:
        """Whether Blosc made of a chunk what is stored; what comes after it would tell itself."""
        numbers: Any = self.array_bytes_codec
        if self.bytes_bytes_codecs:
            return isinstance(self.bytes_bytes_codecs[-1], BloscCodec)
        return hasattr(numbers, "compressor") and isinstance(numbers.compressor, blosc.Blosc)


class StraightPipeline(CheckedPipeline):
    """Zarr's codecs in turn; a whole chunk of Blosc's is decoded to where it is wanted."""

    async def read(
        self, batch_info: Iterable[_Piece], out: NDBuffer, drop_axes: tuple[int, ...] = ()
    ) -> Any:
        if drop_axes or self.supports_partial_decode:
            return await super().read(batch_info, out, drop_axes)
        missing: list[bool] = []
        for piece in batch_info:
            getter, spec, chosen, wanted, _ = piece
            encoded = await getter.get(spec.prototype)
            missing.append(encoded is None)
            if encoded is None:
                await super().read([piece], out)  # what stands for it is Zarr's to say
            elif not self._unpack_into(out, wanted, encoded, spec):
                out[wanted] = (await self._decode(encoded, spec))[chosen]
        # From Zarr 3.2 on it is asked for.
        return tuple({"status": "missing" if gone else "present"} for gone in missing)

    async def _decode(self, encoded: Buffer, spec: ArraySpec) -> Any:
        self._require_whole(encoded)
        steps = []
        for codec in self:  # in the order of writing
            steps.append((codec, spec))
            spec = codec.resolve_metadata(spec)
        decoded: Any = encoded
        for codec, given in reversed(steps):
            decoded = await codec._decode_single(decoded, given)
        return decoded

    def _unpack_into(self, out: NDBuffer, wanted: Any, encoded: Buffer, spec: ArraySpec) -> bool:
        """Decode a chunk in its place; no, where it is more than that, or of another size."""
        if not self._packs_by_blosc(spec) or not all(isinstance(part, slice) for part in wanted):
            return False
        place, frame = out.as_numpy_array()[wanted], encoded.as_numpy_array()
        is_whole = place.shape == spec.shape and place.flags.c_contiguous and place.dtype.isnative
        if _unpacked_bytes(frame) != place.nbytes or not is_whole:
            return False
        blosc.decompress(frame, dest=place)
        return True

    def _packs_by_blosc(self, spec: ArraySpec) -> bool:
        """Whether a chunk's numbers are given to Blosc as they lie in memory."""
        numbers: Any = self.array_bytes_codec
        packing = [type(codec) for codec in self.bytes_bytes_codecs]
        if self.array_array_codecs:
            return False
        if hasattr(numbers, "compressor"):  # of format 2
            is_blosc = isinstance(numbers.compressor, blosc.Blosc)
            return is_blosc and not (numbers.filters or packing) and spec.order == "C"
        return numbers == BytesCodec() and packing == [BloscCodec]


def _unpacked_bytes(frame: np.ndarray) -> int:
    """As the header of a frame says, of which Blosc would read as much as that says of it.

    https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst

    Raises
    ------
    ValueError
        If the frame is shorter.
    """
    if frame.size >= _HEADER_BYTES:
        _, unpacked, _, packed = np.frombuffer(frame[:_HEADER_BYTES], "<u4").tolist()
        if packed <= frame.size:
            return int(unpacked)
    raise ValueError(f"a chunk is cut short: {frame.size:,} bytes of a frame of Blosc's")
