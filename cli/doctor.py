"""`tu-diffuse doctor`: what this machine can do."""

import json
import warnings

from .info import lines_of
from .options import Debug, Json


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this machine can do: versions, memory, devices, and the dtypes and attention kernels that were tried and work.

    Examples:

      tu-diffuse doctor

      tu-diffuse doctor --json

    With --json one line: tu_diffuse, python, system, threads, memory_gb, embedded_model, libraries, and devices
    (each with device, name, memory_gb, dtypes, attention).
    """
    del debug  # read in main.py
    from ..pipeline.doctor import diagnose

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch explains on the way why a kernel refuses; the report says which do
        facts = diagnose()
    if as_json:
        print(json.dumps(facts))
    else:
        for line in lines_of(facts):
            print(line)
