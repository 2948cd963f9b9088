"""Options about shards that several commands share, each defined once."""

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
Preset = Annotated[
    str | None,
    typer.Option(
        "--filter", metavar="NAME", help="A preset: laion-aesthetic (English, unsafe < 0.1, aesthetic V2 > 4.5). Single filters replace its parts."
    ),
]
Language = Annotated[str | None, typer.Option("--language", metavar="CODE", help="Keep samples of this language, for example en.")]
MaxUnsafe = Annotated[
    float | None, typer.Option("--max-unsafe", help="Keep where the probability of unsafe content (punsafe, or the NSFW word) is below this.")
]
MinAesthetic = Annotated[float | None, typer.Option("--min-aesthetic", help="Keep where the aesthetic score is above this.")]
AestheticVersion = Annotated[
    str | None, typer.Option("--aesthetic-version", help="Which score that is: v1 (column aesthetic) or v2 (AESTHETIC_SCORE). [default: v2]")
]
MaxWatermark = Annotated[float | None, typer.Option("--max-watermark", help="Keep where the probability of a watermark is below this.")]
MinSimilarity = Annotated[float | None, typer.Option("--min-similarity", help="Keep where picture and text are at least this similar (CLIP cosine).")]
MinSize = Annotated[int | None, typer.Option("--min-size", help="Keep where the smaller side has at least so many pixels, stored and originally.")]
Aspect = Annotated[str | None, typer.Option("--aspect", metavar="LOW,HIGH", help="Keep where width / height lies between these, both included.")]
Missing = Annotated[
    str | None, typer.Option("--missing", help="drop or keep samples without the value that a filter asks about; 0 is a value. [default: drop]")
]
