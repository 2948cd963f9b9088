"""`tu-diffuse replay`: draw a picture again from what it carries, and compare."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Attention, Debug, Device, DType, Json, Model, Offload

ROUNDING = 2  # of 255, by which pixels may depend on the batch that they are computed in


def replay(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture that tu-diffuse made.")],
    model: Model = None,
    lora: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="LoRA file that the picture names, or a folder to look for it by hash; may be repeated.")
    ] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Embedding file that the picture names, or a folder that holds it; may be repeated.")
    ] = None,
    input: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|FOLDER", help="Where the pictures are that it was made from, if not beside it; may be repeated."),
    ] = None,
    control_model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The ControlNet that it was made with.")] = None,
    control_depth_model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The depth model that it was made with.")] = None,
    dtype: DType = "recorded",
    device: Device = "recorded",
    attention: Attention = "recorded",
    offload: Offload = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a picture again from the settings that it carries and say whether the pixels are equal.

    Exits with 0 when all pixels are equal, else with 1 and the largest difference (of 255). A picture of `batch` is drawn again in the company that
    it had, from the plan.json beside it; without that, differences of at most 2 are rounding and the exit code is 0. Pictures that it was made from
    are known by their content: they must lie beside it, or be named with --input.

    Examples:

      tu-diffuse replay a-red-apple-7.png

      tu-diffuse replay portrait.webp --model models/my-sdxl

      tu-diffuse replay portrait.webp --model models/my-sdxl --lora loras/

      tu-diffuse replay repainted-3.png --input photo.jpg --input masks/

    With --json one line: path, equal, largest_difference (0..255), different_pixels, seed.
    """
    del debug  # read in main.py
    from ..pipeline.metadata import read_metadata

    settings = read_metadata(picture)

    from ..batch.again import company_of, draw_again
    from ..pipeline.adapters.adapters import Shelf, find_by_hash
    from ..pipeline.editing.control import with_networks
    from ..pipeline.editing.inputs import located
    from ..pipeline.model.folder import open_folder
    from ..pipeline.model.loading import adapted_to, load_model
    from ..pipeline.model.place import choose_place
    from ..pipeline.replay import check_size, compare, made_with, model_of, redraw, request_of
    from ..pipeline.request import Request, with_pictures

    places = [*(input or []), picture.absolute().parent]
    recorded = made_with(settings)
    named = model_of(model, recorded)
    file = named is not None and named.is_file()
    folder = open_folder(named, recorded.get("prediction_type") if file else None, None if file else recorded.get("variant"))
    request, index = request_of(folder, settings)
    check_size(picture, request)
    if folder.fingerprint != recorded["hash"]:
        raise UsageError(
            f"{picture.name} was made with the model {recorded['name']!r} (hash {recorded['hash'][:10]}), not with {folder.name!r} "
            f"({folder.fingerprint[:10]}); name its folder with --model."
        )
    dtype, device, attention = (
        settings[name] if value == "recorded" else value for name, value in (("dtype", dtype), ("device", device), ("attention", attention))
    )
    quantize = settings.get("quantize", "none")
    files = find_by_hash([*(lora or []), *(embedding or [])], [*request.loras, *request.embeddings])
    company = company_of(picture, settings)

    def found(asked: Request) -> Request:
        asked = with_pictures(asked, lambda one: located(one, places))
        control = asked.control
        return asked if control is None else replace(asked, control=with_networks(control, folder, control_model, control_depth_model))

    if company is not None:
        company = [replace(item, request=found(item.request)) for item in company]
        new = draw_again(folder, choose_place(dtype, device, attention, quantize, offload), company, settings["item"], settings["seed"], files)
    else:
        request = found(request)
        loaded = load_model(folder, dtype=dtype, device=device, attention=attention, quantize=quantize, offload=offload)
        new = redraw(adapted_to(loaded, Shelf(folder, files), request), request, index)
    difference = compare(picture, new.pixels, new.settings)
    equal = difference.largest == 0
    if as_json:
        line = {"path": str(picture), "equal": equal, "largest_difference": difference.largest, "different_pixels": difference.pixels}
        print(json.dumps(line | {"seed": settings["seed"]}))
    else:
        print("equal" if equal else f"different: {difference.pixels} pixels, by at most {difference.largest} of 255")
    tolerated = ROUNDING if company is None and settings.get("company") else 0
    if difference.largest > tolerated:
        raise typer.Exit(1)
