"""`python -m tu_diffuse` is `tu-diffuse`."""

from .cli.main import main

main()
