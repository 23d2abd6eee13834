"""How a checkpoint prepares pictures, from `preprocessor_config.json` or `processor_config.json`.

What a file leaves out is the default of the class that it names. Fields that nobody reads may
change the numbers, so they raise.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.hf import Fields
from zoo.processors.files import read_json
from zoo.processors.pixels import Exactly, Filter, Pipeline, ShortestEdge, Size
from zoo.processors.views import AnyRes, Native, Single, Tiled, Views

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Fields that change no pixel: names of classes, forms of arrays, and `do_convert_rgb`, because
# pictures are read as RGB. `do_pad` and `pad_size` are read where they mean something.
_HARMLESS = """
    _processor_class _valid_processor_keys auto_map data_format device disable_grouping
    do_convert_rgb feature_extractor_type image_processor_type image_seq_length input_data_format
    num_channels processor_class return_metadata return_tensors
"""


def read_views(folder: str | Path) -> Views:
    """What the model in `folder` sees of a picture.

    Raises:
      ZooError: there is no configuration of an image processor, or it cannot be read.
      UsageError: it asks for something that this code does not do.
    """
    folder = Path(folder)
    file = folder / "processor_config.json"
    values = read_json(file).get("image_processor")
    if values is None:
        file = folder / "preprocessor_config.json"
        values = read_json(file)
    if not isinstance(values, dict) or not values:
        raise ZooError(
            f"{folder} does not say how pictures are prepared: want preprocessor_config.json, or "
            "processor_config.json with `image_processor`"
        )
    if not {"image_processor_type", "feature_extractor_type"} & values.keys():
        # Files of the first years leave the class to the architecture.
        architecture = read_json(folder / "config.json").get("model_type")
        if architecture in _BY_ARCHITECTURE:
            values = {"image_processor_type": _BY_ARCHITECTURE[architecture], **values}
    return views_of(values, file.name)


def views_of(values: dict[str, Any], name: str = "preprocessor_config.json") -> Views:
    """The same from the fields themselves; `name` is what errors call them. Raises UsageError."""
    fields = Fields(name, values)
    kind = fields.take("image_processor_type", fields.take("feature_extractor_type", ""))
    base = str(kind).removesuffix("Fast").removesuffix("Pil")
    base = base.replace("FeatureExtractor", "ImageProcessor")
    reader = _READERS.get(base)
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise UsageError(f"{name}: image_processor_type is {kind!r}: want one of {known}")
    views = reader(fields)
    fields.ignore(*_HARMLESS.split())
    fields.done()
    return views


def _cropped(fields: Fields) -> Single:
    fields.want("do_pad", False)
    return Single(_clip(fields))


def _llava(fields: Fields) -> Single:
    return Single(_clip(fields, square=bool(fields.take("do_pad", False))))


def _squashed(fields: Fields, **defaults: Any) -> Single:
    fields.want("do_pad", False)
    fields.want("do_center_crop", False)
    fields.ignore("crop_size")
    size = _size(fields, "size", 224, square=True)
    return Single(_pipeline(fields, size, None, mean=_HALF, std=_HALF, **defaults))


def _anyres(fields: Fields) -> AnyRes:
    fields.ignore("do_pad")  # empty tiles, so that a batch has one shape
    fields.want("aspect_ratio_setting", "anyres")
    pinned = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return _tiles_of(fields, _clip(fields), pinned, several=False)


def _onevision(fields: Fields) -> AnyRes:
    fields.ignore("do_pad")
    sides = range(384, 2305, 384)
    size = _size(fields, "size", {"height": 384, "width": 384}, square=False)
    crop = _crop(fields, None, cropped=False)
    pipeline = _pipeline(fields, size, crop, mean=_CLIP_MEAN, std=_CLIP_STD)
    return _tiles_of(fields, pipeline, [[h, w] for h in sides for w in sides], several=True)


def _tiles_of(
    fields: Fields, pipeline: Pipeline, pinned: Sequence[Sequence[int]], *, several: bool
) -> AnyRes:
    resolutions = fields.take("image_grid_pinpoints", pinned)
    size = pipeline.resize
    if isinstance(size, Exactly):
        whole, tile = (size.height, size.width), size.height
    elif isinstance(size, ShortestEdge):
        whole, tile = (size.length, size.length), size.length
    else:
        raise UsageError(f"{fields.name}: do_resize is false, which has no tiles")
    tile = pipeline.crop[0] if pipeline.crop else tile
    listed = tuple((int(height), int(width)) for height, width in resolutions)
    if not listed or any(side % tile for resolution in listed for side in resolution):
        raise UsageError(
            f"{fields.name}: image_grid_pinpoints is {listed}: want sizes that are multiples of "
            f"the tile's side {tile}"
        )
    return AnyRes(pipeline, whole, tile, listed, several)


def _tiled(fields: Fields) -> Tiled:
    # The processors that cut into tiles ask for it in every call, whatever the file says.
    fields.ignore("crop_to_patches", "use_thumbnail", "do_pad", "do_center_crop", "crop_size")
    size = _size(fields, "size", {"height": 384, "width": 384}, square=True)
    pipeline = _pipeline(fields, size, None, mean=_CLIP_MEAN, std=_CLIP_STD)
    if not isinstance(size, Exactly) or size.height != size.width:
        raise UsageError(f"{fields.name}: size is {size}: want square tiles")
    least, most = fields.take("min_patches", 1), fields.take("max_patches", 12)
    return Tiled(pipeline, (size.height, size.width), int(least), int(most))


def _native(fields: Fields) -> Native:
    fields.want("do_resize", True)
    fields.ignore("do_pad", "do_center_crop", "crop_size", "default_to_square")
    # A video processor's settings stand beside those of pictures in files of older versions.
    fields.ignore("fps", "min_frames", "max_frames", "num_frames", "do_sample_frames")
    bounds = fields.take("size", {})
    least = fields.take("min_pixels", bounds.get("shortest_edge", 56 * 56))
    most = fields.take("max_pixels", bounds.get("longest_edge", 28 * 28 * 1280))
    return Native(
        _pipeline(fields, None, None, mean=_CLIP_MEAN, std=_CLIP_STD),
        min_pixels=int(least),
        max_pixels=int(most),
        patch_size=fields.take("patch_size", 14),
        temporal_patch_size=fields.take("temporal_patch_size", 2),
        merge_size=fields.take("merge_size", 2),
    )


_READERS: dict[str, Callable[[Fields], Views]] = {
    "BitImageProcessor": _cropped,
    "CLIPImageProcessor": _cropped,
    "GotOcr2ImageProcessor": _tiled,
    "LlavaImageProcessor": _llava,
    "LlavaNextImageProcessor": _anyres,
    "LlavaOnevisionImageProcessor": _onevision,
    "Qwen2VLImageProcessor": _native,
    "Qwen2_5_VLImageProcessor": _native,
    "SiglipImageProcessor": _squashed,
    "ViTImageProcessor": lambda fields: _squashed(fields, method="bilinear"),
}
"""The classes of transformers, without the ends that name a backend."""


_BY_ARCHITECTURE = {
    "clip": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
    "siglip": "SiglipImageProcessor",
    "vit": "ViTImageProcessor",
    "vit_mae": "ViTImageProcessor",
}
"""The class that a checkpoint of some age means when it names none."""


def _clip(fields: Fields, *, square: bool = False) -> Pipeline:
    """The shorter side resized and the middle cut out, with CLIP's defaults."""
    size = _size(fields, "size", {"shortest_edge": 224}, square=False)
    crop = _crop(fields, {"height": 224, "width": 224}, cropped=True)
    return _pipeline(fields, size, crop, mean=_CLIP_MEAN, std=_CLIP_STD, square=square)


