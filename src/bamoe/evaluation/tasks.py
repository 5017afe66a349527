"""Tasks of lm-evaluation-harness on any model that bamoe loads, dense or mixture; results in the harness's own schema.

The harness's command cannot be told to import bamoe, so it is called from here, with the loaded model. It is an
optional extra.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamoe.checkpoints.loading import check_vocabulary, load_config, load_tokenizer
from bamoe.errors import ConfigError, DataError
from bamoe.evaluation.perplexity import load_for_measuring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Any  # lm_eval.api.task.Task or lm_eval.api.group.Group


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str | Task],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness; returns its own dictionary of results, as it writes it to JSON.

    Args:
        model: a directory (its tokenizer is used, on a GPU if there is one), or a loaded model with `tokenizer`.
        tasks: names, patterns of names, task files (YAML), or what `load_tasks` returned.
        include_path: a folder with further task files, then known by their names.
        num_fewshot: examples before each question; by default what the task says. A task that says 0 keeps it.
        limit: only the first so many documents of each task; below 1, that share of them.
        batch_size: sequences of one forward pass.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
        DataError: a task, or its data, that cannot be read.
        CheckpointError: a model or tokenizer that cannot be read.
    """
    loaded = load_tasks([task for task in tasks if isinstance(task, str)], include_path)
    loaded += [task for task in tasks if not isinstance(task, str)]
    if isinstance(model, str | Path):
        tokenizer = tokenizer or load_tokenizer(model)
        check_vocabulary(tokenizer, load_config(model))
        model = load_for_measuring(model)
    elif tokenizer is None:
        raise ConfigError("a model object needs its tokenizer: evaluate_tasks(model, tasks, tokenizer=...)")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    was_training = model.training
    try:
        with _quiet_harness() as cut:
            results = simple_evaluate(
                # A copy of the tokenizer, because the harness gives it a padding token.
                HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                tasks=loaded,
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                log_samples=False,
            )
    finally:
        model.train(was_training)
    if cut.times:
        longest = getattr(model.config, "max_position_embeddings", None)
        warnings.warn(
            f"lm-evaluation-harness cut off the beginning of its input {cut.times} times, being longer than the "
            f"model's {longest} positions",
            stacklevel=2,
        )
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def results_table(results: dict[str, Any]) -> str:
    """The harness's own table of its results, and of groups of tasks where there are any."""
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join(tables)


def load_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> list[Task]:
    """Tasks and groups of tasks with their data, so that mistakes are found before a model is read.

    Arguments as for `evaluate_tasks`. Raises ConfigError when lm-eval is not installed or a task is unknown, DataError
    when one cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'bamoe[eval]'") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"there is no folder of tasks {include_path}")
    failure: Exception | None = None
    # Indexing the harness's own tasks, over ten thousand, takes seconds: only where the local ones are not enough.
    for include_defaults in (False, True):
        with _quiet_harness():
            manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        names = [name for task in tasks for name in manager.match_tasks([task]) or [task]]
        unknown = [name for name in names if name not in manager.task_index and not Path(name).expanduser().is_file()]
        if unknown:
            continue
        try:
            with _quiet_harness():
                return _outermost(manager.load(names))
        except OSError as error:  # of the data of a task: more tasks will not help
            failure = error
            break
        except Exception as error:  # the harness, YAML, datasets and the hub client each raise kinds of their own
            failure = error
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"no task file and no task of lm-evaluation-harness: {', '.join(unknown)}{hint}")
    raise DataError(f"cannot load the tasks {', '.join(names)}: {type(failure).__name__}: {failure}") from failure


def _outermost(loaded: Any) -> list[Task]:
    """Of loaded tasks and groups, those that are in no other group."""
    inner = {name for names in loaded["group_map"].values() for name in names}
    everything = loaded["groups"] | loaded["tasks"]
    return [task for name, task in everything.items() if name not in inner]


class _Truncations(logging.Handler):
    """Counts the inputs that the harness says it cut."""

    times = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.times += "truncat" in record.getMessage().lower()


@contextmanager
def _quiet_harness() -> Iterator[_Truncations]:
    """Keep the harness's log to itself, which warns of what is meant here, such as a model that is already loaded."""
    from lm_eval import evaluator

    logger, cut = logging.getLogger("lm_eval"), _Truncations(logging.WARNING)
    handlers, propagate, ask_git = logger.handlers, logger.propagate, evaluator.get_git_commit_hash
    logger.handlers, logger.propagate = [cut], False
    # It would ask for the commit of whatever repository is the working directory, and complain where there is none.
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield cut
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        evaluator.get_git_commit_hash = ask_git
