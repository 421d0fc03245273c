"""One adapter out of several on the same base, weighted; saved as plain LoRA.

    python -m pipeline.combination a/models/adapter b/models/adapter --weights 0.7 0.3 --output outputs/both
    python -m pipeline.combination a/models/adapter b/models/adapter --how ties --density 0.5 --output outputs/ties

    linear         sum of w_i dW_i, exactly, in float32: of the sum of the ranks
    ties           each dW_i cut to its largest `density`, signs elected, what agrees averaged (arXiv 2306.01708)
    dare_linear    each dW_i with `density` kept at random and scaled up, then the sum of w_i dW_i (arXiv 2311.03099)
    dare_ties      the same, but signs elected and what agrees averaged

All work on the updates dW_i = scaling_i B_i A_i. What is not linear is no product of low rank any more: the best one of
--rank is saved (by singular values), and what is lost is told. peft's `add_weighted_adapter` calls these *_svd; its
plain names work on A and B each, whose product is another.

In ties and dare_ties the weights have a say in the election and are those of the mean: their ratio alone counts, and
two equal adapters give that adapter (the paper's lambda is 1). With weights of 1 that is peft's; with others, peft
divides by the number that agree, so that weights of 1 / N give 1 / N of the paper's.

Checked before it is kept: linear gives the logits of the sum written out into the base, in fp32; the saved adapter
fits the base; and, as merge does, how much of the update is in merged weights of merge.dtype.
"""

import argparse
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ModelError
from pipeline.files import hash_path, read_json

if TYPE_CHECKING:
    import torch

    from pipeline.schema import RunConfig

logger = logging.getLogger(__name__)
HOW = ("linear", "ties", "dare_linear", "dare_ties")
AVERAGED = ("ties", "dare_ties")
NUM_ROWS, NUM_TOKENS = 8, 64  # of made-up text, on which logits are compared


def combine(
    folders: Sequence[Path],
    weights: Sequence[float],
    how: str,
    density: float,
    rank: int | None,
    seed: int,
    target: Path,
) -> dict[str, float]:
    """Writes the combination of plain LoRA adapters.

    Args:
        weights: over 0 in ties and dare_ties, where their ratio counts alone.
        density: share of an update that is kept; not of linear.
        rank: of the result; None: the sum of the ranks. Not of linear.
        seed: of what DARE keeps.

    Returns:
        By layer, |dW wanted - dW saved| / |dW wanted|: what the rank loses; empty for linear, which loses nothing.

    Raises:
        ModelError: one is no plain LoRA, or they are on different layers.
    """
    import torch
    from safetensors.torch import load_file

    from pipeline.o_lora import WEIGHTS, check_plain, sum_adapters, write_plain

    if how == "linear":
        sum_adapters(folders, target, weights)
        return {}
    torch.manual_seed(seed)
    configs, states = [check_plain(folder) for folder in folders], [load_file(f / WEIGHTS) for f in folders]
    rank = rank or sum(int(config["r"]) for config in configs)
    found: dict[str, torch.Tensor] = {}
    lost: dict[str, float] = {}
    for name in _layers(folders, states):
        updates = [_update(state, config, name) for state, config in zip(states, configs, strict=True)]
        wanted_OI = _merge(updates, weights, how, density)
        u_OK, s_K, v_KI = torch.linalg.svd(wanted_OI, full_matrices=False)
        roots_K = s_K[:rank].sqrt()  # both factors as large: neither underflows in 16 bits
        a_RI = torch.zeros(rank, v_KI.shape[1])  # over a layer's width, what is left of the rank is 0
        b_OR = torch.zeros(u_OK.shape[0], rank)
        a_RI[: len(roots_K)] = roots_K[:, None] * v_KI[:rank]
        b_OR[:, : len(roots_K)] = u_OK[:, :rank] * roots_K
        dtype = states[0][f"{name}.lora_A.weight"].dtype
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a_RI.to(dtype), b_OR.to(dtype)
        norm = float(s_K.norm())
        lost[name] = float(s_K[rank:].norm()) / norm if norm else 0.0
    write_plain(found, configs[0], target)
    return lost


