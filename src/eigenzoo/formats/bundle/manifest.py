"""manifest.json of a bundle: its schema, as pydantic models. The rules are in docs/bundle-format.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eigenzoo.errors import BundleError, UnsafePathError, UsageError
from eigenzoo.formats.model import MAX_NAME
from eigenzoo.formats.paths import relative_name
from eigenzoo.linalg.low_rank import pays
from eigenzoo.linalg.quantised import CODINGS
from eigenzoo.weights.splits import SplitRule, parse_split

SCHEMA_VERSION = 2
"""The largest version that is read. A bundle whose bases and coefficients are as in version 1 is written as version 1."""

BASIS_DTYPES = Literal["float64", "float32", "bfloat16", "float16", "int8", "nf4"]
COEFFICIENT_DTYPES = Literal["float32", "bfloat16", "float16"]


def _safe_name(name: str) -> str:
    try:
        return relative_name(name)
    except UnsafePathError as error:
        raise ValueError(error.what) from error


FileName = Annotated[str, AfterValidator(_safe_name)]
Count = Annotated[int, Field(ge=0)]
Energy = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ContentId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


MAX_LEFT = 20
"""Files beside a model that a manifest names as not carried; there may be more."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Strict):
    """Bytes and checksum of one file."""

    bytes: Count
    sha256: Sha256


MAX_VALUES = 2**40
"""Values of one layer: a hundred times the largest there is, and little enough that sizes below it are not nonsense."""


class LayerRecord(_Strict):
    """One fitted layer."""

    name: Name
    kind: Literal["dense", "update"]
    form: Literal["flat", "tucker", "stacked"]
    shape: list[Count]
    tensor_shape: list[Count]
    unfolding: Literal["scalar", "vector", "matrix", "kernel"]
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    num_bytes: Count
    ranks: dict[Literal["models", "outputs", "inputs", "cores"], Count]
    has_mean: bool

    @model_validator(mode="after")
    def _consistent(self) -> LayerRecord:
        if len(self.shape) != 2 or 0 in self.shape:
            raise ValueError("a layer's shape is (outputs, inputs), both positive")
        if prod(self.shape) > MAX_VALUES or len(self.tensor_shape) > 64:
            raise ValueError(f"a layer has at most {MAX_VALUES} values in 64 dimensions")
        if prod(self.tensor_shape) != prod(self.shape):
            raise ValueError("tensor_shape and shape hold different numbers of values")
        if self.form != "tucker" and set(self.ranks) != {"models"}:
            raise ValueError(f"form {self.form} with ranks of {sorted(self.ranks)}")
        for axis, size in (("outputs", self.shape[0]), ("inputs", self.shape[1])):
            if self.ranks.get(axis, 0) > size:  # type: ignore[call-overload]
                raise ValueError(f"rank {self.ranks[axis]} of {size} {axis}")  # type: ignore[index]
        sides = (self.ranks.get("outputs", self.shape[0]), self.ranks.get("inputs", self.shape[1]))
        if self.ranks.get("models", 0) > prod(sides):
            raise ValueError(f"{self.ranks['models']} directions of {prod(sides)} dimensions")
        if "cores" in self.ranks and (
            "models" in self.ranks or not self.ranks["cores"] or not pays(sides, self.ranks["cores"])
        ):
            raise ValueError(f"cores of rank {self.ranks['cores']} with ranks {dict(self.ranks)} of shape {self.shape}")
        if self.form == "flat" and self.kind != "dense":
            raise ValueError("form flat is for full weights")
        if self.form == "stacked" and self.kind != "update":
            raise ValueError("form stacked is for updates")
        return self


class SourceFile(_Strict):
    """A weight file that was read: its bytes, its time of change (ns), and its checksum once the bundle is saved."""

    bytes: Count
    mtime_ns: int
    sha256: Sha256 | None


class SourceRecord(_Strict):
    """Where a model (or the base) came from: the path relative to the bundle when it was written, and its weight files."""

    path: str
    files: dict[str, SourceFile]


class ModelRecord(_Strict):
    """One model: its coefficients, and the contents in rest/ that make a rebuilt model complete."""

    name: Name
    coefficients: FileName
    source: SourceRecord
    layout: ContentId
    config: ContentId | None
    metadata: dict[str, dict[str, str]]
    side_files: dict[str, ContentId]
    carried: dict[str, ContentId]
    not_carried: Annotated[list[Name], Field(max_length=MAX_LEFT)] = []


def _split_rule(text: str) -> str:
    try:
        parse_split(text)
    except UsageError as error:
        raise ValueError(error.what) from error
    return text


