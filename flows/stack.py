"""The Prefect server, file server, worker and deployments of a work folder: `python -m flows.stack COMMAND`.

    up       start what is not running, deploy prefect.yaml, leave it all up (`make stack`)
    down     end what `up` started
    status   what runs where; exit code 0 if all of it does
    serve    like `up`, in the foreground: it ends with Ctrl-C and leaves nothing
    demo     start, run `prefect deployment run vc2/full-pipeline`, follow it, print where the report is, end it all

`demo` and `serve` tie the life of every process to their own: whatever ends them, even `kill -9`, ends server, worker,
flow runs and trainers.
"""

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flows.follow import FINAL, follow
from flows.server import ROOT, Stack, StackError, held_lock
from vc2.errors import Vc2Error
from vc2.ports import free_port, is_free

__all__ = ["main"]

DEFAULT_PORT = 4200
EXPORTED = ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_SERVER_EPHEMERAL_ENABLED", "DO_NOT_TRACK", "PATH")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.command(options)
    except Vc2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the next run goes on from here", file=sys.stderr)
        return 130


def up(options: argparse.Namespace) -> int:
    with held_lock(options.work):
        stack = _standing(options) or _new(options, tied=False)
        started = stack.start()
        shell = options.work / "prefect" / "env"
        settings = stack.environment
        shell.write_text("".join(f"export {name}={shlex.quote(settings[name])}\n" for name in EXPORTED))
    there = [name for name in stack.names if name not in started]
    print(
        "; ".join(f"{what}: {', '.join(names)}" for what, names in (("running", there), ("started", started)) if names)
    )
    print("\n".join(_places(stack)))
    print(f"Run the pipeline:\n  source {shell}\n  prefect deployment run vc2/full-pipeline")
    return 0


def down(options: argparse.Namespace) -> int:
    with held_lock(options.work):
        stack = Stack.recorded(options.work)
        if stack is None:
            print(f"nothing runs in {options.work}")
            return 0
        stack.stop()
    print("stopped")
    return 0


def status(options: argparse.Namespace) -> int:
    stack = Stack.recorded(options.work)
    if stack is None:
        print(f"nothing runs in {options.work}")
        return 1
    for name in stack.names:
        process = stack.process(name)
        print(f"{name:8} {f'pid {process.pid}' if process else 'not running'}   log: {stack.log(name)}")
    print("\n".join(_places(stack)))
    healthy, missing = stack.api.is_healthy(), stack.ended()
    if not healthy:
        print(f"the Prefect server at {stack.url} does not answer")
    if missing:
        print("`make stack` starts what is not running")
    return 0 if healthy and not missing else 1


def serve(options: argparse.Namespace) -> int:
    with held_lock(options.work), _tied_stack(options) as stack:
        print("\n".join((*_places(stack), "(Ctrl-C ends it)")), flush=True)
        while True:
            _check(stack)
            time.sleep(1)


def demo(options: argparse.Namespace) -> int:
    started = time.monotonic()
    with held_lock(options.work), _any_stack(options) as stack:
        _say(f"Prefect: {stack.url}")
        _say("$ " + shlex.join(["prefect", "deployment", "run", "vc2/full-pipeline", *options.arguments]))
        run = _submit(stack, options.arguments)
        try:
            outcome = follow(stack.api, run, lambda: _check(stack), ui=stack.url)
        except KeyboardInterrupt:
            _cancel(stack, run)
            raise
        if outcome.state != "COMPLETED":
            raise StackError(f"the run ended {outcome.state.lower()}: {outcome.message} (logs: {stack.work / 'logs'})")
        for name, link in _lasting(stack, outcome.links):
            _say(f"{name}: {link}")
    _say(f"done in {time.monotonic() - started:.0f} s")
    print(outcome.result)
    return 0


