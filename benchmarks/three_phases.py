"""The demo's comparison on other text: seed, branches, mixtures and dense baselines, data-matched.

    python benchmarks/three_phases.py CORPORA OUT [--seed N]

CORPORA holds NAME.train.jsonl and NAME.valid.jsonl (or .jsonl.gz) for general, code, law and math. Code may be left
out: then it is this Python's standard library, top-level modules, every twelfth held out. OUT gets results.md,
results.json, training.png and every model; the same command goes on with an interrupted run.
"""

import argparse
import json
import shutil
import sysconfig
from pathlib import Path

from bamoe.experiments.demo import DemoSettings, run_demo


def gather(corpora: Path, folder: Path) -> Path:
    """A folder with all four domains."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(corpora.glob("*.jsonl*")):
        shutil.copyfile(path, folder / path.name)
    if not any(folder.glob("code.train.*")):
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        for part, chosen in (
            ("valid", modules[::12]),
            ("train", [m for i, m in enumerate(modules) if i % 12]),
        ):
            texts = [module.read_text(encoding="utf-8", errors="replace") for module in chosen]
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts if text)
            (folder / f"code.{part}.jsonl").write_text(rows, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = gather(arguments.corpora, arguments.out.with_name(arguments.out.name + "-text"))
    run_demo(
        arguments.out,
        DemoSettings(seed=arguments.seed),
        corpora=text,
        listener=lambda event, step, seconds: print(f"{event} {step.name} {seconds:.0f} s", flush=True),
    )
    print((arguments.out / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
