"""Ray tasks, such as one for each scene, on any machine with free resources."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from tqdm import tqdm

from cbnerf.search.machines import worker_resources
from cbnerf.search.plan import Plan
from cbnerf.search.worker import MAX_FAILURES


def for_each_scene(
    plan: Plan, function: Callable[..., Any], *arguments: Any, trains: bool
) -> Iterator[tuple[str, Any]]:
    """`for_each` scene, with `arguments` before its name."""
    calls = {scene: (*arguments, scene) for scene in plan.scenes}
    return for_each(plan, function, calls, trains=trains)


def for_each(
    plan: Plan, function: Callable[..., Any], calls: Mapping[str, Sequence[Any]], *, trains: bool
) -> Iterator[tuple[str, Any]]:
    """Call `function(plan, *arguments)` as a Ray task for each of the `calls`, which are arguments
    by the name that messages use; yields pairs of name and result in the order of completion.

    A task whose process dies, for memory or with its machine, is retried `MAX_FAILURES` times. The
    error of a call that fails for good is raised after the other ones have ended.
    """
    task = _remote(plan, function, trains=trains)
    pending: dict[Any, str] = {}
    waiting, losses, errors = [], Counter(), []

    def start(name: str) -> None:
        pending[task.remote(plan, *calls[name])] = name

    for name in calls:
        start(name)
    while pending:
        (done,), _ = ray.wait(list(pending))
        name = pending.pop(done)
        try:
            answer = ray.get(done)
        except RayTaskError as error:  # raised by the function; a retry would repeat it
            errors.append(error)
        except RayError as error:
            losses[name] += 1
            tqdm.write(f"  {name}: {reason(str(error))}")
            if losses[name] > MAX_FAILURES:
                errors.append(ValueError(f"{name}: {reason(str(error))} ({losses[name]} times)"))
            elif isinstance(error, OutOfMemoryError):
                waiting.append(name)  # until another task has released its memory
                if pending:
                    continue
            else:
                start(name)
        else:
            yield name, answer
        if waiting:
            start(waiting.pop(0))
    if errors:
        raise errors[0]


def call(plan: Plan, function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of `function(plan, *arguments)` as a Ray task with the resources of one process."""
    return ray.get(_remote(plan, function, trains=False).remote(plan, *arguments))


_NEVER_RAN = "The actor never ran"  # a line that Ray adds after the cause
_MEMORY = re.compile(r"low on memory\. .*?IP: ([^,]+).*? was (.*? limit)")


def is_of_memory(trouble: str) -> bool:
    """Whether Ray has killed a process for memory, from the text of an error or traceback."""
    return _MEMORY.search(trouble) is not None


def reason(trouble: str) -> str:
    """The reason why a process of Ray has failed, in one line, from its error or traceback."""
    if found := _MEMORY.search(trouble):
        machine, memory = found.groups()
        return (
            f"the memory of {machine} was nearly full ({memory}), so Ray ended the process; "
            "with more resources.cpus_per_worker fewer trainings run at a time"
        )
    lines = [line for line in trouble.strip().splitlines() if not line.startswith(_NEVER_RAN)]
    return " ".join(lines[-1].split())[-300:]


def _remote(plan: Plan, function: Callable[..., Any], *, trains: bool) -> Any:
    """The function as a Ray task with the resources of one process; with none if it trains on
    several, which reserve their own."""
    alone = not plan.spec.resources.together or not trains
    needed = worker_resources(plan) if alone else {}
    return ray.remote(function).options(
        num_cpus=needed.get("CPU", 0),
        num_gpus=needed.get("GPU", 0),
        max_retries=0,  # Ray would retry for ever after a kill for memory.
    )