def _lasting(stack: Stack, links: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Links that work after this process: the file server of a demo ends with it, the files stay."""
    for name, link in links.items():
        place = link.removeprefix(f"{stack.files_url}/")
        is_served = stack.files_url and place != link
        yield name, (Path(stack.store, unquote(place)).as_uri() if stack.tied and is_served else link)


@contextmanager
def _any_stack(options: argparse.Namespace) -> Iterator[Stack]:
    """The stack that `up` left in this work folder, left up; or one tied to this process."""
    standing = _standing(options)
    if standing is None:
        with _tied_stack(options) as stack:
            yield stack
        return
    standing.start()
    yield standing


@contextmanager
def _tied_stack(options: argparse.Namespace) -> Iterator[Stack]:
    if _standing(options):
        raise StackError(f"a stack is up in {options.work}; `python -m flows.stack down` ends it")
    stack = _new(options, tied=True)
    _say(f"starting Prefect on port {stack.port} (logs: {stack.log('server').parent})")
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


def _standing(options: argparse.Namespace) -> Stack | None:
    """The stack of this work folder if any of its processes still runs.

    Raises:
        StackError: If it has another store or port than the one asked for.
    """
    stack = Stack.recorded(options.work)
    if stack is None or not any(owned.process() for owned in stack.owned.values()):
        return None
    if stack.tied:  # we hold the lock, so whoever it was tied to is dead, and it is about to be
        stack.stop()
        return None
    if options.store not in (None, stack.store):
        raise StackError(f"the stack in {options.work} runs with store {stack.store}; stop it first: flows.stack down")
    if options.port not in (None, stack.port):
        raise StackError(f"the stack in {options.work} runs on port {stack.port}; stop it first: flows.stack down")
    return stack


def _new(options: argparse.Namespace, *, tied: bool) -> Stack:
    """A stack with the store and ports asked for; else with those of the one that was up when the machine went down."""
    before = Stack.recorded(options.work)
    if before is None or before.tied:
        before = Stack(options.work, str(options.work / "store"), DEFAULT_PORT)
    port, files_port = options.port or before.port, before.files_port
    if tied:
        port = port if options.port or is_free(port) else free_port()
        files_port = 0  # no link outlives a demo
    return Stack(options.work, options.store or before.store, port, tied, files_port=files_port)


def _submit(stack: Stack, arguments: list[str]) -> str:
    done = stack.prefect("deployment", "run", "vc2/full-pipeline", *arguments)
    found = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
    if done.returncode or not found:
        said = " ".join((done.stdout + done.stderr).split()).partition("Error creating flow run: ")
        raise StackError(said[2] or said[0] or "prefect deployment run failed without a word")
    return found[1]


def _places(stack: Stack) -> Iterator[str]:
    """Where to look."""
    yield f"Prefect  {stack.url}"
    yield f"store    {stack.store}"
    if stack.files_url:
        yield f"files    {stack.files_url}"
    yield f"logs     {stack.log('server').parent}"


def _check(stack: Stack) -> None:
    if name := stack.ended():
        what = "file server" if name == "files" else f"Prefect {name}"
        raise StackError(f"the {what} ended (log: {stack.log(name)}); run it again, it goes on from there")


def _cancel(stack: Stack, run: str, patience: float = 30.0) -> None:
    _say("stopping the run; what it did is kept")
    try:
        stack.api.cancel(run)
        until = time.monotonic() + patience
        while time.monotonic() < until and stack.api.get(f"/flow_runs/{run}")["state_type"] not in FINAL:
            time.sleep(0.5)
    except StackError:
        return


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description="Prefect server and worker of vc2.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--work", type=_folder, default=os.environ.get("VC2_WORK") or str(ROOT / "work"), help="work folder (VC2_WORK)"
    )
    common.add_argument(
        "--store", type=_store, default=os.environ.get("VC2_STORE") or None, help="store (VC2_STORE; WORK/store)"
    )
    common.add_argument(
        "--port",
        type=int,
        default=os.environ.get("VC2_PORT") or None,
        help=f"port of the server (VC2_PORT; {DEFAULT_PORT})",
    )
    commands = parser.add_subparsers(required=True, metavar="up|down|status|serve|demo")
    for command in (up, down, status, serve, demo):
        sub = commands.add_parser(command.__name__, parents=[common])
        sub.set_defaults(command=command)
        if command is demo:
            sub.add_argument("arguments", nargs="*", help="passed on: -- -p recipe=miniature -p stop_after=train/full")
    return parser


def _folder(text: str) -> Path:
    return Path(text).expanduser().resolve()


def _store(text: str) -> str:
    return text if "://" in text else str(_folder(text))


if __name__ == "__main__":
    sys.exit(main())
