"""What samplers and spacings are called, for those who need the names but not torch; `registry.py` and `schedules.py` say what they do."""

SAMPLER_NAMES = ("euler", "euler_a", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "lcm")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SPACINGS = (*TIMESTEP_SPACINGS, "karras", "exponential", "beta", "ays", "ays_xl", "lcm", "custom")