def _pipeline(
    fields: Fields,
    size: Exactly | ShortestEdge | None,
    crop: Size | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    method: Filter = "bicubic",
    square: bool = False,
) -> Pipeline:
    number = fields.take("resample", Filter.__args__.index(method))
    if number not in range(len(Filter.__args__)):
        raise UsageError(f"{fields.name}: resample is {number!r}: want a number from 0 to 5")
    scaled, normal = fields.take("do_rescale", True), fields.take("do_normalize", True)
    factor = fields.take("rescale_factor", 1 / 255)
    mean, std = _channels(fields.take("image_mean", mean)), _channels(fields.take("image_std", std))
    return Pipeline(
        resize=size if fields.take("do_resize", True) else None,
        filter=Filter.__args__[number],
        crop=crop,
        square=square,
        scale=float(factor) if scaled else None,
        mean=mean if normal else None,
        std=std if normal else None,
    )


def _channels(values: float | Sequence[float]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)


def _crop(fields: Fields, default: dict[str, int] | None, *, cropped: bool) -> Size | None:
    wanted = fields.take("do_center_crop", cropped)
    size = fields.take("crop_size", default)
    if not wanted:
        return None
    size = _sides(fields, "crop_size", size, square=True)
    if not isinstance(size, Exactly):
        raise UsageError(f"{fields.name}: crop_size is {size}: want `height` and `width`")
    return size.height, size.width


def _size(fields: Fields, key: str, default: Any, *, square: bool) -> Exactly | ShortestEdge:
    square = bool(fields.take("default_to_square", square))
    return _sides(fields, key, fields.take(key, default), square=square)


def _sides(fields: Fields, key: str, size: Any, *, square: bool) -> Exactly | ShortestEdge:
    """One number, which is both sides or the shorter one, two numbers, or an object."""
    if isinstance(size, int):
        return Exactly(size, size) if square else ShortestEdge(size)
    if isinstance(size, tuple) and len(size) == 2:
        return Exactly(*size)
    given = {} if not isinstance(size, dict) else {k: v for k, v in size.items() if v is not None}
    if set(given) == {"height", "width"}:
        return Exactly(int(given["height"]), int(given["width"]))
    if set(given) == {"shortest_edge"}:
        return ShortestEdge(int(given["shortest_edge"]))
    raise UsageError(
        f"{fields.name}: {key} is {size!r}: want a number, `height` and `width`, or `shortest_edge`"
    )
