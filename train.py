"""Train a character-level GPT, dense or Mixture of Experts.

    python train.py config/shakespeare_moe4.py                  at the papers' size, on a GPU
    python train.py config/shakespeare_moe4.py config/cpu.py    the same at CPU size
    python train.py config/shakespeare_dense.py --n_layer=4 --seed=2
    torchrun --nproc_per_node=4 train.py config/shakespeare_moe4.py    by four processes, a GPU each
    python train.py --help                                      every key

A run lives in its out_dir: config.json, metrics.jsonl (a line a log or evaluation), ckpt.pt (the last state), best.pt
(the weights with the best validation loss), and summary.json once it is complete. Ctrl-C saves; the same command with
--init_from=resume goes on (--init_from=auto: where there is something to go on with), and --init_from=out/other begins
with the best weights of another run. Exit codes: 0 done, 2 an invalid request, 3 loss or gradient not finite, 4 another
process of the run ended, 128 + n stopped by signal n (130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP).
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
import uuid

import torch

from model import GPT
from run import accounting, evaluate, progress, records, screen_report, straight
from run.dataset import open_dataset, prepare
from run.identity import Identity
from run.processes import Processes, is_lost_connection
from run.run_folder import RunFolder, check_resumable, difference
from run.saving import Saver, saves_in_background
from run.settings import Config
from run.start import open_start, vocabulary_of
from run.state import TrainingState, checkpoint_of, identity_of, own_part, restore
from run.totals import RunningTotals
from run.update import NotFinite, Updater, set_random_state, without_side_effects
from support import compile_cache, configurator, console, machines, triton_here
from support.options import ConfigError
from support.seeds import mix_seeds

SAVE = 1  # see Run.pending_action


def main(argv):
    usage = "python train.py [config files] [--key=value …]"
    config = configurator.parse(Config, argv, usage=usage, description=__doc__)
    processes = Processes.from_environment()
    processes.check(config)
    with contextlib.ExitStack() as stack:
        stdout = sys.stdout if processes.is_first else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(console.IgnoreClosedPipe(stdout)))
        number = processes.local_rank if processes.world_size > 1 else None
        machine = machines.choose(config.device, config.dtype, config.compile, number, config.capture)
        machines.keep_freed_memory()
        processes.join(machine.device)
        try:
            code = train(config, argv, machine, processes)
        except NotFinite as error:
            code = console.NOT_FINITE
            if processes.is_first:
                print(progress.not_finite_text(error, config, __file__, argv, processes), file=sys.stderr)
        except RuntimeError as error:
            if processes.world_size == 1 or not is_lost_connection(error):
                raise
            command = progress.resume_command(__file__, argv, processes)
            text = progress.lost_process_text(error, config, processes, command)
            raise console.Failure(text, console.PROCESS_LOST) from error
        processes.leave()
        return code


def train(config, argv, machine, processes):
    """Make a run, or the rest of it. -> the exit code"""
    # The run's folder, and the checkpoint to resume from.
    folder = RunFolder(config)
    saved = folder.open()
    start = open_start(config, folder, saved)
    saved = None if config.eval_only else saved
    config = dataclasses.replace(config, init_from="resume" if saved else "scratch")
    for line in (machine.reason, folder.note, progress.overridden_cpu_size(__file__, argv)):
        if line:
            print(line)

    # The text.
    if processes.is_first:
        prepare(config, print)
    processes.barrier()
    dataset = open_dataset(config, machine.device, vocabulary_of(start, saved))
    changed = check_resumable(saved, config, dataset, folder.has_diverged) if saved else []
    if saved and saved["progress"]["step"] == config.max_iters and (folder / "summary.json").exists():
        print(f"{folder} is complete: there is nothing to resume. A larger max_iters extends it, but its record then")
        print("usually enters no mean. For a longer run that counts, choose another --out_dir.")
        record = records.read(folder / "summary.json", way_out="delete it, and the same command makes it again")
        print(screen_report.final_report(record, folder))
        return 0

    # Model, optimiser and counters: new, or as the checkpoint has them.
    torch.manual_seed(config.seed)
    model = GPT(config, dataset.vocabulary.size, dataset.symbol_counts("train")).to(machine.device)
    if config.routing_kernels:
        from speed import fused_routing  # not else: a run's code is what it imports

        if reason := fused_routing.use_kernels(model, machine):
            print(f"routing_kernels=True has no effect: {reason}")
    updater = Updater(model, config, machine, processes)
    if config.fused_update and not updater.fused:
        print(f"fused_update=True has no effect: {triton_here.obstacle_to_training(machine.device)}")
    state, totals, random = TrainingState(machines.git_state()), RunningTotals(), None
    if start:
        start.load_into(model, config)
        state.start = start.about
    if not processes.is_first:  # the same weights, but dropout and noise of its own
        torch.manual_seed(mix_seeds(config.seed, processes.rank))
    if saved:
        state = restore(saved, model, updater.optimizer, state.git)
        totals, random = own_part(saved, config, processes, machine.device)
    restored = time.perf_counter()
    started = restored - state.seconds["total"]
    other_load = machines.OtherLoad(machine, state.others)
    processes.check_agreement(
        {"step": state.step, "symbols": dataset.vocabulary.size, "characters": dataset.sizes["train"]}
    )
    counts = accounting.count_parameters(model)
    print(
        f"{dataset.name}: {dataset.sizes['train']:,} {dataset.unit}s to train on, {dataset.vocabulary.size} symbols; "
        f"{counts['total']:,} parameters, {counts['active']:,} active per {dataset.unit}"
    )
    rows = config.sequences_per_update
    first_batch = dataset.batch("train", config.seed, 0, rows, config.block_size)
    with compile_cache.reused(config.compile_cache if machine.compile else "", machine, config.hash(), print):
        attempts = updater.make_ready(*first_batch, None if config.eval_only else totals)
    for key, attempt in attempts.items():
        state.seconds["compile"] += attempt.seconds
        if attempt.failure and getattr(config, key) is True:
            raise ConfigError([f"--{key}=True, but it failed: {attempt.failure}", f"--{key}=auto goes on without it"])
        if attempt.failure:
            print(f"this run goes on without {key}, which failed: {attempt.failure}")
    machine = updater.machine
    if config.eval_only:
        print(progress.weights_text(start, dataset))
        line = evaluate.evaluation(updater.eval_model, dataset, config, machine, start.step if start else 0)
        print(progress.evaluation_text(line, config))
        print(f"sampled validation: {line['paper']['val']:.4f} nats on {config.eval_iters} random batches")
        return 0
    here = {**machines.describe(machine), "processes": processes.world_size}
    here |= {"kernels": updater.kernels} if updater.kernels else {}
    there = state.machine if state.resumed else here
    if there != here:
        other_load.before = machines.UNKNOWN_LOAD
        print(f"resumed on another machine ({difference(there, here)}): its times will not count")
    if saved:
        state.stretches = state.stretches + straight.new_stretch(saved, changed, config, here)
    state.machine = here
    is_straight = straight.is_straight(config, vars(state))
    kind_of_machine = records.machine_of({"machine": here, "config": config.to_dict()})
    identity = Identity(config, dataset.source_sha256, kind_of_machine, is_straight)

    with folder.writable(identity, saved) if processes.is_first else contextlib.nullcontext() as metrics:
        if processes.is_first:
            if config.wandb_log:
                state.wandb_id = state.wandb_id or uuid.uuid4().hex
            metrics.mirror = progress.start_wandb(config, state.wandb_id, print)
            for line in progress.opening_lines(folder, saved, state, changed, start, is_straight):
                print(line)
        slow_hint = progress.cpu_size_hint(__file__, argv) if machine.device.type == "cpu" else None
        screen = progress.Screen(config, state.step, processes.is_first, print, slow_hint)
        run = Run(argv, dataset, updater, state, totals, folder, metrics, screen, started, other_load)
        if saved:
            run.best = saved["best"]
        if random:
            set_random_state(random)
        totals.exclude(time.perf_counter() - restored)

        with screen, console.StopSignals() as signals, run.saver:
            while True:
                step = state.step  # updates made so far
                model.set_step(step)
                action = processes.all_reduce_max(run.pending_action(signals))

                # Once in a while: evaluate, unless a signal came.
                is_due = step % config.eval_interval == 0 or step >= config.max_iters
                if is_due and state.evaluated < step and action <= SAVE:
                    run.evaluate(signals)
                    continue

                # Once in a while: save, or save and stop.
                if action:
                    updater.guard.raise_if_skipped()
                    run.save()
                if action > SAVE:
                    return run.stop(action - SAVE)

                # Once in a while: keep the weights, for analyze.py.
                if config.save_every and (step % config.save_every == 0 or step >= config.max_iters):
                    run.save_snapshot()

                if step >= config.max_iters:
                    return run.finish(signals)

                # Forward and backward, clipping, optimiser, balancing. A batch depends on the seed and the step alone.
                x, y = dataset.batch("train", config.seed, step, rows, config.block_size)
                update = updater.update(step, x, y, run.totals)
                state.step = step = step + 1
                screen.bar.update()

                # Once in a while: log what the device has summed up.
                if step % config.log_interval == 0 or step % config.eval_interval == 0 or step == config.max_iters:
                    updater.guard.raise_if_skipped()
                    run.log(update)


# ---------------------------------------------------------------------------------------------------------------------
# Once in a while


class Run:
    """Evaluation, logging, saving and stopping of one process.

    All processes evaluate, save and stop together. Only the first one writes: elsewhere `metrics` is None.
    started: the perf_counter at which the run would have started without interruption; other_load: a
    machines.OtherLoad; best: {"step", "model"}, the weights with the best validation loss.
    """

    def __init__(self, argv, dataset, updater, state, totals, folder, metrics, screen, started, other_load):
        self.argv, self.dataset, self.updater, self.state, self.totals = argv, dataset, updater, state, totals
        self.folder, self.metrics, self.screen = folder, metrics, screen
        self.started, self.other_load = started, other_load
        self.config, self.model, self.machine = updater.config, updater.model, updater.machine
        self.processes, self.is_alone = updater.processes, updater.processes.world_size == 1
        self.best, self.last_save = None, time.monotonic()
        is_background = self.processes.is_first and saves_in_background(self.config, self.machine.device)
        self.saver = Saver(is_background, self.machine.device)

    def pending_action(self, signals):
        """What this process wants before the next update: 0 nothing, SAVE, or SAVE + the number of a stop signal."""
        if signals.caught:
            return SAVE + signals.caught[0]
        minutes = (time.monotonic() - self.last_save) / 60
        return SAVE if self.processes.is_first and 0 < self.config.save_minutes < minutes else 0

    def log(self, update):
        """Write and show the running totals, and begin new ones. update: the last one; None when resuming
        between two log lines."""
        config, state, totals = self.config, self.state, self.totals
        line = {
            "kind": "train",
            "step": state.step,
            "learning_rate": update.learning_rate if update else None,
            "gradient_norm": update.gradient_norm.item() if update else None,
            **totals.line(config.sequences_per_update * config.block_size, self.processes),
        }
        state.seconds["train"] += line["step_ms"] * totals.steps / 1000
        state.step_ms.append(line["step_ms"])
        state.train_mode.append([totals.steps, line["loss"], line["objective"]])
        self.write(line)
        self.screen.log(state.step, line)
        self.totals.restart()
        if self.saver.has_failed:
            with self.saving_on_failure():
                self.saver.finish()

    def write(self, line):
        if self.metrics:
            self.metrics.write(line)

    def evaluate(self, signals):
        """Measure the validation loss, keep the best weights, and save. A signal stops it; a resumed run repeats it."""
        config, state = self.config, self.state
        if self.totals.steps:  # resumed between two log lines, with another eval_interval or max_iters
            self.log(None)
        if not self.is_alone:  # a shared evaluation cannot be cut short, and a launcher may not wait for its end
            self.save()
        self.screen.doing("evaluating")
        started = time.perf_counter()
        work = (self.updater.eval_model, self.dataset, config, self.machine, state.step, self.processes)
        with self.saving_on_failure():
            line = signals.unless_stopped(lambda: evaluate.evaluation(*work), at_once=self.is_alone)
        if line is None:
            return
        state.seconds["eval"] += time.perf_counter() - started
        line |= {"train_mode": state.take_train_mode(), "train_seconds": state.seconds["train"]}
        nats = line["clean"]["nats"]
        if not math.isfinite(nats):
            if self.metrics and not self.is_alone and not self.saver.wait():
                self.folder.undo_save()
            raise NotFinite(f"the validation loss at step {state.step:,}")
        is_best = all(nats < past["clean"]["nats"] for past in state.evaluations)
        for past in state.evaluations:
            past.pop("routing", None)  # metrics.jsonl has it
        state.evaluations.append(line)
        self.write(line)
        self.totals.restart()
        self.save(is_best)
        self.screen.say(progress.evaluation_text(line, config, is_best))
        for warning in progress.collapse_warnings(state.evaluations, config):
            self.screen.say(warning)

    @contextlib.contextmanager
    def saving_on_failure(self):
        """A failure inside, as for want of memory, costs no update: the run is saved before the error goes on. Several
        processes save together, which they can only do beforehand."""
        try:
            yield
        except Exception:
            if self.is_alone:
                self.updater.guard.raise_if_skipped()
                self.save()
                self.saver.finish()
                self.screen.say(f"\nfailed after step {self.state.step:,}; saved. {self.how_to_go_on()}")
            raise

    @contextlib.contextmanager
    def clock_of_saving(self):
        """Time inside counts as saving, and not as training."""
        self.machine.synchronize()  # else it would hold the time of updates that the device has yet to make
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.state.seconds["save"] += seconds
        self.totals.exclude(seconds)

    def save(self, is_best=False):
        """Write ckpt.pt; is_best: and best.pt, with the weights of this step. See saving.py for what may go on
        meanwhile. If the save before has failed, its failure is raised when this one is over."""
        state = self.state
        with self.clock_of_saving():
            failure = self.saver.wait()
            state.seconds["total"] = time.perf_counter() - self.started
            state.others = self.other_load.so_far()
            if self.metrics:
                state.metrics_bytes = self.metrics.length
            parts = (self.model, self.updater.optimizer, state, self.best, self.totals)
            content = checkpoint_of(self.config, self.dataset, *parts, self.processes)
            content = self.saver.frozen(content, is_best)
            self.best = content["best"]
            if self.processes.is_first:
                self.saver.start(self.folder.save, content, is_best)
            self.last_save = time.monotonic()
        if failure:
            self.saver.finish()
            raise failure

    def save_snapshot(self):
        """Keep the weights of this step in snapshots/."""
        with self.saving_on_failure(), self.clock_of_saving():
            if self.processes.is_first:
                self.saver.finish()
                weights = {"step": self.state.step, "model": self.saver.frozen_weights(self.model.state_dict())}
                self.saver.start(self.folder.save_snapshot, identity_of(self.config, self.dataset), weights)

    def stop(self, number):
        """Say that the run is saved, and how it goes on. number: of the signal. -> the exit code"""
        self.saver.finish()
        self.processes.barrier()  # a launcher may end all when the first of them has ended
        name = signal.Signals(number).name
        self.screen.say(f"\nstopped by {name} after step {self.state.step:,}; saved. {self.how_to_go_on()}")
        return 128 + number

    def how_to_go_on(self):
        return f"To go on:\n  {progress.resume_command(__file__, self.argv, self.processes)}"

    def finish(self, signals):
        """The test loss, the sampling speed, and the record. -> the exit code"""
        state, processes, test, writing = self.state, self.processes, None, None
        if "test" in self.dataset.sizes:
            self.screen.doing("reading the test split")
            test = signals.unless_stopped(self.test_loss_of_best, at_once=self.is_alone)
        with self.clock_of_saving():
            self.saver.finish()
        state.seconds["total"] = time.perf_counter() - self.started
        state.others = self.other_load.so_far()
        if processes.is_first and not signals.caught:
            if self.config.inference_samples:
                self.screen.say("measuring the sampling speed without a cache (--inference_samples=0 skips this)")
            writing = signals.unless_stopped(self.measure_sampling_speed)
        action = processes.all_reduce_max(self.pending_action(signals))
        if action > SAVE:
            self.save()
            return self.stop(action - SAVE)
        if processes.is_first:
            peak_memory = machines.peak_memory(self.machine)
            is_straight = straight.is_straight(self.config, vars(state))
            measured = (test, writing, peak_memory)
            record = records.record_of(self.config, self.dataset, self.model, state, is_straight, *measured)
            self.folder.complete(record)
            self.screen.bar.close()
            self.screen.say(screen_report.final_report(record, self.folder))
        return 0

    def test_loss_of_best(self):
        """Full validation on the test split, of the best weights."""
        with without_side_effects(self.model):  # initial weights, drawn and thrown away
            best = GPT(self.config, self.dataset.vocabulary.size).to(self.machine.device)
        best.load_state_dict(self.best["model"])
        return evaluate.full_loss(best, self.dataset, "test", self.config, self.machine, self.processes)

    def measure_sampling_speed(self):
        """{"speeds": characters a second of each text, "seconds": spent, "others": other_load meanwhile, "attention":
        its kernels}"""
        load, started = machines.OtherLoad(self.machine), time.perf_counter()
        speeds = evaluate.inference_speed(self.model, self.config, self.machine)
        spent = {"seconds": time.perf_counter() - started, "others": load.so_far()}
        return {"speeds": speeds, **spent, "attention": self.machine.attention_of_any_length}


if __name__ == "__main__":
    console.run(main, "a smaller batch_size with gradient_accumulation_steps gives nearly the same updates")
