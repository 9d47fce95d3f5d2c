"""Which tasks a name stands for: the three that quantkit ships, a user's YAML files, or lm-eval's own.

`resolve` finds names and fetches nothing; `load` reads or downloads the data. Ours need neither a network nor a cache.
A user's YAML is lm-eval's, with one thing more: a relative path of `data_files` or `data_dir` is looked up beside the
YAML first, and only then where lm-eval looks, in the current folder.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit_eval.lm_scope import INSTALL, digest, need_library, quiet, seeded

FOLDER = Path(__file__).resolve().parent / "tasks"
PERPLEXITY, CLOZE, COMPLETION = "pydocs_perplexity", "pydocs_cloze", "pydocs_completion"
SHIPPED = (PERPLEXITY, CLOZE, COMPLETION, "pydocs")  # `pydocs` is the group of the three


@dataclass(frozen=True)
class Selection:
    """Names that exist. `manager` is lm-eval's TaskManager, which knows them."""

    names: tuple[str, ...]
    folder: Path | None
    manager: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data.

    kind    lm-eval's output_type: "multiple_choice", "loglikelihood", "loglikelihood_rolling" or "generate_until"
    shots   examples before each item, as the task's author set them; None where that is left to the caller
    items   documents in it
    digest  of its definition and all its documents: another one is another task, whatever its version says
    task    lm-eval's object
    """

    name: str
    version: str
    kind: str
    shots: int | None
    items: int
    digest: str
    task: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, each once, in the order of the names; `groups` are lm-eval's objects of the groups among them."""

    names: tuple[str, ...]
    tasks: tuple[LoadedTask, ...]
    groups: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def resolve(names: Sequence[str], folder: Path | str | None = None) -> Selection:
    """Finds tasks, groups and tags by name.

    folder  with the user's YAML files, at any depth; their functions (`!function`) are Python beside them, which is run
    Raises InputError for a name that nobody has, or a folder that is not there; MissingError without lm-eval. lm-eval's
    own 13 thousand names are read (10 s) only for a name that is neither ours nor the folder's.
    """
    need_library()
    from lm_eval.tasks import TaskManager

    wanted = tuple(dict.fromkeys(names))
    if not wanted:
        raise InputError(f"no task is named; quantkit ships {', '.join(SHIPPED)}")
    for name in wanted:
        if name.endswith((".yaml", ".yml")):
            raise InputError(
                f"task {name!r} is a file; give its folder as tasks.folder (--tasks-folder), and the name that it has "
                "under `task` in there"
            )
    places = [FOLDER]
    if folder is not None:
        folder = _folder(Path(folder))
        places.append(folder)
    with quiet():
        if folder is not None:
            own = TaskManager(include_path=str(folder), include_defaults=False).task_index
            for name in sorted(set(own) & set(SHIPPED)):
                raise InputError(f"{own[name].yaml_path} defines {name!r}, which is quantkit's own task; rename it")
        manager = TaskManager(include_path=[str(p) for p in places], include_defaults=False)
        if any(name not in manager.task_index for name in _needed(wanted, manager.task_index)):
            manager = TaskManager(include_path=[str(p) for p in places], include_defaults=True)
    for name in wanted:
        if name not in manager.task_index:
            raise InputError(_unknown(name, manager.all_tasks, folder))
    return Selection(wanted, folder, manager)


def load(selection: Selection) -> Tasks:
    """Reads the data of the tasks, downloading what is not ours or on this machine.

    Raises MissingError for data that cannot be fetched, or a package that a task needs; InputError for a definition or
    data that lm-eval refuses.
    """
    tasks: dict[str, LoadedTask] = {}
    groups: dict[str, Any] = {}
    with quiet(), seeded(0):  # lm-eval draws a name for each task, used or not
        for root in filter(None, (FOLDER, selection.folder)):
            _settle(selection.manager.task_index, root)
        for name in selection.names:
            with _explained(name, selection):
                found = selection.manager.load([name])
                for each, task in found["tasks"].items():
                    if each not in tasks:
                        _runnable(each, task)
                        tasks[each] = _loaded(each, task)
            groups.update(found.get("groups") or {})
    return Tasks(selection.names, tuple(tasks.values()), groups)


# Names ----------------------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"tasks.folder: {folder} is not a folder; name one that holds lm-eval's task YAMLs")
    if not any(folder.glob("**/*.yaml")):
        raise InputError(f"tasks.folder: {folder} has no file that ends in .yaml")
    return folder


