"""Fine-tune a causal language model with a Bayesian low-rank adapter and evaluate its predictions.

    python train_script.py KEY=VALUE ... > logs/run.log 2>&1
    torchrun --nproc-per-node=4 train_script.py KEY=VALUE ... > logs/run.log 2>&1

main -> prepare -> train -> finish (``pipeline``). A *run* owns everything that lives as long as training does; a
*sample* is drawn by ``method.sample`` once per forward pass and lives until its context ends.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.claim import withdraw
from pipeline.evaluation import finish
from pipeline.run import CONFIGS, Run, prepare
from pipeline.training import train
from utils.distributed import started_several
from utils.run import METRICS_FILE, environment_record, write_json_atomic, write_text_atomic
from utils.settings import key_of, misread, one_line, unread

logger = logging.getLogger("train")

DEBUG = os.environ.get("HYDRA_FULL_ERROR") == "1"  # tracebacks instead of one line
NO_FOLDER = "hydra.run.dir=."
"""Hydra makes no folder with this. The run's is named by the time, which is another in every process."""
MADE = ("paths.output_dir", "paths.cache_dir", "hydra.sweep.dir", "search.storage")
"""Folders and files that a command makes where there are none."""
USER_ERRORS = (
    *(ValueError, OSError, RuntimeError, MemoryError, FloatingPointError),
    *(OmegaConfBaseException, HydraException),
)


def execute(cfg: DictConfig, command: Sequence[str] | None = None) -> Run:
    """Prepare, train and finish one run; its folder keeps the arguments of the command that made it, if given."""
    run = prepare(cfg)
    watch_interrupts(run)
    if run.world.main:
        OmegaConf.save(cfg, run.folder / "config.yaml", resolve=True)
        if command is not None:
            keep_command(run.folder, command)
        write_json_atomic(run.folder / "environment.json", environment_record())
    try:
        step = train(run)
    finally:  # the handler holds the run: a process that goes on after an error would keep it in memory
        signal.signal(signal.SIGINT, signal.default_int_handler)
    finish(run, step)
    run.world.close()
    return run


def keep_command(folder: Path, arguments: Sequence[str]) -> None:
    """Write the arguments to where Hydra itself would, before the folder is known to be the command's."""
    write_text_atomic(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(arguments)))


def watch_interrupts(run: Run) -> None:
    """Ctrl-C lets the step in progress end and writes a checkpoint; a second one stops at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.interrupted = True

    signal.signal(signal.SIGINT, stop)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point: one clear line and a non-zero exit code for anything a user can put right."""
    made = HydraConfig.get() if HydraConfig.initialized() else None
    if made is not None and made.mode is RunMode.MULTIRUN:
        logger.info("job in %s: %s", cfg.paths.output_dir, " ".join(made.overrides.task))
        if cfg.resume and not (Path(cfg.paths.output_dir) / METRICS_FILE).exists():
            cfg.resume = False  # a sweep that goes on comes to jobs that had not begun
    command = list(made.overrides.task) if made else None
    given = {key_of(argument): argument for argument in command or ()}
    if vain := unread(cfg, given):
        logger.warning("method=%s does not read %s", cfg.method.name, " ".join(given[key] for key in vain))
    try:
        execute(cfg, command)
    except KeyboardInterrupt as stop:
        remedy = f"; go on with the same command and resume=true paths.output_dir={cfg.paths.output_dir}"
        resumable = (Path(cfg.paths.output_dir) / "checkpoint").exists()
        sys.exit(f"interrupted: {str(stop) or 'stopped at once'}{remedy if resumable else ''}")
    except USER_ERRORS as error:
        if DEBUG:
            raise
        refuse(error)


def refuse(error: BaseException) -> NoReturn:
    """Exit with an error in one line; a folder that Hydra has made for a run that did not begin goes."""
    withdraw(Path(HydraConfig.get().runtime.output_dir))
    sys.exit(one_line(error, CONFIGS))


def check_folders(arguments: Sequence[str]) -> None:
    """Raise ValueError where Hydra would make or take another folder than what is meant, before it does.

    That is for a sweep all of whose jobs would have one folder, each writing over the one before; for folders of
    Hydra's own beside the run's; and for one that begins with ``~``, which would be named so.
    """
    given = {key_of(argument): argument.partition("=")[2].strip("'\"") for argument in arguments}
    if given.get("hydra.run.dir", ".") != ".":
        raise ValueError(f"hydra.run.dir={given['hydra.run.dir']} is not where the run would be: set paths.output_dir")
    if given.get("hydra.job.chdir", "false").lower() != "false":
        raise ValueError("hydra.job.chdir would put the run's folder into itself: leave it out")
    if home := [key for key in MADE if given.get(key, "").startswith("~")]:
        raise ValueError(f"{home[0]}={given[home[0]]} would be a folder named ~: write the whole path")
    folder = next((a for a in arguments if key_of(a) == "paths.output_dir" and not {",", "$"} & set(a)), None)
    if folder is not None and {"-m", "--multirun"} & set(arguments):
        raise ValueError(f"{folder} would be the folder of every job of the sweep: set hydra.sweep.dir instead")


def launch(application: Callable[[], None]) -> None:
    """Start a Hydra application; mistakes on the command line, errors of a sweep and Ctrl-C end in one line too.

    Of several processes with one run, only the main one has a folder made.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if started_several() and os.environ.get("RANK", "0") != "0":
        sys.argv.append(NO_FOLDER)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    try:
        check_folders(sys.argv[1:])
        application()
    except KeyboardInterrupt:
        sys.exit("interrupted: runs that have ended are kept")
    except USER_ERRORS as error:
        if DEBUG:
            raise
        misreading = misread(sys.argv[1:]) if isinstance(error, OverrideParseException) else None
        sys.exit(misreading or one_line(error, CONFIGS))


if __name__ == "__main__":
    launch(main)
