"""Graphics cards by name, and sizes such as 24GB: what `--gpu` takes."""

import difflib
import re
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.memory import CUDA_CONTEXT_BYTES, usable_bytes

DRIVER_SHARE = 0.02  # of a card's memory: torch reports 23.6 GiB of the RTX 4090's 24, 79.1 of the H100's 80
ECC_SHARE = 1 / 16  # of GDDR6, where error correction is on from the start; HBM has chips of its own for it
AMPERE = "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
DATA_CENTER = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Card:
    """A graphics card as its maker's data sheet has it.

    Attributes:
        gigabytes: of memory, as its name says: 2^30 bytes each; of a size without a name, 10^9 each.
        tflops: 10^12 dense bf16 FLOPs a second, accumulated in fp32, without sparsity; float16 where bf16 is missing.
            None: not known.
        float32_tflops: in fp32 without tensor cores, which is torch's default.
        source: of these two.
        has_ecc: error correction takes its share of the memory.
    """

    name: str
    gigabytes: float
    tflops: float | None = None
    float32_tflops: float | None = None
    source: str = ""
    has_bfloat16: bool = True
    has_ecc: bool = False

    @property
    def free_bytes(self) -> int:
        """What `device_memory.free_bytes` would find there: memory beside the driver and this process's context."""
        size = self.gigabytes * 1e9
        if self.source:
            size = self.gigabytes * 2**30 * (1 - ECC_SHARE * self.has_ecc) * (1 - DRIVER_SHARE)
        return max(0, int(size) - CUDA_CONTEXT_BYTES)


CARDS = (
    Card("t4", 16, 65, 8.1, DATA_CENTER + "tesla-t4/", has_bfloat16=False, has_ecc=True),
    Card("v100-16gb", 16, 125, 15.7, DATA_CENTER + "v100/", has_bfloat16=False),
    Card("v100-32gb", 32, 125, 15.7, DATA_CENTER + "v100/", has_bfloat16=False),
    Card("l4", 24, 121, 30.3, DATA_CENTER + "l4/", has_ecc=True),
    Card("a10", 24, 125, 31.2, DATA_CENTER + "products/a10-gpu/", has_ecc=True),
    Card("rtx3090", 24, 71, 35.6, AMPERE),
    Card("rtx4090", 24, 165.2, 82.6, ADA),
    Card("rtx5090", 32, 209.5, 104.8, BLACKWELL),
    Card("a100-40gb", 40, 312, 19.5, DATA_CENTER + "a100/"),
    Card("a6000", 48, 154.8, 38.7, AMPERE),
    Card("l40s", 48, 362, 91.6, DATA_CENTER + "l40s/", has_ecc=True),
    Card("a100-80gb", 80, 312, 19.5, DATA_CENTER + "a100/"),
    Card("h100", 80, 989, 67, DATA_CENTER + "h100/"),
    Card("h100-pcie", 80, 756, 51, DATA_CENTER + "h100/"),
    Card("h200", 141, 989, 67, DATA_CENTER + "h200/"),
)


def parse_card(text: str) -> Card:
    """The card of a name (`rtx4090`) or of a size (`24GB`, 10^9 bytes each, or `24GiB`, 2^30).

    Raises:
        ConfigError: neither.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip(), re.IGNORECASE)
    if size:
        gigabytes = float(size[1]) * (2**30 / 1e9 if size[2].lower() == "gib" else 1)
        if gigabytes == 0:
            raise ConfigError(f"--gpu: {text!r} is no memory; write a size such as 24GB.")
        return Card(text.strip(), gigabytes)
    by_name = {_plain(card.name): card for card in CARDS}
    wanted = re.sub(r"^(nvidia|geforce|tesla)+", "", _plain(text))
    if wanted in by_name:
        return by_name[wanted]
    near = [by_name[name].name for name in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)]
    known = ", ".join(card.name for card in CARDS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known cards: {known}."
    raise ConfigError(f"--gpu: {text!r} is no size such as 24GB or 24GiB and no known card; {hint}")


def smallest_size(needed_bytes: int) -> float | None:
    """Gigabytes of the smallest cards of which every one known here has so much for tensors; None: none has."""
    least: dict[float, int] = {}
    for card in CARDS:
        usable = usable_bytes(card.free_bytes, "cuda")
        least[card.gigabytes] = min(usable, least.get(card.gigabytes, usable))
    return min((size for size, usable in least.items() if usable >= needed_bytes), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