def _merge(updates: Sequence["torch.Tensor"], weights: Sequence[float], how: str, density: float) -> "torch.Tensor":
    """Of ties, dare_linear or dare_ties. Shape suffixes: K adapters, O out, I in features."""
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, prune

    kept = list(updates)
    if density < 1:
        by, rescale = ("magnitude", False) if how == "ties" else ("random", True)
        kept = [prune(update, density, method=by, rescale=rescale) for update in updates]  # type: ignore[arg-type]
    weights_K11 = torch.tensor(weights)[:, None, None]
    weighted_KOI = torch.stack(kept) * weights_K11
    if how == "dare_linear":
        return weighted_KOI.sum(dim=0)
    agrees_KOI = calculate_majority_sign_mask(weighted_KOI)  # what was cut has no sign, and agrees with none
    total_OI = (weights_K11 * agrees_KOI).sum(dim=0)
    return (weighted_KOI * agrees_KOI).sum(dim=0) / torch.where(total_OI > 0, total_OI, 1.0)


def _layers(folders: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> list[str]:
    for folder, state in zip(folders, states, strict=True):
        if state.keys() != states[0].keys():
            raise ModelError(f"{folder}: is on other layers than {folders[0]}. Give adapters of one target_modules.")
    return [name.removesuffix(".lora_A.weight") for name in states[0] if name.endswith(".lora_A.weight")]


def _update(state: Mapping[str, "torch.Tensor"], config: Mapping[str, Any], name: str) -> "torch.Tensor":
    """dW_OI, float32."""
    from pipeline.o_lora import scaling

    return scaling(config) * (state[f"{name}.lora_B.weight"].float() @ state[f"{name}.lora_A.weight"].float())


def run(options: argparse.Namespace) -> None:
    """Combines, checks and reports. Raises: PipelineError: adapters that do not go together, or a check that fails."""
    from pipeline.generate import load_settings
    from pipeline.project_models import check_adapter
    from pipeline.provenance import FILE as PROVENANCE
    from pipeline.provenance import write_provenance
    from pipeline.schema import TrainMethod

    config = load_settings(options.set)
    if config.train.method is TrainMethod.full:
        raise ConfigError("train.method: full makes whole models, and adapters are combined. Add `-S train=lora`.")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ConfigError(f"--output {options.output}: is there already. Name a new folder.")
    for folder in options.adapters:
        check_adapter(folder, config)
    made = [read_json(f / PROVENANCE) if (f / PROVENANCE).is_file() else {} for f in options.adapters]
    bases = {each["base_sha256"] for each in made if "base_sha256" in each}
    if len(bases) > 1:
        raise ModelError("the adapters were trained on different bases (base_sha256 of their provenance.json).")
    weights = options.weights or [1.0 / len(options.adapters)] * len(options.adapters)
    try:
        arguments = options.how, options.density, options.rank, options.seed, options.output
        lost = combine(options.adapters, weights, *arguments)
        check_combination(options.adapters, weights, options.how, options.output, config)
    except BaseException:
        shutil.rmtree(options.output, ignore_errors=True)  # what was not checked is not left to be used
        raise
    groups = [config.model, *([config.quantization] if config.train.method is TrainMethod.qlora else [])]
    extra = {"base_sha256": bases.pop()} if bases else {}
    sources = [{"adapter_sha256": hash_path(f), "weight": w} for f, w in zip(options.adapters, weights, strict=True)]
    write_provenance(options.output, "combination", *groups, how=options.how, adapters=sources, **extra)
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        logger.info("lost to the rank: %.1f %% of the update at most (%s)", 100 * lost[worst], worst)
    logger.info("%s of %d adapters, weights %s: %s", options.how, len(weights), weights, options.output)


def check_combination(
    folders: Sequence[Path], weights: Sequence[float], how: str, combined: Path, config: "RunConfig"
) -> None:
    """Parity of a linear combination, and the survival of any in merged weights, which warns.

    Raises:
        ParityError: the combination's logits are not those of the sum written out.
        ModelError: it does not fit the base.
    """
    from pipeline.lora import load_adapter
    from pipeline.parity import check_differs, check_parity, collect_logits, compare
    from pipeline.runtime import select_device, torch_dtype
    from pipeline.survival import collect_updates, measure_survival, summarize, warn_if_lost

    device = select_device(config.runtime)
    base = _load_base(config, device)
    batches = [_made_up_batch(base, device)]
    plain = collect_logits(base, batches, "the base")
    if how == "linear":
        _write_out(base, folders, weights)
        expected = collect_logits(base, batches, "the sum written out")
        base = _load_base(config, device)
    model = load_adapter(base, combined)
    if how == "linear":
        parity = compare(expected, model, batches)
        check_parity(parity, config.merge)
        check_differs(compare(plain, model, batches))
        logger.info("parity with the sum written out: mean_kl %.1e over %d tokens", parity.mean_kl, parity.num_tokens)
    updates = collect_updates(model)
    tuner: Any = model
    merged = tuner.merge_and_unload(safe_merge=True)
    for tensor in merged.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch_dtype(config.merge.dtype))
    survival = measure_survival(merged, updates)
    warn_if_lost(survival, config.merge.dtype)
    found = summarize(survival)
    if found:
        least, dtype = found["survival_min"], config.merge.dtype
        logger.info("survival in merged weights of %s: %.4f at least (1 is all of it)", dtype, least)


