"""Arm Ethos-U NPUs: what can be compiled for, with which options, and what the compiler tells.

Accelerators, system configurations and memory modes are those of Vela 5.2 and of the
configuration file that comes with it (`Arm/vela.ini`):
https://gitlab.arm.com/artificial-intelligence/ethos-u/ethos-u-vela (OPTIONS.md).
"""

from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from app.domain.problems import Note, WorkError

Accelerator = Literal[
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
]
SystemConfig = Literal[
    "Ethos_U55_Deep_Embedded",
    "Ethos_U55_High_End_Embedded",
    "Ethos_U65_Embedded",
    "Ethos_U65_Mid_End",
    "Ethos_U65_High_End",
    "Ethos_U65_Client_Server",
    "Ethos_U85_SYS_Flash_Low",
    "Ethos_U85_SYS_Flash_High",
    "Ethos_U85_SYS_DRAM_Low",
    "Ethos_U85_SYS_DRAM_Mid",
    "Ethos_U85_SYS_DRAM_High",
]
MemoryMode = Literal[
    "Sram_Only",
    "Shared_Sram",
    "Dedicated_Sram",
    "Dedicated_Sram_256KB",
    "Dedicated_Sram_384KB",
    "Dedicated_Sram_512KB",
]


class Platform(NamedTuple):
    """The system around an NPU: its clock and memories, and what lies in which of them."""

    system_config: SystemConfig
    memory_mode: MemoryMode


# The platforms that Vela itself falls back on for each family, so that the estimates are those of
# a plain `vela --accelerator-config ...`; here they are named instead of left to the fallback.
PLATFORMS: dict[str, Platform] = {
    "ethos-u55": Platform("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": Platform("Ethos_U65_Client_Server", "Dedicated_Sram_384KB"),
    "ethos-u85": Platform("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}


class EthosUOptions(BaseModel):
    """The options of the compiler; what is left out is Vela's default for the NPU's family."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    system_config: SystemConfig | None = None
    memory_mode: MemoryMode | None = None
    optimise: Literal["performance", "size"] = Field(
        default="performance", description="`size` lowers the peak of SRAM, and is slower."
    )
    arena_cache_size: int | None = Field(
        default=None,
        ge=0,
        le=2**32,
        description="Bytes of fast memory that the compiler may fill; else the memory mode's.",
    )
    timeout_s: float = Field(default=300, gt=0, le=3600, description="Of the compiler's run.")


class CpuOperator(BaseModel):
    """An operator that the compiled file leaves to the CPU, and why, in the compiler's words."""

    operator: str
    layer: str
    reason: str | None


class EthosUReport(BaseModel):
    """What Vela estimates for one inference of the compiled file, and what it left to the CPU.

    All figures of time are the compiler's estimates, of the NPU's part alone, on the platform
    named: nothing was run. Memory is what the NPU needs of each kind. `npu_share` is by the
    operators of the file given, `npu_macs_share` by its multiply-accumulates (None without any).
    """

    accelerator: Accelerator
    vela_version: str
    system_config: str
    memory_mode: str
    optimise: str
    clock_hz: int

    cycles: int
    npu_cycles: int
    inference_ms: float
    inferences_per_second: float | None = Field(description="None where nothing runs on the NPU.")
    sram_bytes: int
    dram_bytes: int
    on_chip_flash_bytes: int
    off_chip_flash_bytes: int
    macs: int = Field(description="Multiply-accumulates that the NPU computes, as Vela counts.")
    original_weights_bytes: int
    encoded_weights_bytes: int = Field(description="The NPU's weights as compressed by Vela.")

    size_bytes: int
    operators: int = Field(description="Operators of the file given.")
    npu_share: float
    npu_macs_share: float | None
    cpu_operators: list[CpuOperator]
    notes: list[Note] = []


def platform(accelerator: str, options: EthosUOptions) -> Platform:
    """The platform to compile for.

    Raises WorkError `unknown_accelerator`, and `invalid_options` for a system of another family.
    """
    known = get_args(Accelerator)
    if accelerator not in known:
        raise WorkError(
            "unknown_accelerator",
            f"There is no accelerator '{accelerator}'.",
            f"Known ones: {', '.join(known)}.",
        )
    family = accelerator.rsplit("-", 1)[0]
    usual = PLATFORMS[family]
    system = options.system_config or usual.system_config
    if not system.lower().replace("_", "-").startswith(family):
        raise WorkError(
            "invalid_options",
            f"The system configuration {system} is not one for {accelerator}.",
            f"Leave `system_config` out to get {usual.system_config}.",
        )
    mode = options.memory_mode or usual.memory_mode
    # An Ethos-U55 has no DRAM behind it, which the modes with SRAM of its own are for.
    if family == "ethos-u55" and mode.startswith("Dedicated_Sram"):
        raise WorkError(
            "invalid_options",
            f"The memory mode {mode} is not one for {accelerator}.",
            "Take Shared_Sram or Sram_Only, or leave `memory_mode` out.",
        )
    return Platform(system, mode)
