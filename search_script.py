"""Search configuration keys for the trade-off between accuracy and calibration, by multi-objective optimisation.

    python search_script.py KEY=VALUE ... > logs/search.log 2>&1

Each trial is a run of ``train_script.py`` with other values of the keys in ``search.space``, judged on validation data
only. The same command again goes on with the study; started several times at once, the processes share it. Reads from
top to bottom: main -> search -> run_trial -> write_results -> report -> finals.
"""

import gc
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import hydra
import optuna
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial

from bnn.metrics import evaluate_predictions
from pipeline import evaluation
from pipeline.processes import DEAD_WORKER, processes
from pipeline.run import CONFIGS, prepare, rehearse
from pipeline.training import train
from train_script import DEBUG, USER_ERRORS, execute, keep_command, launch, refuse
from utils.distributed import started_several
from utils.locks import try_lock
from utils.search.analysis import hypervolume_curves, importances
from utils.search.experiment import experiment_of, write_experiment
from utils.search.figures import plot_search
from utils.search.pruning import WatchedLogger, watcher
from utils.search.results import final_test, write_front
from utils.search.sampler import NumberedSampler
from utils.search.selection import Point, pareto_front, select
from utils.search.settings import check_search, training_overrides
from utils.search.space import Space, first_values, overrides_of, read_space, suggest
from utils.search.study import METRICS, REASON, VALUES, Worker, load_compared, open_study, points_of, work
from utils.settings import check, compose, differing, fingerprint, flat, one_line, plain, unread

logger = logging.getLogger("search")


def settings_of(base: Sequence[str], values: dict[str, Any], **own: Any) -> DictConfig:
    """The configuration of one training run: the command line, searched values, and the run's own keys on top."""
    run = {"overwrite": True, "eval.split": "validation"} | own
    return compose(CONFIGS, [*base, *overrides_of(values, CONFIGS), *overrides_of(run, CONFIGS)])


def search(cfg: DictConfig, arguments: Sequence[str]) -> Path:
    """Work on the study until its budget is spent; write its results if nobody else still works on it.

    ``arguments`` is the command line that made ``cfg``: what of it concerns training makes up the trials.
    """
    settings, folder, base = cfg.search, Path(cfg.paths.output_dir), training_overrides(arguments)
    check(cfg)
    check_search(plain(cfg))
    if started_several():
        raise ValueError("search_script.py runs without torchrun: start the same command several times instead")
    space = read_space(plain(settings.space))
    values = first_values(space)  # what no trial could run is found before anything is written
    first = settings_of(base, values)
    rehearse(first)
    if vain := unread(first, values):
        raise ValueError(
            f"search.space has {vain[0]}, which method={first.method.name} does not read: add "
            "~search.space.inducing, or choose another search_space"
        )
    if settings.select.rules:
        experiment_of(CONFIGS, [*base, *overrides_of(values, CONFIGS)])
    compare = load_compared(settings.compare, settings.objectives) if settings.compare else None
    judged = {key: plain(settings)[key] for key in ("space", "objectives", "n_mc", "sampler", "seed")}
    begun = flat(fingerprint(compose(CONFIGS, base)) | {"search": judged | {"final_n_mc": cfg.eval.n_mc}})
    worker = Worker(folder / "workers")
    try:
        sampler = NumberedSampler(settings.sampler, settings.seed, settings.startup_trials, worker.name)
        with worker.alone():
            place = (settings.storage, settings.name, settings.objectives)
            study = open_study(*place, sampler, begun, folder, alone=worker.is_only())
            keep_command(folder, arguments)
        budget = {key: settings[key] for key in ("trials", "seconds", "max_failures")}

        def objective(trial: optuna.Trial) -> list[float]:
            return run_trial(cfg, base, space, study, trial)

        work(study, worker, objective, **budget, failures=USER_ERRORS, say=say)
        others = worker.running_elsewhere(study)
        lock = None if others else try_lock(folder / "workers" / "results")  # by whoever writes, nobody else
        if lock is None:
            logger.info("other processes still work on the study: the last one writes the results")
        else:
            with lock:
                write_results(cfg, base, study, compare)
    finally:
        worker.close()
    return folder


def run_trial(
    cfg: DictConfig, base: Sequence[str], space: Space, study: optuna.Study, trial: optuna.Trial
) -> list[float]:
    """Train with the proposed values; returns the objectives on validation data."""
    values = suggest(trial, space)
    trial.set_user_attr(VALUES, values)
    folder = Path(cfg.paths.output_dir) / "trials" / f"{trial.number:04d}"
    run = prepare(settings_of(base, values, **{"paths.output_dir": str(folder)}))
    try:
        if not run.data.validation:
            raise ValueError(f"dset={run.cfg.dset.name} has no validation data to judge a trial on")
        run.log.close()
        run.log = WatchedLogger(folder, watcher(study, trial, cfg.search.prune.factor, cfg.search.prune.min_trials))
        OmegaConf.save(run.cfg, folder / "config.yaml", resolve=True)
        train(run)
        evaluation.keep_best(run)
        evaluation.fit(run)
        mode = run.method.modes(cfg.search.n_mc)[0]
        metrics = evaluate_predictions(*evaluation.logits_of(run, run.data.validation, mode, "search"))
    finally:
        run.log.close()
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # a trial is not resumed
        del run
        gc.collect()
        torch.cuda.empty_cache()
    found = [metrics[name] for name in cfg.search.objectives]
    if not all(map(math.isfinite, found)):
        raise FloatingPointError(f"objectives {found} are not finite")
    trial.set_user_attr(METRICS, metrics)
    return found


