"""Several models asked the same prompts: adapters that share a base are mixed or swapped on it, loaded once."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.files import read_json
from pipeline.generation import Answer, Model, TextStreamer, answer_text, end_token_ids, generate_with_adapters
from pipeline.project_models import MODELS, ProjectModels, check_adapter
from pipeline.prompts import Prompt
from pipeline.runtime import seed_everything
from pipeline.workspace import ADAPTER

logger = logging.getLogger(__name__)
BASE = "base"  # what a row calls the training's base without an adapter
NOT_LABELS = {*MODELS} - {"adapter"}  # of adapters: they are other models' names
CUT_OFF = "\n[cut off by --max-new-tokens or the end of the context]"


@dataclass(frozen=True)
class Column:
    """One of the models that answer.

    Attributes:
        name: what answers are headed with.
        source: which loaded model it is; columns with equal sources share one in memory.
        adapter: peft's name of the adapter that is on; None: none is.
    """

    name: str
    source: str
    adapter: str | None = None


class Models:
    """The models of this project, each loaded once.

    Args:
        names: of `MODELS`; None: base, adapter and merged, those left out, with a warning, that cannot be used.
        adapters: folders; none: the project's.

    Attributes:
        adapters: folder by label.
        columns: who answers.

    Raises:
        PipelineError: see `ProjectModels.find` and `check_adapter`; an adapter given twice.
    """

    def __init__(self, project: ProjectModels, names: Sequence[str] | None = None, adapters: Sequence[Path] = ()):
        self._project = project
        self._loaded: dict[str, Model] = {}
        wanted = self._defaults(adapters) if names is None else list(dict.fromkeys(names))
        folders = list(adapters) or [project.workspace.input(ADAPTER)] if "adapter" in wanted else []
        for folder in folders:
            check_adapter(folder, project.config)
        for name in wanted:
            if name != "adapter":
                project.find(name)
        self.adapters = dict(zip(_labels(folders), folders, strict=True))
        self._peft_names = {label: f"adapter_{i}" if i else "default" for i, label in enumerate(self.adapters)}
        self.columns = [column for name in wanted for column in self._columns(name)]

    def columns_for(self, prompt: Prompt) -> list[Column]:
        """Who answers the prompt. Raises: DataError: it names an adapter that was not given."""
        if prompt.adapter is None:
            return self.columns
        known = {str(folder): label for label, folder in self.adapters.items()} | {name: name for name in self.adapters}
        if prompt.adapter != BASE and prompt.adapter not in known:
            there = ", ".join([*self.adapters, BASE])
            raise DataError(
                f"{prompt.row_id}: names the adapter '{prompt.adapter}'; there are {there}. Name one of these, or give "
                "its folder by --adapter."
            )
        label = known.get(prompt.adapter)
        chosen = self._adapter_column(label) if label else self._columns(self._project.training_base)[0]
        others = [column for column in self.columns if column.name not in self.adapters]
        place = next((i for i, column in enumerate(self.columns) if column.name in self.adapters), len(others))
        return list(dict.fromkeys([*others[:place], chosen, *others[place:]]))

    def load(self, source: str) -> Model:
        """The model of a column's `source`; the same object again until it is dropped."""
        if source not in self._loaded:
            name, adapters = source, None
            if self._project.is_full and source in self.adapters:
                name, adapters = "adapter", {"default": self.adapters[source]}
            elif source == "adapter":
                adapters = {self._peft_names[label]: folder for label, folder in self.adapters.items()}
            self._loaded[source] = self._project.load(name, adapters)
        return self._loaded[source]

    def drop(self, source: str) -> None:
        """Gives its memory back."""
        del self._loaded[source]
        gc.collect()

    def _defaults(self, adapters: Sequence[Path]) -> list[str]:
        names = ["base"]
        try:
            if not adapters:
                self._project.workspace.input(ADAPTER)
            names.append("adapter")
        except DataError as error:
            logger.warning("left out: %s", error)
        try:
            self._project.find("merged")
            names.append("merged")
        except (ConfigError, DataError) as error:
            logger.warning("left out: %s", error)
        return names

    def _columns(self, name: str) -> list[Column]:
        if name == "adapter":
            return [self._adapter_column(label) for label in self.adapters]
        shared = name == self._project.training_base and self._base_stays_plain()
        return [Column(name, "adapter" if shared else name)]

    def _adapter_column(self, label: str) -> Column:
        return Column(label, label) if self._project.is_full else Column(label, "adapter", self._peft_names[label])

    def _base_stays_plain(self) -> bool:
        """Whether the adapters' base is, with them off, the base: trained biases would stay in it."""
        if self._project.is_full or not self.adapters:
            return False
        return all(read_json(folder / "adapter_config.json").get("bias") == "none" for folder in self.adapters.values())


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; the paths as given of those that share one, or that bear a model's name."""
    names = [folder.resolve().name for folder in folders]
    taken = {name for name in names if names.count(name) > 1} | NOT_LABELS
    labels = [str(folder) if name in taken else name for folder, name in zip(folders, names, strict=True)]
    wrong = sorted({label for label in labels if labels.count(label) > 1 or label in NOT_LABELS})
    if wrong:
        raise ConfigError(
            f"--adapter {wrong[0]}: given twice, or named as a model is. Give each once, as a longer path."
        )
    return labels


