"""Images, videos and audio (PIL, numpy, torch) to checked uint8 pixels and back; no other package changes layouts.

An image is uint8 `(H, W, 3)` on the wire, a video `(T, H, W, 3)`, audio float32 `(C, T)`. Floats come in as
`(3, H, W)` in [0, 1] and are rounded to the nearest of 256 levels, as diffusers does when it makes PIL images. A value
that rounding put up to half a level outside of [0, 1] is the level at that end.

`checks` has what `submit()` looks at, `held` what it keeps, `encode`, `pil` and `whole_files` what the client's
background threads do, `decode` what a worker does, `digests` how content is known.
"""

from tasks.media.arrays import PixelsHWC, PixelsTHWC, is_tensor
from tasks.media.checks import (
    LONGEST_EDGE,
    check_audio,
    check_image,
    check_video,
    size_of,
    too_long_for,
)
from tasks.media.decode import from_jpeg, split_frames, to_pil, to_tensor, to_waveform
from tasks.media.digests import digest, fits
from tasks.media.encode import (
    JPEG_QUALITY,
    encode_audio,
    encode_image,
    encode_video,
    join_frames,
    to_jpeg,
)
from tasks.media.held import NUM_SPOTS, Held, check_unchanged, hold
from tasks.media.pil import orientation_of

__all__ = [
    "JPEG_QUALITY",
    "LONGEST_EDGE",
    "NUM_SPOTS",
    "Held",
    "PixelsHWC",
    "PixelsTHWC",
    "check_audio",
    "check_image",
    "check_unchanged",
    "check_video",
    "digest",
    "encode_audio",
    "encode_image",
    "encode_video",
    "fits",
    "from_jpeg",
    "hold",
    "is_tensor",
    "join_frames",
    "orientation_of",
    "size_of",
    "split_frames",
    "to_jpeg",
    "to_pil",
    "to_tensor",
    "to_waveform",
    "too_long_for",
]
