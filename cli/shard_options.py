"""Options about shards that several commands share, each defined once."""

from dataclasses import dataclass
from typing import Annotated

import typer

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC...", help="Shards: files, 'laion/{00000..00099}.tar', 'laion/*.tar', s3:// or https:// URLs; quote patterns from the shell."
    ),
]
SkipDamaged = Annotated[bool, typer.Option("--skip-damaged", help="Leave damaged samples out instead of stopping at damage.")]
MaxLost = Annotated[float, typer.Option("--max-lost", metavar="0..1", help="With --skip-damaged, stop when more than this share of samples is lost.")]
VerifyPictures = Annotated[bool, typer.Option("--verify-pictures", help="Decode every picture; without it only its first bytes are looked at.")]
VerifyHashes = Annotated[
    bool,
    typer.Option("--verify-hashes", help="Compare pictures with the hash in their .json; only for pictures that were stored as downloaded."),
]


@dataclass(frozen=True)
class FilterOptions:
    """Which samples are kept; as `shards.filters.make_filters` takes them, `aspect` as text."""

    preset: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="NAME",
            help="A preset: laion-aesthetic (English, unsafe < 0.1, aesthetic V2 > 4.5). Single filters replace its parts.",
        ),
    ] = None
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Keep samples of this language, for example en.")] = None
    max_unsafe: Annotated[
        float | None, typer.Option(help="Keep where the probability of unsafe content (punsafe, or the NSFW word) is below this.")
    ] = None
    min_aesthetic: Annotated[float | None, typer.Option(help="Keep where the aesthetic score is above this.")] = None
    aesthetic_version: Annotated[
        str | None, typer.Option(help="Which score that is: v1 (column aesthetic) or v2 (AESTHETIC_SCORE). [default: v2]")
    ] = None
    max_watermark: Annotated[float | None, typer.Option(help="Keep where the probability of a watermark is below this.")] = None
    min_similarity: Annotated[float | None, typer.Option(help="Keep where picture and text are at least this similar (CLIP cosine).")] = None
    min_size: Annotated[int | None, typer.Option(help="Keep where the smaller side has at least so many pixels, stored and originally.")] = None
    aspect: Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="Keep where width / height lies between these, both included.")] = None
    missing: Annotated[
        str | None, typer.Option(help="drop or keep samples without the value that a filter asks about; 0 is a value. [default: drop]")
    ] = None
