"""Entry of a script's ranks: ``torchrun … -m launcher.train.script -- my_train.py --its --flags``.

The script runs as ``python my_train.py`` would run it. Before that its torchft gets what the
trainer of this kit has: structured events, a name by which the group is known, ranks that wait.
"""

import ast
import contextlib
import importlib
import importlib.util
import os
import runpy
import sys
import sysconfig
from collections.abc import Iterator

from launcher.train import rank


def load(waits: bool) -> None:
    from launcher.train import device

    kind = os.environ.get("TFT_DEVICE", "cuda")
    device.require(kind)
    if kind == "cpu":  # scripts take a GPU where they see one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import launcher.train.manager  # noqa: F401

    script = _words()[0]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    if waits:
        with contextlib.suppress(ImportError):
            importlib.import_module("torch._dynamo")  # every optimizer does, when it is made
        for statement in installed_imports(script):
            with contextlib.suppress(Exception, SystemExit):  # the script will say it better
                exec(compile(ast.Module([statement], []), script, "exec"), {})  # noqa: S102


def installed_imports(script: str) -> Iterator[ast.stmt]:
    """A script's imports at its top level that are of installed packages.

    Not its own modules: one that looks at the environment while it is imported would see that of a
    rank which is no replica group yet.
    """
    try:
        with open(script, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_installed(alias.name):
                    yield ast.copy_location(ast.Import([alias]), node)
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and _is_installed(str(node.module))
        ):
            yield node


def _is_installed(name: str) -> bool:
    top = name.partition(".")[0]
    if top == "launcher":
        return True
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
        places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
        return spec is not None and (spec.origin or "").startswith(places)
    return False


def _words() -> list[str]:
    """The script and its arguments; torchrun's parser is kept off them by ``--``."""
    words = sys.argv[1:]
    return words[1:] if words[:1] == ["--"] else words


def run(begun: float) -> None:
    """Run the script, as ``__main__``; what it raises is raised."""
    from launcher.train import manager
    from launcher.train.recorder import Recorder

    recorder = Recorder.from_environment()
    recorder.attach_to_torchft()
    manager.adapt(recorder)
    recorder.record("start", pid=os.getpid(), begun=round(begun, 3))
    sys.argv = _words()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    recorder.record("end", code=0)


def main() -> None:
    begun = rank.begin(load)

    from torch.distributed.elastic.multiprocessing.errors import record

    record(run)(begun)  # torchrun tells the exception's text, which the launcher decides by


if __name__ == "__main__":
    main()