def say(trial: FrozenTrial, reason: str) -> None:
    """One line per finished trial."""
    metrics = trial.user_attrs.get(METRICS, {})
    shown = " | ".join(f"{name.upper()}={metrics[name]:.4f}" for name in ("nll", "acc", "ece", "brier") if metrics)
    values = " ".join(f"{key}={value}" for key, value in trial.user_attrs.get(VALUES, {}).items())
    told = " ".join(values.split())  # a text may have several lines
    logger.info("[TRIAL %d] %s: %s (%s)", trial.number, trial.state.name.lower(), shown or reason, told)


def write_results(cfg: DictConfig, base: Sequence[str], study: optuna.Study, compare: optuna.Study | None) -> None:
    """``report``, and once more where a trial of another process has ended in the meantime."""
    reported = None
    while reported != (known := len(points_of(study))):
        report(cfg, base, study, compare)
        reported = known


def report(cfg: DictConfig, base: Sequence[str], study: optuna.Study, compare: optuna.Study | None) -> None:
    """Front, selected configurations and figures; with ``search.final_seeds`` also their test values."""
    settings, folder, points = cfg.search, Path(cfg.paths.output_dir), points_of(study)
    if not points:
        failed = [t.user_attrs[REASON] for t in study.get_trials(deepcopy=False) if REASON in t.user_attrs]
        remedy = f"the last ended with: {failed[-1]}" if failed else "raise search.trials"
        raise ValueError(f"study {study.study_name} has no complete trial to select from: {remedy}")
    front = pareto_front(points, settings.objectives)
    selected = select(front, settings.select.rules, settings.objectives, settings.select.acc_within)
    for rule, point in selected.items():
        told = ", ".join(f"{name} {point.metrics[name]:.4f}" for name in ("nll", "acc", "ece", "brier"))
        comment = f"Trial {point.number} of the search {settings.name}, chosen by {rule}; validation: {told}."
        overrides = [*base, *overrides_of(point.values, CONFIGS)]
        write_experiment(folder / "selected" / f"{rule}.yaml", CONFIGS, overrides, comment)
    again = front if settings.final_points == "front" else {p.number: p for p in selected.values()}.values()
    tests = finals(cfg, base, list(again)) if settings.final_seeds else {}
    write_front(folder, front, selected, tests)
    studies = {study.study_name: study}
    if compare:
        studies[compare.study_name + " (compared)" * (compare.study_name in studies)] = compare
    volumes = hypervolume_curves(studies, settings.objectives, settings.reference)
    shares = importances(study, settings.objectives)
    plot_search(folder, points, front, selected, tests, volumes, shares, settings.objectives)
    logger.info("search folder: %s (%d of %d trials on the front)", folder, len(front), len(points))


def finals(cfg: DictConfig, base: Sequence[str], points: Sequence[Point]) -> dict[int, list[dict[str, float]]]:
    """Test metrics of the points trained with each fresh seed; a run that has finished is read, not repeated.

    A run that fails is reported, and the other seeds stand for the point.

    Raises:
        ValueError: for a folder that holds a run with other settings.
        RuntimeError: if one of the processes that share the runs dies.
    """
    place, seeds, at_once = Path(cfg.paths.output_dir) / "final", cfg.search.final_seeds, cfg.search.final_jobs
    folders = {p.number: [place / f"trial{p.number:04d}_seed{seed}" for seed in seeds] for p in points}
    asked = [
        (folder, settings_of(base, point.values, seed=seed, **{"paths.output_dir": str(folder)}))
        for point in points
        for seed, folder in zip(seeds, folders[point.number], strict=True)
    ]
    for folder, settings in asked:
        made = folder / "config.yaml"
        if made.is_file() and (others := differing(fingerprint(OmegaConf.load(made)), fingerprint(settings))):  # type: ignore[arg-type]
            remedy = "choose another paths.output_dir, or move it away"
            raise ValueError(f"{folder} holds a run of another search ({', '.join(others)}): {remedy}")
    missing = [settings for folder, settings in asked if final_test(folder) is None]
    if at_once == 1:
        failures = [final(settings) for settings in missing]
    else:
        try:
            with processes(at_once) as pool:
                failures = list(pool.map(final, missing))
        except BrokenExecutor as error:
            remedy = f"lower search.final_jobs={at_once}, and the same command goes on"
            raise RuntimeError(f"{DEAD_WORKER}: {remedy}") from error
    for settings, failure in zip(missing, failures, strict=True):
        if failure:
            logger.warning("[FINAL RUN] %s failed: %s", settings.paths.output_dir, failure)
    return {number: [tested for f in own if (tested := final_test(f))] for number, own in folders.items()}


def final(cfg: DictConfig) -> str | None:
    """One run to its end, as the training script makes it; returns what went wrong, if anything."""
    try:
        execute(cfg)
    except USER_ERRORS as error:
        return one_line(error, CONFIGS)
    return None


@hydra.main(version_base="1.3", config_path="configs", config_name="search")
def main(cfg: DictConfig) -> None:
    """Entry point: one clear line and a non-zero exit code for anything a user can put right."""
    GlobalHydra.instance().clear()  # trials compose configurations of their own
    try:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise ValueError("a search is one command: leave out -m, and give each a paths.output_dir of its own")
        search(cfg, HydraConfig.get().overrides.task)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished trials are kept; go on with the same command")
    except (*USER_ERRORS, optuna.exceptions.OptunaError) as error:
        if DEBUG:
            raise
        refuse(error)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    launch(main)