def _needed(names: Sequence[str], index: Mapping[str, Any]) -> Iterator[str]:
    """The names, and all that the groups among them refer to."""
    queue, seen = list(names), set(names)
    while queue:
        name = queue.pop()
        yield name
        members = (index[name].cfg or {}).get("task") if name in index else None
        for member in members if isinstance(members, list) else []:
            child = member if isinstance(member, str) else member.get("group") or member.get("task")
            inline = isinstance(member, dict) and ("dataset_path" in member or isinstance(member.get("task"), list))
            if isinstance(child, str) and not inline and child not in seen:
                seen.add(child)
                queue.append(child)


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    text = f"unknown task {name!r}; {hint}quantkit ships {', '.join(SHIPPED)}, lm-eval {len(known) - len(SHIPPED)} more"
    if folder is None:
        return text
    broken = [f"{file.relative_to(folder)}: {fault}" for file, fault in _broken(folder)]
    return f"{text}, and {folder} was read" + (f"; not readable there: {'; '.join(broken[:3])}" if broken else "")


def _broken(folder: Path) -> Iterator[tuple[Path, str]]:
    """YAML files that lm-eval passes over in silence, and why."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(folder.glob("**/*.yaml")):
        try:
            if not {"task", "group", "class"} & set(load_yaml(file, resolve_func=False)):
                yield file, "no key `task` or `group`"
        except Exception as e:  # whatever a YAML may hold
            yield file, _line(e)


# Data -----------------------------------------------------------------------------------------------------------------


def _settle(index: dict[str, Any], root: Path) -> None:
    """Entries of YAML files under `root` with data beside them get the full path; ours are read without a cache."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, entry in list(index.items()):
        kwargs = (entry.cfg or {}).get("dataset_kwargs")
        if (
            entry.yaml_path is None
            or root not in Path(entry.yaml_path).resolve().parents
            or not isinstance(kwargs, dict)
        ):
            continue
        beside = Path(entry.yaml_path).resolve().parent
        settled = {
            key: _beside(value, beside) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()
        }
        if settled == kwargs:
            continue
        full = {**load_yaml(entry.yaml_path, resolve_func=True), "dataset_kwargs": settled}
        if root == FOLDER:
            full["custom_dataset"] = _reader(settled["data_files"])
        index[name] = type(entry)(name=name, kind=entry.kind, yaml_path=None, cfg=full, tags=entry.tags)


def _beside(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _beside(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_beside(each, folder) for each in value]
    if isinstance(value, str) and "://" not in value and not os.path.isabs(value):
        found = any(folder.glob(value)) if any(c in value for c in "*?[") else (folder / value).exists()
        return str(folder / value) if found else value
    return value


def _reader(files: Mapping[str, str]) -> Callable[..., Any]:
    """A function that reads JSON lines into memory: no cache on disk that could be stale, and no request."""

    def read(**_: Any) -> Any:
        import datasets

        rows = {s: [json.loads(x) for x in Path(f).read_text("utf-8").split("\n") if x] for s, f in files.items()}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})

    return read


def _runnable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name} runs code that the model wrote, which quantkit does not do; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name} asks about images or sound; only tasks of text can be run; leave it out")


def _loaded(name: str, task: Any) -> LoadedTask:
    documents = task.eval_docs
    config = task.dump_config() or {}
    metadata = {k: v for k, v in (config.pop("metadata", None) or {}).items() if k != "config_source"}
    for key in ("dataset_kwargs", "custom_dataset"):  # where the data lie is nobody's business; what they are follows
        config.pop(key, None)
    examples = None if config.get("fewshot_split") == config.get("test_split") else task.fewshot_docs()
    parts = [type(task).__qualname__, config, metadata, digest([digest(dict(doc)) for doc in documents])]
    parts.append(digest([digest(dict(doc)) for doc in examples or ()]))
    shots = task.get_config("num_fewshot")
    return LoadedTask(name, str(task.VERSION), str(task.OUTPUT_TYPE), shots, len(documents), digest(parts), task)


@contextmanager
def _explained(name: str, selection: Selection) -> Iterator[None]:
    """What goes wrong while a task is built, as a sentence."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except QuantkitError:
        raise
    except ImportError as e:
        raise MissingError(f"task {name} needs a package that is not installed ({_line(e)}); {INSTALL}") from None
    except (ConnectionError, HTTPError, OfflineModeIsEnabled) as e:
        raise MissingError(
            f"task {name}: its data cannot be fetched ({_line(e)}); go online once, or use tasks that need no network: "
            f"{', '.join(SHIPPED)}"
        ) from None
    except (DatasetsError, OSError) as e:
        raise InputError(f"task {name}: its data cannot be read ({_line(e)})") from None
    except Exception as e:  # lm-eval runs what a YAML holds: templates, metrics and functions of its author
        raise InputError(f"task {name}: lm-eval cannot build it ({type(e).__name__}: {_line(e)})") from e


def _line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."
