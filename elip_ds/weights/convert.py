"""Files of weights into one another, for tools/convert_weights.py."""

from pathlib import Path

from elip_ds.errors import UserError
from elip_ds.weights.report import Report
from elip_ds.weights.sizes import to_metadata
from elip_ds.weights.source import Source, export, family_of, open_source
from elip_ds.weights.store import write_weights

# What a person calls a kind of file -> the registered families that it may be.
FROM = {
    "albef": ("albef",),
    "blip": ("blip", "blip_hf"),
    "meter": ("meter",),
    "clip": ("clip", "clip_hf"),
    "open_clip": ("clip", "clip_hf"),
    "deit": ("deit",),
    "bert": ("bert",),
    "roberta": ("bert",),
    "elip_ds": ("elip_ds",),
}
TO = ("albef", "blip", "meter", "open_clip", "hf")
IN_TRANSFORMERS = {"clip": "clip_hf", "blip": "blip_hf"}


def open_file(kind: str, path: Path, head_width: int = 64, activation: str | None = None) -> Source:
    """A file of a kind out of FROM. Raises UserError unless it is one."""
    if activation is None and kind == "clip":
        activation = "quick_gelu"  # OpenAI's; open_clip's own are trained with gelu
    return open_source(path, families=FROM[kind], head_width=head_width, activation=activation)


def save_own(source: Source, out: Path) -> None:
    """One safetensors file that says what model it holds. Raises UserError if it cannot be."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: converted weights are a .safetensors file")
    family = source.family or (source.model or "")
    write_weights(out, source.weights, to_metadata(family, source.tree), None)


def save_published(source: Source, to: str, out: Path) -> Report:
    """to: out of TO.  out: .safetensors, or any other name for a file of torch.save."""
    family = {"open_clip": "clip"}.get(to, to)
    if to == "hf":
        if source.model not in IN_TRANSFORMERS:
            raise UserError(
                f"{source.path} is model.name={source.model}, which transformers does not have; "
                f"--to hf takes {' or '.join(IN_TRANSFORMERS)}"
            )
        family = IN_TRANSFORMERS[source.model]
    weights, report = export(source, family)
    report.check()
    write_weights(out, weights, {}, family_of(family).wrap)
    return report
