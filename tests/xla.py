"""How XLA compiles what tests compile."""

from importlib.metadata import version

FAST = {"xla_backend_optimization_level": 0}
"""Options that cut the back end's effort: it compiles in a third of the time, from the same partitioned program."""
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False

THOROUGH = {"xla_backend_optimization_level": 3} | ({"xla_cpu_use_fusion_emitters": True} if len(FAST) > 1 else {})
"""Options of `jax.jit` that compile one program as users do."""


def flags(devices: int | None, *, fast: bool = True) -> str:
    """XLA_FLAGS for that many CPU devices; None: as many as the program itself asks for."""
    wanted = {**(FAST if fast else {}),
              **({} if devices is None else {"xla_force_host_platform_device_count": devices})}
    return " ".join(f"--{name}={value}" for name, value in wanted.items())
