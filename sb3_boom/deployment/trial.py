"""
Run an exported file in a process of its own first.

onnxruntime takes files for well meant: a graph that was made to hurt can end the whole process, which no ``except`` sees. So
it meets a file in a process that may end, within limits of memory and time.
"""

import json
import os
import subprocess
import sys

SECONDS = 120.0
MEMORY = 2**32  # bytes, beside eight times the file's
REFUSED = 3  # exit status
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sb3_boom.deployment import trial; trial.main()"


def run(content: bytes) -> str | None:
    """
    :param content: of an exported file
    :return: why it can't be loaded; None if it can
    """
    if not sys.executable:
        return "there is no Python to try it with: pass check=False to Agent.load if the file is your own"
    command = [sys.executable, "-c", PROGRAM, json.dumps([os.path.abspath(path) for path in sys.path])]
    try:
        result = subprocess.run(
            command, input=content, capture_output=True, timeout=SECONDS, check=False, cwd=os.path.dirname(sys.executable)
        )
    except subprocess.TimeoutExpired:
        return f"it does not run within {SECONDS:.0f} seconds"
    if result.returncode == 0:
        return None
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    if result.returncode == REFUSED and lines:
        return lines[-1]
    return f"onnxruntime does not survive it (status {result.returncode})"


def main() -> None:
    """What runs in the other process: the file comes through a pipe."""
    content = sys.stdin.buffer.read()
    limit_resources(len(content))
    # a robot's other packages are not needed, except numpy and onnxruntime
    from sb3_boom.deployment import agent, model_file

    try:
        agent.Agent(content, model_file.parse(memoryview(content)))
    except (ValueError, MemoryError, ImportError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        raise SystemExit(REFUSED) from None


def limit_resources(size: int) -> None:
    """
    Bound this process's memory, and write no core, where the system can.

    :param size: bytes of the file
    """
    try:
        import resource
    except ImportError:  # Windows: the bounds of onnxruntime's own memory remain
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 8 * size, MEMORY + 8 * size))