@dataclass(frozen=True)
class Sampling:
    """How answers are generated. At `temperature` 0 greedily; else by sampling, every model from the same `seed`."""

    max_new_tokens: int
    batch_size: int
    temperature: float = 0.0
    seed: int = 0


class Session:
    """Models, tokenizer and settings together: prompts in, answers out.

    Args:
        context: the model's, in tokens; None where it sets no limit.
        progress: whether batches show a bar.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        sampling: Sampling,
        progress: bool,
    ):
        self._models, self._tokenizer, self._context = models, tokenizer, context
        self._sampling, self._progress = sampling, progress

    def stream(self, prompt: Prompt, write: Callable[[str], object], keep: bool = False) -> None:
        """Writes each model's answer under a heading, as it comes.

        Args:
            keep: the models stay in memory for the next prompt.
        """
        for source, tasks in self._by_source([prompt]).items():
            model = self._models.load(source)
            for _, column in tasks:
                write(f"--- {column.name} ---\n")
                (answer,) = self._answer(model, [prompt], [column], write)
                write(f"{'' if answer.ended else CUT_OFF}\n\n")
            if not keep:
                del model
                self._models.drop(source)

    def answer(self, prompts: Sequence[Prompt]) -> list[dict[str, Answer]]:
        """Answers of each prompt by model, in batches; one model is in memory at a time."""
        answers: dict[tuple[int, str], Answer] = {}
        for source, tasks in self._by_source(prompts).items():
            asked, columns = [prompts[i] for i, _ in tasks], [column for _, column in tasks]
            for (i, column), answer in zip(tasks, self._answer(self._models.load(source), asked, columns), strict=True):
                answers[i, column.name] = answer
            self._models.drop(source)
        return [
            {column.name: answers[i, column.name] for column in self._models.columns_for(prompt)}
            for i, prompt in enumerate(prompts)
        ]

    def text(self, answer: Answer) -> str:
        return answer_text(self._tokenizer, answer.ids)

    def _by_source(self, prompts: Sequence[Prompt]) -> dict[str, list[tuple[int, Column]]]:
        """By loaded model: which prompt (its index) each of its columns answers."""
        tasks: dict[str, list[tuple[int, Column]]] = {}
        for i, prompt in enumerate(prompts):
            for column in self._models.columns_for(prompt):
                tasks.setdefault(column.source, []).append((i, column))
        return tasks

    def _answer(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        columns: Sequence[Column],
        write: Callable[[str], object] | None = None,
    ) -> list[Answer]:
        stop_ids = end_token_ids(model, self._tokenizer, [prompt.end_id for prompt in prompts])
        seed_everything(self._sampling.seed)
        return generate_with_adapters(
            model,
            [prompt.ids for prompt in prompts],
            [column.adapter for column in columns],
            stop_ids=stop_ids,
            pad_token_id=int(self._tokenizer.pad_token_id),
            max_new_tokens=self._sampling.max_new_tokens,
            batch_size=self._sampling.batch_size,
            context=self._context,
            temperature=self._sampling.temperature,
            progress=f"answers of {', '.join(dict.fromkeys(c.name for c in columns))}" if self._progress else None,
            streamer=TextStreamer(self._tokenizer, stop_ids, write) if write else None,
        )
