"""Runs notebooks, each in a process of its own, which forks from one that has torch already.

A Jupyter kernel for each takes seconds to start; this takes none. What cells show is drawn, and
kept, as a kernel would.
"""
import os
import sys
import traceback
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from interpreter import interpreted, quick

PRELOADED = [
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "numpy", "pandas", "sklearn.datasets",
    "IPython", "execnb.shell", "matplotlib.pyplot", "transformers.modeling_utils", "diffusers"]


def _run(path: Path, folder: Path, first: str) -> list[dict]:
    "The outputs of all cells."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    os.chdir(folder)
    sys.path.append(str(path.parent))  # what lies beside a notebook is found, as in Jupyter
    shell, outputs = CaptureShell(), []
    code = [cell.source for cell in read_nb(path).cells if cell.cell_type == "code"]
    for source in (first, *code):
        outputs += shell.run(source)
        if shell.exc is None: continue
        said = "".join(traceback.format_exception(shell.exc))
        raise RuntimeError(f"{path.name}:\n\n{source}\n\n{said}")
    return outputs


def _send(connection: Connection, *arguments):
    try:
        with quick() if interpreted() else nullcontext():
            connection.send((_run(*arguments), ""))
    except BaseException as error: connection.send((None, str(error)))


def run_notebook(
    path: Path,
    folder: Path, # to run in
    first: str = "", # code to run before its cells
    seconds: float = 300, # that it may take
) -> list[dict]: # outputs, as a notebook holds them
    "Runs all cells; fails where one does."
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, path, folder, first))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds): pytest.fail(f"{path.name} takes over {seconds} s")
        try: outputs, error = receiver.recv()
        except EOFError: pytest.fail(f"{path.name} ends its process")
    finally:
        process.join(1)
        process.kill()
        process.join()
    if error: pytest.fail(error, pytrace=False)
    return outputs


def said(outputs: list[dict], *kinds: str) -> list[str]:
    "Their text: of the first of these kinds that there is, or what was printed."
    found = []
    for out in outputs:
        data = out.get("data", {})
        text = next((data[kind] for kind in kinds if kind in data), out.get("text", ""))
        if text: found.append("".join(text))
    return found