class _Options(BaseModel):
    """The options that growth reads again; versions may add others."""

    model_config = ConfigDict(extra="allow", strict=True)

    axes: list[Literal["models", "outputs", "inputs"]]
    rules: dict[str, Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, le=1)] | Literal["auto"]]
    center: Literal["models", "columns", "none", "global"]
    dtype: BASIS_DTYPES
    coefficients_dtype: COEFFICIENT_DTYPES = "float32"
    split: list[Annotated[str, AfterValidator(_split_rule)]] = []
    missing: Literal["error", "zero"] = "error"
    budget: Count | None
    max_error: Energy | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch's generators take


class _Bytes(_Strict):
    zoo: Count
    bundle: Count
    per_model: Count
    whole_zoo: Count
    whole_bundle: Count
    moments: Count
    break_even_models: Count | None


class _LayerReport(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    variance: Energy
    captured: Energy | None
    heldout: Annotated[float, Field(allow_inf_nan=False)] | None


class _AloneRow(_Strict):
    """The control without sharing at one rank (`records.AloneRow`)."""

    rank: Annotated[int, Field(ge=1)]
    residual: Energy
    bytes: Count
    per_model: Count
    about: Literal["zero", "mean"]


class _Provenance(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    licences: dict[str, Any] = {}
    bases: list[Any] = []


class _Imported(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    tool: str


class _Report(BaseModel):
    """What saving, growing and the card read again of a fit's report; versions may add others."""

    model_config = ConfigDict(extra="allow", strict=True)

    bytes: _Bytes
    energy: Energy
    residual: Energy
    layers: dict[str, _LayerReport]
    alone: list[_AloneRow] = []
    provenance: _Provenance = _Provenance()
    imported: _Imported = _Imported(tool="")


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    _Options.model_validate(options)
    return options


def _check_report(report: dict[str, Any]) -> dict[str, Any]:
    _Report.model_validate(report)
    return report


class Manifest(_Strict):
    """The whole manifest."""

    schema_version: Literal[1, 2]
    eigenzoo_version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!-]{1,64}$")]
    basis_id: Sha256
    view: Literal["weight", "delta", "update", "factors"]
    axes: list[Literal["models", "outputs", "inputs"]]
    center: Literal["models", "columns", "none", "global"]
    dtype: BASIS_DTYPES
    options: Annotated[dict[str, Any], AfterValidator(_check_options)]
    base: SourceRecord | None
    layers: Annotated[list[LayerRecord], Field(min_length=1)]
    models: list[ModelRecord]
    discarded: dict[str, Energy]
    report: Annotated[dict[str, Any], AfterValidator(_check_report)]
    files: dict[FileName, FileRecord]

    @property
    def split(self) -> tuple[SplitRule, ...]:
        """The rules by which fused weights are cut into layers of their own, of the zoo and of every model that is opened."""
        return tuple(parse_split(rule) for rule in self.options.get("split", []))

    @property
    def missing(self) -> str:
        """`zero` where a module that an adapter lacks counts as an update of zero, else `error`."""
        return str(self.options.get("missing", "error"))

    @property
    def coding(self) -> str:
        """How bases are quantised: `int8` or `nf4`, else ""."""
        return self.dtype if self.dtype in CODINGS else ""

    @property
    def coefficients_dtype(self) -> str:
        """The dtype of the models' coefficients."""
        return str(self.options.get("coefficients_dtype", "float32"))

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.schema_version < needed_version(self.layers, self.dtype, self.coefficients_dtype):
            raise ValueError(
                "schema version 1 has no low-rank cores, no bases in int8 or nf4, and no coefficients in half precision"
            )
        for what, names in (
            ("layer", [layer.name for layer in self.layers]),
            ("model", [model.name for model in self.models]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} is listed twice")
        if set(self.discarded) != {layer.name for layer in self.layers}:
            raise ValueError("discarded does not name the layers")
        return self


def needed_version(layers: Sequence[LayerRecord], dtype: str, coefficients_dtype: str) -> int:
    """Return the least schema version that has such layers, and bases and coefficients of these dtypes."""
    has_cores = any("cores" in layer.ranks for layer in layers)
    return 2 if has_cores or dtype in CODINGS or coefficients_dtype != "float32" else 1


def make_manifest(**fields: Any) -> Manifest:
    """Make a manifest of the least schema version that describes it, every field checked."""
    coefficients_dtype = fields["options"].get("coefficients_dtype", "float32")
    least = needed_version(fields["layers"], fields["dtype"], coefficients_dtype)
    return Manifest.model_validate({"schema_version": least, **fields})


def parse_manifest(document: dict[str, Any], where: str) -> Manifest:
    """Check a parsed manifest.json; raises BundleError with the first few things that are wrong."""
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {version}",
            where=where,
            rule=f"this version of eigenzoo reads schema versions up to {SCHEMA_VERSION}",
            next_step="upgrade eigenzoo",
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])[:100]}: {fault['msg'][:200]}"
            for fault in error.errors()[:4]
        )
        raise BundleError(
            f"manifest.json does not follow the format: {faults}", where=where, rule="see docs/bundle-format.md"
        ) from error