def _load_base(config: "RunConfig", device: "torch.device") -> Any:
    """The base that the adapters are on, plain and in fp32."""
    from pipeline.quantization import load_training_base
    from pipeline.schema import KeepQuantized, TrainMethod
    from pipeline.workspace import QUANTIZED, Workspace

    workspace = Workspace(Path(config.runtime.inputs_dir), Path(config.runtime.output_dir))
    quantized = workspace.input(QUANTIZED) if config.train.method is TrainMethod.qlora else Path()
    arguments = config.model, config.quantization, config.train.method, quantized, device
    return load_training_base(*arguments, KeepQuantized.never).float()


def _made_up_batch(model: Any, device: "torch.device") -> Any:
    import numpy as np

    from pipeline.batching import pad_rows

    rng = np.random.default_rng(0)
    rows = [rng.integers(0, model.get_input_embeddings().num_embeddings, NUM_TOKENS) for _ in range(NUM_ROWS)]
    return pad_rows(rows, [np.ones(NUM_TOKENS, dtype=bool)] * NUM_ROWS, 0).to(device)


def _write_out(base: Any, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """W + sum of w_i scaling_i B_i A_i, in place, from the files alone."""
    import torch
    from safetensors.torch import load_file
    from transformers.pytorch_utils import Conv1D

    from pipeline.o_lora import WEIGHTS, check_plain

    with torch.no_grad():
        for folder, factor in zip(folders, weights, strict=True):
            state, config = load_file(folder / WEIGHTS), check_plain(folder)
            for name in _layers([folder], [state]):
                layer = base.get_submodule(name.removeprefix("base_model.model."))
                update_OI = factor * _update(state, config, name).to(layer.weight.device)
                layer.weight += update_OI.T if isinstance(layer, Conv1D) else update_OI


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.combination", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="folders of plain LoRA adapters on one base")
    add("--weights", nargs="+", type=float, metavar="W", help="one an adapter; default: all the same, of sum 1")
    add("--how", choices=HOW, default="linear")
    add("--density", type=float, default=0.5, metavar="D", help="share of each update that is kept; not of linear")
    add("--rank", type=int, metavar="R", help="of the result; default: the sum of the ranks; not of linear")
    add("--seed", type=int, default=0, metavar="N", help="of what DARE keeps")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the adapter goes; a new folder")
    add("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as runtime.device=cpu")
    options = parser.parse_args(arguments)
    if len(options.adapters) < 2:
        parser.error("give two adapters or more")
    if options.weights is not None and len(options.weights) != len(options.adapters):
        parser.error(f"--weights: {len(options.weights)} for {len(options.adapters)} adapters; give one each")
    if options.weights is not None and (not all(map(math.isfinite, options.weights)) or not any(options.weights)):
        parser.error("--weights: give finite numbers, not all 0")
    if options.weights is not None and options.how in AVERAGED and min(options.weights) <= 0:
        parser.error(f"--weights: --how {options.how} is a weighted mean; give numbers over 0")
    if not 0 < options.density <= 1:
        parser.error("--density: must be over 0 and at most 1")
    if options.rank is not None and (options.rank < 1 or options.how == "linear"):
        parser.error("--rank: a number, 1 or more, and not with --how linear, which is exact")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)

    from pipeline.config import clean_errors, quiet_logs

    quiet_logs(force=False)
    with clean_errors("combination"):
        run(options)


if __name__ == "__main__":
    main()
