"""Coverage-guided fuzzing of the same targets, by hand: atheris is no dependency of the project.

    python3 -m venv fuzz-venv
    fuzz-venv/bin/pip install -r requirements/dev.txt atheris
    PYTHONPATH=.:bridge:plugins fuzz-venv/bin/python tests/fuzz/atheris_targets.py TARGET [CORPUS] [-max_total_time=600]

TARGET is a name in `targets.py`. What libFuzzer takes may follow; an input that breaks the contract is written to
`crash-*` and shown with its traceback.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["mq2mqtt", "mq2mqtt_amqtt", "amqtt.mqtt", "yaml"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz one target until libFuzzer ends."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} TARGET [LIBFUZZER ARGUMENTS]; targets: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate(target.seeds):
            (Path(seeds) / str(number)).write_bytes(seed)
        arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        own_corpus = arguments or [tempfile.mkdtemp()]
        options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        atheris.Setup([sys.argv[0], *options, *own_corpus, seeds], target.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
