"""The catalog's entries of the rewards that are sizes of JPEG files. Data only."""

from __future__ import annotations

from tasks.catalog.entry import GPU, IMAGE_OR_VIDEO, ModelEntry

JPEG_COMPRESSIBILITY = ModelEntry(
    path="workers.models.jpeg:JpegCompressibility",
    queue=GPU,
    required=(IMAGE_OR_VIDEO,),
    version="1",
    doc="minus the kilobytes (1000 bytes) of the image as JPEG at quality 95: higher is more compressible",
)

JPEG_INCOMPRESSIBILITY = ModelEntry(
    path="workers.models.jpeg:JpegIncompressibility",
    queue=GPU,
    required=(IMAGE_OR_VIDEO,),
    version="1",
    doc="kilobytes (1000 bytes) of the image as JPEG at quality 95",
)
